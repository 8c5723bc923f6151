"""Sizes and shapes on the command line: `batch=8`, `batch=1:4:16`, `x:8x3x224x224,y:8`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Annotated, Any, NoReturn

import typer

from torch_rtx.errors import SettingsError
from torch_rtx.ir import Dim, evaluate

Shape = tuple[int, ...]
Spans = Sequence[Mapping[str, tuple[Shape, Shape, Shape]]]  # see `spans_given`
Span = int | tuple[int, ...]  # a size, or the smallest, the typical and the largest one

SIZE_HELP = (
    "A size that an ONNX model or a folder leaves open, as batch=8, or batch=1:4:16 (smallest, typical, largest); "
    "repeatable."
)
PROFILE_HELP = "Sizes of one optimization profile, as batch=1:4:16,sequence=128, added to --size; repeatable."
SHAPES_HELP = "{} shapes of inputs, as x:1x3x224x224,y:1; repeatable, for several optimization profiles."
Sizes = Annotated[list[str] | None, typer.Option("--size", "-s", help=SIZE_HELP)]
Profiles = Annotated[list[str] | None, typer.Option("--profile", help=PROFILE_HELP)]
MinShapes = Annotated[list[str] | None, typer.Option("--min-shapes", help=SHAPES_HELP.format("Smallest"))]
OptShapes = Annotated[list[str] | None, typer.Option("--opt-shapes", help=SHAPES_HELP.format("Typical"))]
MaxShapes = Annotated[list[str] | None, typer.Option("--max-shapes", help=SHAPES_HELP.format("Largest"))]


def sizes_given(given: Iterable[str]) -> dict[str, Span]:
    """The sizes that texts such as `batch=8` or `batch=1:4:16` stand for.

    Raises:
        SettingsError: a text is none, or gives a size again.
    """
    found: dict[str, Span] = {}
    for text in given:
        name, _, numbers = text.rpartition("=")
        parts = numbers.split(":")
        if not name or name in found or len(parts) not in (1, 3) or not all(_is_size(part) for part in parts):
            again = ", or is given twice" * (name in found)
            raise SettingsError(f"{text!r} is not a size{again}", hint="sizes look like batch=8 or batch=1:4:16")
        found[name] = int(parts[0]) if len(parts) == 1 else tuple(map(int, parts))
    return found


def shapes_given(text: str) -> dict[str, Shape]:
    """The shapes that a text such as `x:8x3x224x224,y:8` stands for, by the names of inputs.

    Raises:
        SettingsError: it is none.
    """
    found: dict[str, Shape] = {}
    for part in text.split(","):
        name, _, numbers = part.rpartition(":")
        sizes = [] if numbers == "scalar" else numbers.split("x")
        if not name or name in found or not all(_is_size(size) for size in sizes):
            raise SettingsError(f"{text!r} is no list of shapes", hint="shapes look like x:8x3x224x224,y:8")
        found[name] = tuple(map(int, sizes))
    return found


def spans_given(least: Sequence[str] | None, typical: Sequence[str] | None, most: Sequence[str] | None) -> Spans:
    """For each optimization profile, the smallest, the typical and the largest shape of each input. Where one is not
    given, it is the next larger one, and at last the next smaller one.

    Raises:
        SettingsError: a text is no list of shapes, or ranks differ.
    """
    found = []
    for texts in zip_longest(least or (), typical or (), most or (), fillvalue=None):
        low, opt, high = ({} if text is None else shapes_given(text) for text in texts)
        spans = {}
        for name in {**low, **opt, **high}:
            by_size = low.get(name), opt.get(name), high.get(name)
            known = [shape for shape in by_size if shape is not None]
            if len({len(shape) for shape in known}) != 1:
                raise SettingsError(f"the shapes of {name} have different ranks: {', '.join(map(str, known))}")
            top = known[-1]
            middle = by_size[1] or by_size[2] or top
            spans[name] = (by_size[0] or middle, middle, by_size[2] or middle)
        found.append(spans)
    return found


def solve(name: str, dims: Sequence[Dim | str], shape: Shape, sizes: dict[str, int], label: Mapping[str, str]) -> None:
    """Add to `sizes` those that a shape gives to the symbols, or the names, among `dims`.

    Args:
        name: of the input.
        label: names of symbols in errors.

    Raises:
        SettingsError: the shape has another rank, or contradicts a fixed size or one of `sizes`.
    """

    def refuse(problem: str) -> NoReturn:
        shown = "x".join(label.get(str(dim), str(dim)) for dim in dims)
        raise SettingsError(f"the shape {name}:{'x'.join(map(str, shape))} {problem}; the input is {name}:{shown}")

    if len(dims) != len(shape):
        refuse(f"has {len(shape)} axes")
    for dim, size in zip(dims, shape, strict=True):
        symbol = dim if isinstance(dim, str) else getattr(dim, "name", None)
        known = sizes.setdefault(symbol, size) if symbol is not None else evaluate(dim, sizes)  # type: ignore[arg-type]
        if known is not None and known != size:
            refuse(f"has {size} in place of {known}" + f" ({label.get(str(dim), dim)})" * (not isinstance(dim, int)))


def profiles_given(
    declared: Sequence[Any],
    size: Iterable[str] | None,
    profile: Iterable[str] | None,
    spans: Spans,
) -> list[dict[str, Span]]:
    """For each optimization profile, the sizes that a model leaves open, by their names.

    Args:
        declared: the inputs of the model, with `name` and `shape`, whose axes are numbers, names, or None.
        spans: see `spans_given`.

    Raises:
        SettingsError: a text is not what its option takes, or there is no such input.
    """
    from torch_rtx.backend.onnx_models import names_of_axes  # imports torch, which other commands do without

    fixed = sizes_given(size or ())
    found = [{**fixed, **sizes_given(text.split(","))} for text in profile or ()]
    dims = {value.name: names_of_axes(value) for value in declared if spans}
    for inputs in spans:
        ends: tuple[dict[str, int], ...] = ({}, {}, {})
        for name, shapes in inputs.items():
            if name not in dims:
                raise SettingsError(f"the model has no input {name!r}", hint=f"its inputs are {', '.join(dims)}")
            for sizes, shape in zip(ends, shapes, strict=True):
                solve(name, dims[name], shape, sizes, {})
        found.append({**fixed, **{name: tuple(end[name] for end in ends) for name in ends[0]}})
    return found or [fixed]


def _is_size(text: str) -> bool:
    return text.isascii() and text.isdecimal()
