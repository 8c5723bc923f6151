"""Types of views, as ATen gives them: pure functions of a type, for code generation, which runs without torch.

Everywhere else types of new calls are inferred from the calls themselves (`lowering.infer`). These four are the only
shape functions written by hand; tests/lowering/kernels/test_view_types.py compares them with that inference.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch_rtx.ir import Dim, TensorType, dim_expr


def view(type_: TensorType, shape: tuple[Dim, ...]) -> TensorType | None:
    """The type of `view(shape)`; None if the elements have to be copied for it, or if that depends on symbols."""
    base: Dim = type_.strides[-1] if type_.strides else 1
    strides = [base] * len(shape)
    old_count: Dim = 1
    new_count: Dim = 1
    place = len(shape) - 1
    for axis in range(len(type_.shape) - 1, -1, -1):
        old_count = dim_expr("*", old_count, type_.shape[axis])
        outer = axis - 1
        if axis and (type_.shape[outer] == 1 or type_.strides[outer] == dim_expr("*", old_count, base)):
            continue  # `outer` goes on where `axis` ends: both belong to one run of memory
        while place >= 0 and (new_count != old_count or shape[place] == 1):
            strides[place] = dim_expr("*", new_count, base)
            new_count = dim_expr("*", new_count, shape[place])
            place -= 1
        if new_count != old_count:
            return None
        base, old_count, new_count = type_.strides[outer] if axis else base, 1, 1
    return TensorType(type_.dtype, shape, tuple(strides)) if place < 0 or not type_.shape else None


def permute(type_: TensorType, order: Sequence[int]) -> TensorType:
    """The type of `permute(order)`."""
    shape, strides = (tuple(dims[axis] for axis in order) for dims in (type_.shape, type_.strides))
    return TensorType(type_.dtype, shape, strides)


def unsqueeze(type_: TensorType, axis: int) -> TensorType:
    """The type of `unsqueeze(axis)`, where `axis` is not negative."""
    shape = (*type_.shape[:axis], 1, *type_.shape[axis:])
    stride = dim_expr("*", type_.shape[axis], type_.strides[axis]) if axis < len(type_.shape) else 1
    return TensorType(type_.dtype, shape, (*type_.strides[:axis], stride, *type_.strides[axis:]))


def unbind(type_: TensorType, axis: int) -> TensorType:
    """The type of each result of `unbind(axis)`, where `axis` is not negative."""
    shape, strides = ((*dims[:axis], *dims[axis + 1 :]) for dims in (type_.shape, type_.strides))
    return TensorType(type_.dtype, shape, strides)
