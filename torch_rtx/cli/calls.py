"""Calls of an engine from the command line: its weights, its inputs from files or at random, its named results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torch_rtx.cli.shapes import shapes_given, solve
from torch_rtx.engine import Engine
from torch_rtx.engine_header import names_of_sizes
from torch_rtx.errors import SettingsError
from torch_rtx.ir import OBJECT, ScalarType, TensorType, Type, dim_syms, evaluate, type_dims
from torch_rtx.profiles import Range
from torch_rtx.progress import stage
from torch_rtx.settings import RuntimeSettings

if TYPE_CHECKING:
    from torch_rtx.runtime.module import CompiledModule

EngineFile = Annotated[Path, typer.Argument(metavar="ENGINE", help="An engine (.rtx).")]
WEIGHTS_HELP = "An .onnx or .safetensors file, or a folder of the latter; repeatable; default: those in the engine."
Weights = Annotated[list[Path] | None, typer.Option("--weights", "-w", help=WEIGHTS_HELP)]
INPUTS_HELP = "A .npz or .safetensors file of the inputs by name; repeatable; default: random ones."
InputFiles = Annotated[list[Path] | None, typer.Option("--inputs", "-i", help=INPUTS_HELP)]
Sizes = Annotated[list[str] | None, typer.Option("--size", "-s", help="A dynamic size, as batch=8; may be repeated.")]
SHAPES_HELP = "Shapes of inputs, as x:8x3x224x224,y:8, which give the dynamic sizes as --size does."
Shapes = Annotated[str | None, typer.Option("--shapes", help=SHAPES_HELP)]
DEVICE_HELP = "The device, as cpu or cuda:1, or the number of a GPU; default: the one that it was built for."
Device = Annotated[str | None, typer.Option(help=DEVICE_HELP)]
OPTION_HELP = "An option of RuntimeSettings, as runtime_cache=cache.sqlite; repeatable."
Options = Annotated[list[str] | None, typer.Option("--option", "-O", help=OPTION_HELP)]
Trust = Annotated[bool, typer.Option(help="Run the GPU kernels in the file, which you trust.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn at random.")]


def opened(
    path: Path,
    weights: Sequence[Path] | None,
    device: str | None,
    trust_binaries: bool,
    options: Iterable[str] | None,
    **settings: Any,
) -> CompiledModule:
    """The engine as a module; a stripped one without `weights` has none.

    Args:
        options: see `options_given`; `settings` are more of them.

    Raises:
        RtxError, OSError: see `torch_rtx.load`.
    """
    runtime = RuntimeSettings(**options_given(options or ()) | settings)
    stage(f"loading {path}")
    from torch_rtx.runtime.module import load  # imports torch, which other commands do without

    given = weights[0] if weights is not None and len(weights) == 1 else weights or None
    device = f"cuda:{device}" if device is not None and device.isdecimal() else device
    return load(path, given, device, runtime, trust_binaries=trust_binaries)


def options_given(given: Iterable[str]) -> dict[str, Any]:
    """The options that texts such as `runtime_cache=cache.sqlite` or `tuning_seconds=5` stand for. Values are JSON, or
    else text.

    Raises:
        SettingsError: a text is none, or an option is given twice.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals or name in found:
            raise SettingsError(f"--option {text} is no NAME=VALUE, or given twice", hint="as -O tuning_seconds=5")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def fill_in_weights(module: CompiledModule, seed: int = 0) -> None:
    """Give random weights to the module of a stripped engine."""
    named = {p.name: p.type for p in module.engine.graph.parameters if not p.constant}
    module.refit(dict(zip(named, drawn(named.values(), {}, module.device, seed), strict=True)))


def sizes_given(engine: Engine, given: Iterable[str], shapes: str | None = None) -> dict[str, int]:
    """All dynamic sizes of the inputs, by symbol: those in `given` and `shapes`, else the engine's typical ones.

    Args:
        given: such as `batch=8`, with the name of a `Dim`, or a symbol.
        shapes: such as `x:8x3,y:8`, with the names of inputs.

    Raises:
        SettingsError: a size is missing, out of its range, given twice, or not one of the engine's.
    """
    varying = {sym.name: sym for value in engine.graph.inputs for dim in type_dims(value.type) for sym in dim_syms(dim)}
    ranges = {sym.name: Range(sym.min, None, sym.max) for sym in varying.values()}
    names = names_of_sizes(engine.manifest.signature)
    symbols = {name: symbol for symbol, name in names.items()}
    found: dict[str, int] = {}
    problem = None
    for text in given:
        named, _, number = text.partition("=")
        name = symbols.get(named, named)
        if name not in varying or not number.isdecimal():
            what = f"{number!r} is no number" if name in varying else f"there is no size {named!r}"
            problem = problem or f"--size {text}: {what}"
        elif found.setdefault(name, int(number)) != int(number):
            problem = problem or f"--size {text}: {named} is {found[name]}, too"
    inputs = dict(zip(engine.manifest.inputs, engine.graph.inputs, strict=True))
    for name, shape in shapes_given(shapes).items() if shapes is not None else ():
        if name not in inputs:
            raise SettingsError(f"the engine has no input {name!r}", hint=f"its inputs are {', '.join(inputs)}")
        type_ = inputs[name].type
        solve(name, type_.shape if isinstance(type_, TensorType) else type_dims(type_), shape, found, names)
    outside = [name for name, size in found.items() if not ranges[name].holds(size)]
    if outside:
        problem = problem or f"{names.get(outside[0], outside[0])}={found[outside[0]]} is out of range"
    sizes = {name: sym.typical for name, sym in varying.items() if sym.typical is not None} | found
    if problem is not None or sizes.keys() != varying.keys():
        missing = ", ".join(names.get(name, name) for name in varying if name not in sizes)
        wanted = " ".join(f"--size {names.get(name, name)}={found}" for name, found in ranges.items())
        hint = "`torch-rtx inspect` shows the inputs with these sizes"
        problem = problem or f"no size of {missing} is given"
        raise SettingsError(f"{problem}; the dynamic sizes are: {wanted or 'none'}", hint=hint)
    return sizes


def drawn(types: Iterable[Type], sizes: Mapping[str, int], device: Any, seed: int = 0) -> list[Any]:
    """Uniform random floats in [0, 1), fair bools, zeros for integers, which may be indices; sizes from `sizes`.

    Raises:
        SettingsError: a type is that of a Python object.
    """
    import torch

    from torch_rtx import aten

    generator = torch.Generator().manual_seed(seed)  # of the host, so that all devices get the same
    values: list[Any] = []
    for type_ in types:
        if type_ == OBJECT:
            hint = "`torch_rtx.profile` takes the arguments of a call"
            raise SettingsError("an input is a Python object, which can't be drawn at random", hint=hint)
        if isinstance(type_, ScalarType):
            number = 0 if type_.dim is None else evaluate(type_.dim, sizes)
            values.append({"int": int, "float": float, "bool": bool}[type_.kind](number or 0))
            continue
        shape = [evaluate(dim, sizes) or 0 for dim in type_.shape]
        dtype = aten.DTYPES[type_.dtype]
        if dtype.is_floating_point:
            value = torch.rand(shape, generator=generator)
        elif dtype == torch.bool:
            value = torch.rand(shape, generator=generator) < 0.5
        else:
            value = torch.zeros(shape)
        values.append(value.to(dtype).to(aten.to_torch("Device", type_.device, device)))
    return values


# ---- files -----------------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a .safetensors or .npz file, by name.

    Raises:
        SettingsError: it is neither, or damaged.
        OSError: it can't be read.
    """
    import numpy as np
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with path.open("rb"):  # the error of a file that is not there
        pass
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
        if path.suffix == ".safetensors":
            return load_file(path)
    except (SafetensorError, ValueError, TypeError, EOFError, KeyError) as error:
        raise SettingsError(f"{path} can't be read: {error}") from None
    raise SettingsError(f"{path} has none of the endings .npz and .safetensors")


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write tensors by name, as `read_tensors` reads them.

    Raises:
        SettingsError: the ending is another one, or .npz can't hold a dtype.
        OSError: the file can't be written.
    """
    import numpy as np
    from safetensors.torch import save_file

    check_writable(path)
    if path.suffix == ".npz":
        try:
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        except TypeError as error:
            raise SettingsError(f"{path} can't hold a result: {error}", hint="write a .safetensors file") from None
        np.savez(path, **arrays)
    else:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


def check_writable(path: Path) -> None:
    """Before minutes of work, not after.

    Raises:
        SettingsError: the ending is neither .npz nor .safetensors, or there is no such folder.
    """
    if path.suffix not in (".npz", ".safetensors"):
        raise SettingsError(f"{path} has none of the endings .npz and .safetensors")
    check_folder(path)


def check_folder(path: Path) -> None:
    """Before minutes of work, not after.

    Raises:
        SettingsError: there is no folder to write `path` to.
    """
    if not path.absolute().parent.is_dir():
        raise SettingsError(f"{path} can't be written: there is no such folder")


def inputs_given(
    module: CompiledModule, files: Iterable[Path] | None, sizes: Iterable[str] | None, shapes: str | None, seed: int
) -> list[Any]:
    """The inputs of a call, flat: those in files, by their names in the engine, and where there are none of these,
    random ones of the given sizes.

    Raises:
        SettingsError: names are missing or unexpected, or sizes are given beside tensors; see `read_tensors`.
        OSError: a file can't be read.
    """
    values = module.engine.graph.inputs
    tensors = {name: tensor for file in files or () for name, tensor in read_tensors(file).items()}
    if not tensors:
        found = sizes_given(module.engine, sizes or (), shapes)
        return drawn((value.type for value in values), found, module.device, seed)
    if sizes or shapes is not None:
        raise SettingsError("--size and --shapes are for random inputs: those of a file have their sizes")
    names = module.engine.manifest.inputs
    missing, unexpected = [n for n in names if n not in tensors], sorted(tensors.keys() - set(names))
    if missing or unexpected:
        parts = [f"missing inputs {', '.join(missing)}"] * bool(missing)
        parts += [f"unexpected inputs {', '.join(unexpected)}"] * bool(unexpected)
        raise SettingsError(f"{', '.join(parts)}; the inputs are {', '.join(names) or 'none'}")
    given = (tensors[name] for name in names)
    pairs = zip(given, values, strict=True)
    return [x.item() if isinstance(v.type, ScalarType) else _placed(x, v.type, module) for x, v in pairs]


def _placed(tensor: Any, type_: Any, module: CompiledModule) -> Any:
    from torch_rtx import aten

    return tensor.to(aten.to_torch("Device", type_.device, module.device))


def arguments(module: CompiledModule, inputs: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with these flat inputs, those that the capture fixed among them."""
    from torch.utils import _pytree as pytree

    signature = module._signature
    leaves = [inputs[leaf] if isinstance(leaf, int) else leaf.value for leaf in signature.leaves]
    args, kwargs = pytree.tree_unflatten(leaves, signature.in_spec)
    return args, kwargs


def named(result: Any) -> dict[str, Any]:
    """The tensors in the result of a call, on the host, by their paths: `logits`, `hidden_states.0`; `result` where it
    is a tensor itself."""
    import torch
    from torch.utils import _pytree as pytree

    paths, _ = pytree.tree_flatten_with_path(result)
    by_path = {".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path): x for path, x in paths}
    return {name or "result": x.detach().cpu() for name, x in by_path.items() if isinstance(x, torch.Tensor)}
