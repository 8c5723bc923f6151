"""Lists of blocks for checks that run a region with `flex_attention` alone.

Random numbers in their place would list no block, or one twice: nothing would be checked, and every tile be as fast.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch

from torch_rtx.ir import Graph, Value, attr_values
from torch_rtx.op_work import FLEX, FLEX_GRAD_KEY_VALUE, FLEX_GRADS
from torch_rtx.runtime.inline import inline_kernels


def fill_lists(graph: Graph, inputs: Sequence[torch.Tensor], known: Container[str]) -> None:
    """Overwrite those of `inputs` that are lists of blocks by those of a causal mask, but for the `known` ones."""
    given = {value.name: tensor for value, tensor in zip(graph.inputs, inputs, strict=True)}
    for node in inline_kernels(graph, {}).nodes:
        lists = [*attr_values(node.arg("blocks"))] if node.op in (FLEX, *FLEX_GRADS) else []
        if not lists or not all(_is_open(value, given, known) for value in lists):
            continue
        tensors = [given[value.name] for value in lists]
        for whole, (count, indices) in enumerate(zip(tensors[::2], tensors[1::2], strict=True)):
            _fill(count, indices, bool(whole), len(tensors) > 2, node.op == FLEX_GRAD_KEY_VALUE)


def by_queries(count: torch.Tensor, indices: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of blocks of queries for each block of keys, as lists of blocks of keys for each of `blocks` of queries."""
    *lead, places = indices.shape
    is_listed = torch.arange(places, device=count.device) < count[..., None]
    room = torch.zeros(*lead, blocks + 1, dtype=torch.int32, device=count.device)
    found = room.scatter_(-1, torch.where(is_listed, indices, blocks).long(), 1)[..., :blocks].mT
    return found.sum(-1, dtype=torch.int32), found.argsort(-1, descending=True).int()


def _is_open(value: Value, given: dict[str, torch.Tensor], known: Container[str]) -> bool:
    return value.name in given and value.name not in known


def _fill(count: torch.Tensor, indices: torch.Tensor, whole: bool, two: bool, by_keys: bool) -> None:
    """One pair of lists: of the blocks up to the diagonal, or, `by_keys`, from it on. With `two` pairs the first has
    the diagonal and the second the `whole` blocks."""
    *_, blocks, places = indices.shape
    device = indices.device
    at, place = torch.arange(blocks, device=device), torch.arange(places, device=device)
    diagonal = (at * places // max(blocks, 1)).clamp(max=max(places - 1, 0))
    number = places - diagonal if by_keys else diagonal + 1
    start = diagonal if by_keys else torch.zeros_like(diagonal)
    if two:
        number = number - 1 if whole else torch.ones_like(number).clamp(max=places)
        start = diagonal + by_keys if whole and by_keys else start if whole else diagonal
    count.copy_(number.to(count.dtype).expand(count.shape))
    indices.copy_(((start[:, None] + place) % max(places, 1)).to(indices.dtype).expand(indices.shape))
