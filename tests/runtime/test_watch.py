"""A watch notices writes that no version counter tells of."""

from __future__ import annotations

import ctypes
import math
import subprocess
from pathlib import Path

import pytest
import torch

from torch_rtx.lowering.kernels import toolchain
from torch_rtx.runtime import watch, words
from torch_rtx.runtime.watch import Watch, same_bits

DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
]


def watched(*tensors: torch.Tensor, sampled: bool = True) -> Watch:
    return Watch({f"t{index}": tensor.detach() for index, tensor in enumerate(tensors)}, sampled)


def silently(tensor: torch.Tensor) -> torch.Tensor:
    """An alias with a version counter of its own."""
    return tensor.data


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_word_of_a_small_tensor(dtype: torch.dtype) -> None:
    ones = torch.ones(3, 5, dtype=torch.float32)
    tensor, other = ones.to(dtype), torch.ones(4)
    found = watched(tensor, other)
    assert not found.partial
    for index in range(15):
        silently(tensor).view(-1)[index] = 0
        assert found.changed()
        assert found.take() == {"t0", "t1"}  # such writes rarely come alone
        assert not found.changed()
        assert found.take() == set()


def test_every_way_to_write() -> None:
    array = torch.randn(4, 4).numpy()
    flat, base = torch.randn(20), torch.randn(8, 8)
    tensors = [torch.from_numpy(array), flat[4:].view(4, 4), base[::2, 1::3], torch.randn(4, 4).t(), torch.randn(())]
    found = watched(*tensors)

    def assign() -> None:
        array[1, 2] = 7

    ways = [
        assign,
        lambda: silently(flat).__setitem__(9, 7.0),
        lambda: silently(base)[::2, 1::3][3].zero_(),
        lambda: silently(tensors[3]).mul_(2),
        lambda: silently(tensors[4]).add_(1),
    ]
    for write in ways:
        assert not found.changed()
        write()
        assert found.changed()
        found.take()


def test_bits_are_compared() -> None:
    tensor = torch.tensor([math.nan, 0.0])
    found = watched(tensor)
    assert not found.changed()
    silently(tensor)[1] = -0.0
    assert found.changed()
    assert same_bits(tensor, tensor.clone())
    assert not same_bits(tensor, torch.tensor([math.nan, 0.0]))
    numbers = torch.tensor([1 + 2j], dtype=torch.complex128)
    assert same_bits(numbers, numbers.clone())
    assert same_bits(numbers.conj(), numbers.conj().resolve_conj())


@pytest.mark.parametrize("shape", [(768, 768), (3, 64, 96), (4096, 30), (100_003,), (512, 3, 7, 7)])
def test_the_sample_is_spread_over_every_dim(shape: tuple[int, ...]) -> None:
    """Wherever a write to part of the rows, columns or channels is, it meets some of them."""
    tensor = torch.arange(math.prod(shape), dtype=torch.int32).view(shape)
    words = watch._comb(tensor, 512)
    assert 512 <= len(words) <= 700
    assert words[-1] >= 0.99 * tensor.numel()
    for dim, size in enumerate(shape):
        below = math.prod(shape[dim + 1 :])
        met = len(torch.unique(words // below % size))
        assert met == size if size <= 128 else met >= min(size, len(words)) * 2 / 3


def test_a_large_tensor_is_sampled() -> None:
    large = torch.zeros(1 << 20)
    found = watched(large, torch.zeros(3))
    assert found.partial
    silently(large)[12345] = 1  # too few to be noticed
    assert not found.changed()
    silently(large)[::50] += 1  # every fiftieth
    assert found.changed()
    assert not watched(large, sampled=False).partial


def test_counters_tell_which_tensor_changed() -> None:
    tensors = [torch.randn(5) for _ in range(3)]
    found = watched(*tensors)
    tensors[1].add_(1)
    tensors[2][0] = 3
    assert found.changed()
    assert found.take() == {"t1", "t2"}
    tensors[0].add_(1)
    silently(tensors[2]).add_(1)
    assert found.take() == {"t0", "t1", "t2"}
    assert found.take() == set()
    counters = watched(*tensors, sampled=False)
    silently(tensors[0]).add_(1)
    assert not counters.changed()
    tensors[0].add_(1)
    assert counters.take() == {"t0"}


def test_beside_a_call() -> None:
    """What is in host memory, while a device is busy."""
    tensor = torch.randn(5)
    found = Watch({"t": tensor.detach()}, True, beside=True)
    found.launch()
    assert not found.wait()
    silently(tensor).add_(1)
    assert not found.changed()
    found.launch()
    assert found.wait()
    assert found.differs()
    assert found.take() == set()
    assert found.take(everything=True) == {"t"}
    assert not found.differs()
    tensor.add_(1)
    assert found.changed()


def test_inference_tensors_always_changed() -> None:
    with torch.inference_mode():
        inference = torch.randn(3)
    tensor = torch.randn(3)
    found = Watch({"t0": inference, "t1": tensor}, True)
    assert found.changed()
    assert found.take() == {"t0"}
    silently(tensor).add_(1)
    assert found.take() == {"t0", "t1"}


def test_in_inference_mode_and_out_of_it() -> None:
    tensor = torch.randn(3)
    with torch.inference_mode():
        found = watched(tensor)
        assert not found.changed()
    tensor.add_(1)
    assert found.take() == {"t0"}
    with torch.inference_mode():
        assert not found.changed()


# On a device ----------------------------------------------------------------------------------------------------------


class HostWords:
    """`Words` whose device is the host."""

    def __init__(self, addresses: torch.Tensor, device: torch.device) -> None:
        assert (addresses % 4 == 0).all()
        self.words = [ctypes.c_int32.from_address(address) for address in addresses.tolist()]
        self.known = [-1] * len(self.words)

    def record(self, start: int, count: int) -> None:
        for index in range(start, start + count):
            self.known[index] = self.words[index].value

    def mark(self) -> None:
        self.now = [word.value for word in self.words]

    def differ(self) -> bool:
        return self.now != self.known


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "Words", HostWords)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)


@pytest.mark.usefixtures("on_host")
def test_a_comparison_on_a_device() -> None:
    tensors = {"a": torch.randn(1000, 8), "b": torch.randn(7, dtype=torch.float64), "c": torch.ones(3)}
    sample = watch.DeviceSample(tensors, 96)
    assert not sample.exact
    assert sample.count == 3
    for turn in range(8):
        sample.launch()
        assert not sample.wait()
        silently(tensors["abc"[turn % 3]]).view(-1)[0] = turn + 10
        sample.launch()
        assert sample.wait()
        sample.take({"abc"[turn % 3]} if turn % 2 else tensors.keys())


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_word_of_a_small_tensor_on_a_device(dtype: torch.dtype) -> None:
    flat = torch.ones(17).to(dtype)
    tensors = {"part": flat[1:16].view(3, 5), "rest": torch.ones(3)}
    sample = watch.DeviceSample(tensors, 96)
    assert sample.exact
    for index in range(1, 16):
        flat[index] = 0
        sample.launch()
        assert sample.wait()
        sample.take({"part"})
        sample.launch()
        assert not sample.wait()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128, torch.float16, torch.int8], ids=str)
def test_a_sample_on_a_device_has_each_word_of_large_elements(dtype: torch.dtype) -> None:
    part = torch.zeros(1 << 16).to(dtype)[::7]
    offsets = watch._addresses(part) - part.data_ptr()
    assert len(offsets) == len(part)
    size = part.element_size()
    assert set((offsets % max(size, 4)).tolist()) == set(range(0, max(size, 4), 4))
    elements = offsets // size if size >= 4 else (offsets + 3) // size
    assert ((elements - torch.arange(len(part)) * 7).abs() <= 3).all()


@pytest.mark.parametrize("sm", [75, 80, 90, 120])
def test_the_kernels_assemble(sm: int, tmp_path: Path) -> None:
    source, binary = tmp_path / "words.ptx", tmp_path / "words.cubin"
    source.write_text(words.PTX)
    subprocess.run(
        [toolchain._triton().get_ptxas(sm).path, f"-arch=sm_{sm}", source, "-o", binary], check=True, timeout=60
    )
    assert {b"record", b"compare"} <= set(binary.read_bytes().split(b"\0"))
