"""Where outputs of a matrix product go: whatever views follow it, an accepted inverse is right for every element."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.epilogue_index import Tile, epilogue_indexing, needs
from torch_rtx.lowering.kernels.index import constant, variable
from torch_rtx.lowering.kernels.kernel_ir import ZERO, Load, Position, Tensor
from torch_rtx.lowering.kernels.ops.views import move, permute, reshape

N = constant


def product_of(shape: tuple[int, ...], axis: int) -> Tile:
    """A product without batches whose result has `shape`."""
    out = Load(tuple(map(N, shape)), "f32", "", (), anchor=True)
    rows = math.prod(size for at, size in enumerate(shape) if at != axis)
    return Tile(out, axis, variable("M", N(rows)), ZERO, N(shape[axis]))


def sizes(tensor: Tensor) -> list[int]:
    return [size.number or 0 for size in tensor.shape]


def sliced(tensor: Tensor, axis: int, start: int, step: int, count: int) -> Tensor:
    """Every `step`-th of a dimension, `count` times."""

    def at(position: Position) -> Position:
        return tuple(p * N(step) + N(start) if which == axis else p for which, p in enumerate(position))

    return move(tensor, tuple(N(count) if which == axis else size for which, size in enumerate(tensor.shape)), at)


@st.composite
def outputs(draw: st.DrawFn) -> tuple[Tile, Tensor]:
    """A product and a view of it."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4)))
    tile = product_of(shape, draw(st.integers(0, len(shape) - 1)))
    found: Tensor = tile.out
    for kind in draw(st.lists(st.sampled_from(["permute", "reshape", "slice"]), max_size=4)):
        now = sizes(found)
        if kind == "permute":
            found = permute(found, draw(st.permutations(range(len(now)))), out=())
        elif kind == "reshape":
            first = draw(st.sampled_from([d for d in range(1, 13) if math.prod(now) % d == 0]))
            rest = math.prod(now) // first
            second = draw(st.sampled_from([d for d in range(1, 13) if rest % d == 0]))
            found = reshape(found, (N(first), N(second), N(rest // second)))
        else:
            axis = draw(st.integers(0, len(now) - 1))
            step = draw(st.sampled_from([d for d in (1, 2, 3) if now[axis] % d == 0]))
            count = draw(st.integers(1, now[axis] // step))
            found = sliced(found, axis, draw(st.integers(0, now[axis] - step * count)), step, count)
    return tile, found


@given(outputs())
def test_an_accepted_inverse_is_right(case: tuple[Tile, Tensor]) -> None:
    tile, output = case
    try:
        epilogue = epilogue_indexing([output], tile)
    except Unsupported:
        return
    (position,) = epilogue.positions
    own = {tile.position(column) for column in epilogue.columns}
    if not set(needs(output, position, tile.out)) <= own:
        return  # the emitter refuses it
    rows = math.prod(size.number or 0 for size in tile.lead)
    reached = set()
    for m, n in itertools.product(range(rows), range(epilogue.width.number or 0)):
        reached.add(tuple(eval(str(index), {}, {"M": m, "N": n}) for index in position))
    assert reached == set(itertools.product(*map(range, sizes(output))))
    assert len(reached) == rows * (epilogue.width.number or 0)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_permutes_and_reshapes_have_an_inverse(axis: int, order: tuple[int, ...]) -> None:
    tile = product_of((4, 6, 5), axis)
    permuted = permute(tile.out, order, out=())
    split = reshape(tile.out, (N(2), N(2), N(3), N(2), N(5)))
    mixed = permute(split, (order[0], 4, order[1], 3, order[2]), out=())
    first, second, *rest = sizes(mixed)
    merged = reshape(mixed, (N(first * second), N(math.prod(rest))))
    for output in (permuted, reshape(permuted, (N(120),)), mixed, merged):
        (position,) = epilogue_indexing([output], tile).positions
        assert needs(output, position, tile.out) == [tile.position(variable("N", tile.columns))]
