"""Calls that write a part of a copy, of tensors that lie behind others in memory."""

from __future__ import annotations

import pytest
import torch

from torch_rtx import aten
from torch_rtx.scatters import VIEWS

MEMORY = torch.linspace(-1, 1, 4096)
TENSORS = {
    "rows": MEMORY[512:640].view(8, 16),
    "columns": MEMORY[512:640].view(16, 8).t(),
    "a range of columns": MEMORY[512:768].view(8, 32)[:, 8:24],
    "repeated": MEMORY[512:528].expand(8, 16),
    "nothing": MEMORY[512:512].view(0, 16),
}
ARGUMENTS = {
    "slice_scatter": ({"dim": 1, "start": 2, "end": 12, "step": 3}, {"dim": 0}),
    "select_scatter": ({"dim": 1, "index": -2}, {"dim": 1, "index": 3}),
    "diagonal_scatter": ({"offset": 1}, {"dim1": 1, "dim2": 0}),
}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_the_copy_is_of_the_tensor_alone(tensor: torch.Tensor, name: str, which: int) -> None:
    given = ARGUMENTS[name][which]
    source = torch.randn_like(VIEWS[name](tensor, **given))
    expected = getattr(torch.ops.aten, name).default(tensor, source, **given)
    call = aten.overload(f"aten.{name}.default")
    found = call(tensor, source, **given)
    assert torch.equal(found, expected)
    like = [torch.empty_strided(one.shape, one.stride(), device="meta") for one in (tensor, source)]
    assert found.stride() == expected.stride() == call(*like, **given).stride()
    assert found.storage_offset() == 0
    assert found.untyped_storage().nbytes() <= 4 * 256
