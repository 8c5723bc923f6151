"""A watch notices writes that no version counter tells of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from tests.doubles.fake_graphs import FakeStream, GraphDriver, install
from torch_rtx.runtime import watch
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


class Event:
    """Of CUDA; `log` gets what happens to it."""

    log: list[str]

    def record(self, stream: object) -> None:
        self.log.append("record")

    def wait(self, stream: object) -> None:
        self.log.append("wait")

    def synchronize(self) -> None:
        self.log.append("synchronize")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[GraphDriver]:
    """Makes host memory stand for that of a device."""
    found = GraphDriver((8, 8), {})
    install(monkeypatch, found)
    zeros = torch.zeros
    Event.log = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda *args, pin_memory=False, **given: zeros(*args, **given))
    monkeypatch.setattr(watch, "driver", lambda: found)
    monkeypatch.setattr(watch, "relaxed", nullcontext)
    monkeypatch.setattr(FakeStream, "cuda_stream", 99, raising=False)
    watch._memory.cache_clear()
    yield found
    watch._memory.cache_clear()


@pytest.mark.parametrize("captures", [True, False])
def test_a_comparison_on_a_device(device: GraphDriver, captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **options: object) -> None:
        raise RuntimeError("no capture")

    if not captures:
        monkeypatch.setattr(torch.cuda, "graph", refuse)
        monkeypatch.setattr(watch, "end_failed_capture", lambda device, memory: None)
    tensors = {"a": torch.randn(1000, 8), "b": torch.randn(7, dtype=torch.float64), "c": torch.ones(3)}
    sample = watch.DeviceSample(tensors, 96)
    assert not sample.exact
    assert sample.count == 3
    for turn in range(8):
        sample.launch()
        assert Event.log == ["record", "wait", "record"]
        assert not sample.wait()
        assert Event.log.pop() == "synchronize"
        Event.log.clear()
        silently(tensors["abc"[turn % 3]]).view(-1)[0] = turn + 10
        sample.launch()
        assert sample.wait()
        Event.log.clear()
        sample.take({"abc"[turn % 3]} if turn % 2 else tensors.keys())
    assert (sample._replay is not None) == captures
    assert device.streams == [99] * (16 - watch.EAGER_RUNS) * captures
