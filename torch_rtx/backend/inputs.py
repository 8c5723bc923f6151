"""`torch_rtx.Input`: inputs declared by shape ranges instead of example tensors, and their capture."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import nn
from torch._dynamo.exc import UserError, UserErrorType
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.dynamic_shapes import _tree_map_with_path
from torch.export.graph_signature import InputKind, InputSpec
from torch.utils import _pytree as pytree

from torch_rtx.backend.capture import capture_export
from torch_rtx.errors import CaptureError, InputError
from torch_rtx.ir import Graph, dim_syms, is_name
from torch_rtx.lowering.symbols import UNBOUNDED
from torch_rtx.profiles import Profile, Range
from torch_rtx.progress import stage

Sizes = Sequence[int]
SPAN = ("min_shape", "opt_shape", "max_shape")


class Input:
    """A tensor input without an example: a `shape`, or a `min_shape`, `opt_shape` and `max_shape`, or `profiles`.

    An axis is dynamic if its sizes differ, over all profiles. All inputs of a call must fit one profile. The first
    profile's `opt_shape` selects the kernels.

    Args:
        shape: the only shape, in elements.
        min_shape, opt_shape, max_shape: the only profile.
        dtype: of the tensor.
        name: the name in errors and in the engine; None: the parameter of the model's forward.
        device: of the tensor; None: `CompilationSettings.device`, or the model's device.
        profiles: a list of `(min_shape, opt_shape, max_shape)`. Inputs with a dynamic axis must have equally many.
        shared_dims: names by axis. All axes with one name, here and in other inputs, have equal sizes in every call,
            and must have equal ranges.

    Raises:
        InputError: the arguments contradict each other; the message has the numbers.
    """

    def __init__(
        self,
        shape: Sizes | None = None,
        *,
        min_shape: Sizes | None = None,
        opt_shape: Sizes | None = None,
        max_shape: Sizes | None = None,
        dtype: torch.dtype = torch.float32,
        name: str | None = None,
        device: torch.device | str | None = None,
        profiles: Sequence[tuple[Sizes, Sizes, Sizes]] | None = None,
        shared_dims: Mapping[int, str] | None = None,
        **others: object,
    ) -> None:
        if others:
            hint = f"it has shape, {', '.join(SPAN)}, dtype, name, device, profiles and shared_dims"
            raise InputError(f"an Input has no {', '.join(others)}", hint=hint)
        self.dtype, self.name, self.device, self.shared_dims = dtype, name, device, dict(shared_dims or {})
        what = "an Input" if name is None else f"input {name!r}"
        if name is not None and not (isinstance(name, str) and is_name(name)):
            raise InputError(f"{name!r} is not a valid name of an input", hint="use letters, digits and _")
        if not isinstance(dtype, torch.dtype):
            raise InputError(f"the dtype of {what} must be a torch.dtype, not {dtype!r}")
        span = (min_shape, opt_shape, max_shape)
        if (shape is not None) + (span != (None, None, None)) + (profiles is not None) != 1:
            given = dict(zip(("shape", *SPAN, "profiles"), (shape, *span, profiles), strict=True))
            said = ", ".join(f"{key}={value}" for key, value in given.items() if value is not None)
            hint = "give a shape, or min_shape, opt_shape and max_shape, or profiles"
            raise InputError(f"{what} has {said or 'no shape'}", hint=hint)
        if profiles is not None and (not isinstance(profiles, list | tuple) or not profiles):
            raise InputError(f"the profiles of {what} must be a list of at least one, not {profiles!r}")
        spans = profiles or [span if shape is None else (shape, shape, shape)]
        self.profiles = tuple(_profile(what, number, given) for number, given in enumerate(spans))
        ranks = [len(profile) for profile in self.profiles]
        if len(set(ranks)) != 1:
            raise InputError(f"the profiles of {what} have {', '.join(map(str, ranks))} axes")
        for axis, shared in self.shared_dims.items():
            if type(axis) is not int or not 0 <= axis < ranks[0]:
                raise InputError(f"shared_dims of {what} names axis {axis!r} of {ranks[0]}")
            if not isinstance(shared, str) or not is_name(shared):
                raise InputError(f"shared_dims of {what} names axis {axis} {shared!r}, which is not a valid name")

    def __repr__(self) -> str:
        shapes = ", ".join(f"[{', '.join(map(str, profile))}]" for profile in self.profiles)
        return f"Input({shapes}, {self.dtype})"


def _profile(what: str, number: int, given: Any) -> tuple[Range, ...]:
    """The range of each axis."""
    if not isinstance(given, list | tuple) or len(given) != len(SPAN):
        raise InputError(f"profile {number} of {what} must be ({', '.join(SPAN)}), not {given!r}")
    for name, shape in zip(SPAN, given, strict=True):
        if not isinstance(shape, Sequence) or not all(type(n) is int and 0 <= n < UNBOUNDED for n in shape):
            raise InputError(f"profile {number} of {what} has {name}={shape!r}, which is not a tuple of sizes")
    if len({len(shape) for shape in given}) != 1:
        raise InputError(f"profile {number} of {what} has {', '.join(f'{len(shape)}' for shape in given)} axes")
    for axis, (low, opt, high) in enumerate(zip(*given, strict=True)):
        if not low <= opt <= high:
            raise InputError(f"profile {number} of {what} has on axis {axis} min {low}, opt {opt}, max {high}")
    return tuple(Range(*sizes) for sizes in zip(*given, strict=True))


@dataclass(frozen=True)
class Axis:
    """A dynamic axis.

    Attributes:
        leaf: the index of the flat argument.
        axis: the dimension of that argument.
        label: the name in errors.
        ranges: one per profile.
        dim: the name of the torch.export.Dim: the shared name, or a unique one.
    """

    leaf: int
    axis: int
    label: str
    ranges: tuple[Range, ...]
    dim: str

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest size over all profiles."""
        return _bounds(self.ranges)


def _bounds(ranges: Sequence[Range]) -> tuple[int, int]:
    return min(found.min for found in ranges), max(found.max or 0 for found in ranges)


@dataclass(frozen=True)
class DeclaredInputs:
    """The arguments of `capture_export`, with an example tensor for each `Input`.

    Attributes:
        axes: the dynamic axes.
        names: declared names, by the index of the flat argument.
    """

    model: nn.Module | ExportedProgram
    args: tuple[Any, ...] | None
    kwargs: Mapping[str, Any] | None
    dynamic_shapes: Any
    device: str | None
    axes: Sequence[Axis] = ()
    names: Mapping[int, str] = field(default_factory=dict)

    def capture(self) -> ExportedProgram:
        """See `capture_export`.

        Raises:
            CaptureError: also if the model does not accept every declared size.
        """
        stage("capturing the model")
        if not self.axes:
            return self._capture(self.dynamic_shapes)
        dims = {axis.dim: Dim(axis.dim, min=axis.bounds[0], max=axis.bounds[1]) for axis in self.axes}
        try:
            return self._capture(self._shapes([dims[axis.dim] for axis in self.axes]))
        except UserError as error:
            if error.error_type is not UserErrorType.CONSTRAINT_VIOLATION:
                raise
            raise self._refusal(error) from error

    def _capture(self, dynamic_shapes: Any) -> ExportedProgram:
        return capture_export(self.model, self.args, self.kwargs, dynamic_shapes=dynamic_shapes, device=self.device)

    def _shapes(self, dims: Sequence[Any]) -> Any:
        """The `dynamic_shapes` that have one of `dims` at each axis."""
        tensors = pytree.tree_leaves((self.args, self.kwargs))
        shapes = ShapesCollection()
        for axis, dim in zip(self.axes, dims, strict=True):
            shapes[tensors[axis.leaf]][axis.axis] = dim
        return shapes.dynamic_shapes(self.model, self.args, self.kwargs)

    def _refusal(self, error: UserError) -> CaptureError:
        """Replaces torch.export's error, whose symbols the user does not know. A second capture with Dim.AUTO shows
        which sizes the model fixes or ties together."""
        program = self._capture(self._shapes([Dim.AUTO(min=a.bounds[0], max=a.bounds[1]) for a in self.axes]))
        problems = list(_problems(self.axes, self._sizes(program), program.range_constraints))
        if not problems:
            lines = [line.strip(" -") for line in str(error).splitlines() if line.startswith("  - ")]
            said = " ".join([*lines[:3], f"And {len(lines) - 3} more." * (len(lines) > 3)]).strip()
            problems = [(said, "declare sizes that the model takes, by torch.export.Dim in dynamic_shapes")]
        return CaptureError(
            f"the model does not take all sizes of its inputs: {'; '.join(problem for problem, _ in problems)}",
            hint="; ".join(dict.fromkeys(remedy for _, remedy in problems)),
        )

    def _sizes(self, program: ExportedProgram) -> list[int | torch.SymInt]:
        """The size of each axis in `program`."""
        values = {node.name: node.meta["val"] for node in program.graph.find_nodes(op="placeholder")}
        given = user_inputs(program)
        return [values[given[axis.leaf].arg.name].shape[axis.axis] for axis in self.axes]

    def typical(self, program: ExportedProgram) -> dict[sympy.Symbol, int]:
        """The typical values of the symbols of `program`; none for an `opt` of 0, for which no kernel is tuned."""
        sizes = zip(self._sizes(program), self.axes, strict=True)
        return {size.node.expr: opt for size, axis in sizes if (opt := axis.ranges[0].opt)}  # type: ignore[union-attr]

    def profiles(self, graph: Graph, positions: Sequence[Any]) -> tuple[Profile, ...]:
        """The profiles of the lowered `graph`.

        Args:
            positions: for each flat argument, its index among the graph's inputs.
        """
        count = len(self.axes[0].ranges) if self.axes else 0
        dims = [graph.inputs[positions[axis.leaf]].type.shape[axis.axis] for axis in self.axes]
        named = list(zip(map(str, dims), self.axes, strict=True))  # all are symbols: `capture` refuses others
        return tuple({name: axis.ranges[number] for name, axis in named} for number in range(count))

    def names_of_sizes(self, graph: Graph, positions: Sequence[Any]) -> dict[str, str]:
        """By symbol of the lowered `graph`, the caller's name of that size: of its `Dim`, or in `shared_dims`.

        Args:
            positions: see `profiles`.
        """
        named = {(axis.leaf, axis.axis): axis.dim for axis in self.axes if is_name(axis.dim)}
        found: dict[str, str] = {}
        for (leaf, axis), name in {**named, **self._names_of_dims()}.items():
            if type(positions[leaf]) is int:
                for sym in dim_syms(graph.inputs[positions[leaf]].type.shape[axis]):
                    found.setdefault(sym.name, name)
        return found

    def _names_of_dims(self) -> dict[tuple[int, int], str]:
        """The names of the `Dim`s in `dynamic_shapes`, by flat argument and axis."""
        shapes = self.dynamic_shapes
        if not shapes or not isinstance(self.model, nn.Module):
            return {}
        if isinstance(shapes, ShapesCollection):
            shapes = shapes.dynamic_shapes(self.model, self.args, self.kwargs)
        given = inspect.signature(self.model.forward).bind(*(self.args or ()), **(self.kwargs or {})).arguments
        given = given if isinstance(shapes, Mapping) else type(shapes)(given.values())
        leaves = {id(leaf): index for index, leaf in enumerate(pytree.tree_leaves((self.args, self.kwargs)))}
        names = {}

        def visit(_: Any, leaf: Any, shape: Any) -> None:
            if not isinstance(leaf, torch.Tensor):
                return
            axes = shape.items() if isinstance(shape, Mapping) else enumerate(shape or ())
            roots = {axis: getattr(dim, "root", dim) for axis, dim in axes}  # of 2 * dim + 1 as well
            names.update({(leaves[id(leaf)], axis): dim.__name__ for axis, dim in roots.items() if type(dim) is Dim})

        _tree_map_with_path(visit, given, shapes, tree_name="inputs")
        return names


def user_inputs(program: ExportedProgram) -> list[InputSpec]:
    """The input specs of `program` for the flat arguments of a call, in order."""
    return [spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]


def _problems(
    axes: Sequence[Axis], sizes: Sequence[Any], ranges: Mapping[sympy.Symbol, Any]
) -> Iterator[tuple[str, str]]:
    """(problem, remedy) for each axis that the model restricts more than its `Input` declares."""
    first: dict[sympy.Expr, Axis] = {}
    for axis, size in zip(axes, sizes, strict=True):
        low, high = axis.bounds
        expr = sympy.Integer(size) if isinstance(size, int) else size.node.expr
        captured = ranges.get(expr)
        # torch.export assumes that every dynamic size is at least 2, whatever its declared range.
        least = low if captured is None or captured.lower <= max(low, 2) else captured.lower
        if expr.is_Integer:
            yield f"{axis.label} can only be {expr}, not {low}..{high}", f"declare the size {expr} alone"
        elif not expr.is_Symbol:
            text = expr.xreplace({e: sympy.Symbol(f"({a.label})") for e, a in first.items()})
            yield f"{axis.label} is always {text}", "declare this by torch.export.Dim in dynamic_shapes"
        elif expr in first and axis.dim != first[expr].dim:
            yield f"{axis.label} always equals {first[expr].label}", "give both one name in shared_dims"
        elif captured is not None and (least > low or captured.upper < high):
            yield f"{axis.label} can only be {least}..{captured.upper}, not {low}..{high}", "declare that range"
        first.setdefault(expr, axis)


# ---- from declared inputs to a capture -------------------------------------------------------------------------------


def declare(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
    device: str | None,
) -> DeclaredInputs:
    """Replace every `Input` in the arguments of `capture_export` by an example tensor.

    Raises:
        InputError: inputs contradict each other, `dynamic_shapes` or `device`.
    """
    leaves, spec = pytree.tree_flatten_with_path((args, dict(kwargs or {})))
    inputs = {number: leaf for number, (_, leaf) in enumerate(leaves) if isinstance(leaf, Input)}
    if not inputs or not isinstance(model, nn.Module) or not isinstance(args, tuple):
        return DeclaredInputs(model, args, kwargs, dynamic_shapes, device)  # the capture refuses an Input here
    names = {number: given.name for number, given in inputs.items() if given.name is not None}
    labels = {number: names.get(number) or _label(model, leaves[number][0]) for number in inputs}
    axes = [axis for number, given in inputs.items() for axis in _axes(number, given, labels[number])]
    _check(inputs, labels, axes, dynamic_shapes)
    values = [leaf for _, leaf in leaves]
    for number, given in inputs.items():
        values[number] = _example(model, given, labels[number], device)
    args, kwargs = pytree.tree_unflatten(values, spec)
    return DeclaredInputs(model, args, kwargs, dynamic_shapes, device, axes, names)


def _label(model: nn.Module, path: tuple[Any, ...]) -> str:
    """The name of an argument in the model's forward, for errors."""
    of_kwargs, first, *rest = path
    if of_kwargs.idx == 1:
        label = str(first.key)
    else:
        names = forward_names(model)
        label = names[first.idx] if first.idx < len(names) else f"#{first.idx}"
    return label + pytree.keystr(tuple(rest))


def _axes(number: int, given: Input, label: str) -> Iterator[Axis]:
    """The dynamic axes of an input."""
    for index, ranges in enumerate(zip(*given.profiles, strict=True)):
        axis = Axis(number, index, f"dimension {index} of input {label!r}", ranges, f"_{number}_{index}")
        if axis.bounds[0] != axis.bounds[1]:
            yield replace(axis, dim=given.shared_dims.get(index, axis.dim))


def _check(inputs: Mapping[int, Input], labels: Mapping[int, str], axes: Sequence[Axis], dynamic_shapes: Any) -> None:
    """Raises InputError if inputs contradict each other or `dynamic_shapes`."""
    again = [name for name, count in Counter(labels.values()).items() if count > 1]
    if again:
        raise InputError(f"two inputs have the name {again[0]!r}")
    count = max(len(given.profiles) for given in inputs.values())
    if not axes and count > 1:
        raise InputError(f"there are {count} profiles, but no size varies", hint="give a shape")
    free = {axis.label: len(axis.ranges) for axis in axes}
    if len(set(free.values())) > 1:
        counts = ", ".join(f"{label} has {number}" for label, number in free.items())
        raise InputError(f"inputs have different numbers of profiles: {counts}")
    narrow = [axis.label for axis in axes if axis.bounds[1] < 2]
    if narrow:
        raise InputError(f"{narrow[0]} has the range 0..1, which can't be captured", hint="let its max be 2 or more")
    _check_shared(inputs, labels)
    if axes and dynamic_shapes is not None:
        raise InputError(f"dynamic_shapes is given, and {axes[0].label} has its own range", hint="give one of the two")


def _check_shared(inputs: Mapping[int, Input], labels: Mapping[int, str]) -> None:
    """Raises InputError if axes of one name have different ranges."""
    first: dict[str, tuple[str, tuple[Range, ...]]] = {}
    for number, given in inputs.items():
        for axis, name in given.shared_dims.items():
            label, ranges = f"dimension {axis} of input {labels[number]!r}", tuple(p[axis] for p in given.profiles)
            ranges = ranges[:1] if len(set(ranges)) == 1 else ranges  # inputs of one shape have one profile
            other, others = first.setdefault(name, (label, ranges))
            if ranges != others:
                texts = [", ".join(map(str, found)) for found in (others, ranges)]
                raise InputError(
                    f"{other} and {label} are both {name!r}, and have the ranges {texts[0]} and {texts[1]}"
                )


def _example(model: nn.Module, given: Input, label: str, device: str | None) -> torch.Tensor:
    """A tensor of zeros (valid indices, too) to trace with. It has the `opt` sizes, but at least 2 on a dynamic axis:
    a capture specializes on sizes 0 and 1."""
    sizes = []
    for ranges in zip(*given.profiles, strict=True):
        low, high = _bounds(ranges)
        sizes.append(low if low == high else min(max(ranges[0].opt or 0, 2), high))
    if device is not None:
        wanted = torch.device(given.device or device)
        if wanted.type != torch.device(device).type:
            raise InputError(f"input {label!r} is on {wanted}, and the engine is for {device}")
        return torch.empty(sizes, dtype=given.dtype, device="meta")  # the capture reads only its type
    tensors = (*model.parameters(), *model.buffers())
    devices = (t.device for t in tensors if not t.is_meta and not isinstance(t, FakeTensor))
    return torch.zeros(sizes, dtype=given.dtype, device=given.device or next(devices, "cpu"))


def forward_names(model: nn.Module | ExportedProgram) -> tuple[str, ...]:
    """The names of the positional parameters of the model's forward; may be incomplete."""
    if not isinstance(model, nn.Module):
        captured = next((entry.signature for entry in model.module_call_graph if entry.fqn == ""), None)
        return tuple(captured.forward_arg_names or ()) if captured is not None else ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(n for n, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds)
