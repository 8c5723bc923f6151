"""Tensors are written as safetensors reads them, without numpy."""

from __future__ import annotations

import gc
import io
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from torch_rtx import aten
from torch_rtx.dtypes import DTYPES
from torch_rtx.serialization import memory_of, serialize

TENSORS = {
    f"{name} {suffix}": torch.arange(6, dtype=torch.uint8).repeat(16)[: 6 * dtype.itemsize].view(dtype).reshape(shape)
    for name, dtype in aten.DTYPES.items()
    if DTYPES[name].safetensors and dtype != torch.bool
    for suffix, shape in (("ä", (2, 3)), ("\n\"'", (6,)))
}
TENSORS |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "flag": torch.tensor([True, False])}


@pytest.mark.quick
def test_safetensors_reads_it(tmp_path: Path) -> None:
    header, data = serialize(TENSORS, {"a": 'b"c'})
    path = tmp_path / "tensors.safetensors"
    path.write_bytes(header + b"".join(data))
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
    assert len(header) % 8 == 0
    assert serialize(dict(reversed(TENSORS.items())), {"a": 'b"c'})[0] == header
    path.write_bytes(header + b"".join(data)[:-1])
    with pytest.raises(SafetensorError):
        load_file(path)


def test_memory_is_that_of_the_tensor() -> None:
    tensor = torch.arange(1 << 20)
    view = memory_of(tensor)
    assert io.BytesIO(bytes([7] + [0] * 7)).readinto(view[:8]) == 8
    assert tensor[0] == 7
    address = tensor.data_ptr()
    del tensor
    gc.collect()
    others = [torch.empty(1 << 20, dtype=torch.int64) for _ in range(4)]  # do not get its memory
    assert address not in [other.data_ptr() for other in others]
    assert bytes(view[:8])[0] == 7
    assert len(memory_of(torch.empty(0))) == 0


def test_names_that_no_file_can_have() -> None:
    with pytest.raises(UnicodeEncodeError):
        serialize({"\ud800": torch.ones(1)})
