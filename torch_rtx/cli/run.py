"""`torch-rtx run`: one call of an engine, with results to a file, or compared with those of a file or of the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from torch_rtx.cli import calls
from torch_rtx.cli.sources import load_source
from torch_rtx.cli.terminal import Report
from torch_rtx.errors import SettingsError

OUT_HELP = "Write the results to this .npz or .safetensors file."
COMPARE_HELP = "A .npz or .safetensors file of the right results by name."
MODEL_HELP = "The model, as `build` takes it: its weights are the engine's, its results the right ones."
TOLERANCE_HELP = "Relative error, of norms, that is accepted; default: by dtype, and twice the model's own."


@dataclass(frozen=True)
class Result:
    """A tensor of the result of a call.

    Attributes:
        error: relative error, the norm of the difference over that of the right result; None: nothing to compare with.
        limit: the error that is accepted.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    error: float | None = None
    limit: float | None = None

    @property
    def wrong(self) -> bool:
        """The error is larger than what is accepted."""
        return self.error is not None and self.limit is not None and not self.error <= self.limit

    def __str__(self) -> str:
        text = f"{self.name}: {self.dtype}{list(self.shape)}"
        if self.error is None:
            return text
        return f"{text}, error {self.error:.2e}, accepted {self.limit:.2e}" + ": WRONG" * self.wrong


def run(
    path: calls.EngineFile,
    weights: calls.Weights = None,
    inputs: calls.InputFiles = None,
    size: calls.Sizes = None,
    shapes: calls.Shapes = None,
    seed: calls.Seed = 0,
    device: calls.Device = None,
    trust_binaries: calls.Trust = False,
    option: calls.Options = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help=OUT_HELP)] = None,
    compare: Annotated[Path | None, typer.Option(help=COMPARE_HELP)] = None,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    tolerance: Annotated[float | None, typer.Option(min=0, help=TOLERANCE_HELP)] = None,
) -> Report:
    """Call an engine once. With results to compare with, the exit status is 1 if any is wrong."""
    if compare is not None and model is not None:
        raise SettingsError("--compare and --model both say what is right: give one of them")
    if tolerance is not None and compare is None and model is None:
        raise SettingsError("--tolerance needs right results", hint="give --compare or --model")
    if out is not None:
        calls.check_writable(out)
    right = None if compare is None else calls.read_tensors(compare)
    source = None if model is None else load_source(model).model
    module = calls.opened(path, weights, device, trust_binaries, option)
    if source is not None:
        source = source.to(module.device)
    if not weights and module.engine.weights is None:
        if source is None and any(not parameter.constant for parameter in module.engine.graph.parameters):
            raise SettingsError(f"{path} has no weights in it", hint="give --weights, or --model")
        module.attach({} if source is None else source)
    args, kwargs = calls.arguments(module, calls.inputs_given(module, inputs, size, shapes, seed))
    expected = None if right is None else (right, right)
    if source is not None:
        expected = _expected(source, args, kwargs)
    got = calls.named(module(*args, **kwargs))
    found = [Result(name, _dtype(tensor), tuple(tensor.shape)) for name, tensor in got.items()]
    if expected is not None:
        found = list(_compared(got, *expected, tolerance))
    if out is not None:
        calls.write_tensors(out, got)
    wrong = [result.name for result in found if result.wrong]
    rows = [asdict(result) | {"wrong": result.wrong} for result in found]
    return Report(rows, "\n".join(map(str, found)), f"wrong results: {', '.join(wrong)}" if wrong else None)


def _expected(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results of the model, and those of a float64 copy of it, for copies of the arguments."""
    import torch
    from torch.utils import _pytree as pytree

    def widened(x: torch.Tensor) -> torch.Tensor:
        return x.double() if x.is_floating_point() else x.clone()

    def called(call: Any, change: Any) -> dict[str, Any]:
        given, named = pytree.tree_map_only(torch.Tensor, change, (args, kwargs))
        return calls.named(call(*given, **named))

    with torch.no_grad():
        return called(model, torch.clone), called(copy.deepcopy(model).double(), widened)


def _compared(
    got: Mapping[str, Any], usual: Mapping[str, Any], exact: Mapping[str, Any], tolerance: float | None
) -> Iterator[Result]:
    """The results `got`, right if their error against `exact` is at most twice that of `usual`, or what their dtype
    allows; those that are no floats have to be equal.

    Raises:
        SettingsError: names or shapes differ.
    """
    from torch_rtx.runtime.candidate_check import relative_error
    from torch_rtx.runtime.candidate_check import tolerance as tolerance_of

    if got.keys() != exact.keys():
        names = (", ".join(sorted(names)) for names in (got, exact))
        raise SettingsError("the results are {}, those to compare with {}".format(*names))
    for name, mine in got.items():
        right = exact[name]
        if mine.shape != right.shape:
            shapes = f"{list(mine.shape)}, the one to compare with {list(right.shape)}"
            raise SettingsError(f"the shape of the result {name} is {shapes}")
        if not mine.is_floating_point():
            differing = float((mine != right).double().mean()) if mine.numel() else 0.0
            yield Result(name, _dtype(mine), tuple(mine.shape), differing, 0.0 if tolerance is None else tolerance)
            continue
        allowed = (
            max(tolerance_of(mine.dtype), 2 * relative_error(usual[name], right)) if tolerance is None else tolerance
        )
        yield Result(name, _dtype(mine), tuple(mine.shape), relative_error(mine, right), allowed)


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")
