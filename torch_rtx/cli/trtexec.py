"""Command lines of trtexec and tensorrt_rtx: which of our arguments their flags are, or why there are none.

`translated` makes command lines of ours of one of theirs, such as `--onnx=m.onnx --saveEngine=m.rtx`, which names no
command, and replaces flags of theirs in one of ours. `table` prints the table in docs/command-line.md:

    python -c "from torch_rtx.cli import trtexec; print(trtexec.table(), end='')"
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

from torch_rtx.errors import SettingsError

_UNITS = {"B": "", "K": "KiB", "M": "MiB", "G": "GiB"}


@dataclass(frozen=True)
class Flag:
    """Flags of theirs that are treated alike.

    Attributes:
        names: with commas.
        commands: those of ours that it is for, the usual one first.
        ours: our arguments, once for each value, with {} for it; "" where there are none.
        why: a remark on ours, or why there are none.
        refused: it asks for what can't be had: an error says `why`.
        values: our values, from theirs.
    """

    names: str
    commands: str = ""
    ours: str = ""
    why: str = ""
    refused: bool = False
    values: Callable[[str], list[str]] = lambda value: [value]

    def arguments(self, name: str, value: str) -> list[str]:
        """Ours, for a value of theirs.

        Raises:
            SettingsError: there are none, or the value is missing or has no equivalent.
        """
        if self.refused:
            raise SettingsError(f"{name} has no equivalent here", hint=self.why)
        if "{}" in self.ours and not value:
            raise SettingsError(f"{name} needs a value", hint=f"{name}=VALUE")
        return [part.format(one) for one in self.values(value) for part in self.ours.split()]

    def row(self) -> str:
        """Its line in the table of the documentation."""
        first, *others = self.commands.split() or [""]
        text = self.ours.replace("{}", "VALUE")
        ours = f"`{first} {text}`" if text else "refused" if self.refused else "nothing"
        also = f"also of {', '.join(f'`{name}`' for name in others)}" if others else ""
        names = ", ".join(f"`{name}`" for name in self.names.split(", "))
        return f"| {names} | {ours} | {'; '.join(filter(None, (also, self.why)))} |\n"


def _listed(value: str) -> list[str]:
    return value.split(",")


def _seconds(value: str) -> list[str]:
    try:
        return [f"{float(value) / 1e3:g}"]
    except ValueError:
        raise SettingsError(f"--warmUp={value}: {value!r} is no number of milliseconds") from None


def _strategy(value: str) -> list[str]:
    found = {"disable": "no-graphs", "wholegraph": "graphs"}.get(value.lower())
    if found is None:
        raise SettingsError(f"{value!r} is no strategy of CUDA graphs", hint="strategies are disable and wholeGraph")
    return [found]


def _budget(value: str) -> list[str]:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([BKMG%]?)", value)
    if match is None:
        hint = (
            "a budget is a number of bytes, as 2G, or a share of the weights, as 50%; without one nothing is streamed"
        )
        raise SettingsError(f"--weightStreamingBudget={value} is no budget", hint=hint)
    return [match[1] + _UNITS.get(match[2], match[2])]


def _file(value: str) -> list[str]:
    if value.endswith((".npz", ".safetensors")):
        return [value]
    name, _, file = value.partition(",")[0].partition(":")
    hint = f"numpy.savez('inputs.npz', {name or 'x'}=numpy.fromfile({file or value!r}, 'float32').reshape(...))"
    raise SettingsError(f"--loadInputs={value}: inputs are read from .npz and .safetensors files", hint=hint)


def _no(names: str, why: str) -> Flag:
    return Flag(names, why=why, refused=True)


FLAGS = (
    Flag("--onnx", "build", "{}"),
    Flag("--saveEngine", "build", "--out {}", "with the weights, unless `--stripWeights` is given"),
    Flag("--minShapes", "build", "--min-shapes {}"),
    Flag("--optShapes", "build", "--opt-shapes {}"),
    Flag("--maxShapes", "build", "--max-shapes {}"),
    Flag("--computeCapabilities", "build", "--target {}", values=_listed),
    Flag("--useGpu", "build", "--target current"),
    Flag("--stripWeights, --stripAllWeights, --weightless", "build", "--strip"),
    Flag("--loadEngine", "bench run profile", "{}", "`run` where `--exportOutput` is given"),
    Flag("--shapes", "bench run profile", "--shapes {}", "with `--onnx`, `build --opt-shapes`"),
    Flag("--loadInputs", "bench run profile", "--inputs {}", "a .npz or .safetensors file", values=_file),
    Flag("--exportOutput", "run", "--out {}", "a .npz or .safetensors file"),
    Flag("--iterations", "bench", "--iterations {}"),
    Flag("--duration", "bench", "--duration {}"),
    Flag("--warmUp", "bench", "--warmup {}", "milliseconds there, seconds here", values=_seconds),
    Flag("--percentile", "bench", "--percentiles {}"),
    Flag("--infStreams, --streams", "bench", "--streams {}"),
    Flag("--noDataTransfers", "bench", "--no-transfers", "the default here, not there"),
    Flag("--useCudaGraph", "bench", "--graphs", "the default here"),
    Flag("--rtxCudaGraphStrategy, --cudaGraphStrategy", "bench", "--{}", "`graphs`, `no-graphs`", values=_strategy),
    Flag("--specializeStrategyDS", "bench run profile", "-O specialization_strategy={}"),
    Flag("--runtimeCacheFile", "bench run profile", "-O runtime_cache={}"),
    Flag("--weightStreamingBudget", "bench run profile", "-O weight_streaming_budget={}", values=_budget),
    Flag("--device", "bench run profile", "--device {}"),
    Flag("--verbose", "build bench run profile", "--verbose"),
    Flag("--skipInference, --buildOnly", why="`build` measures nothing"),
    Flag("--profile", why="each `--minShapes`, `--optShapes` or `--maxShapes` is of the next profile"),
    Flag("--cpuOnly", why="no build needs a GPU"),
    Flag("--refit, --allowWeightStreaming, --versionCompatible, --stronglyTyped, --explicitBatch", why="always so"),
    Flag("--threads", why="each stream has a thread of its own"),
    Flag("--useSpinWait, --separateProfileRun, --avgRuns, --useProfile", why="without effect here"),
    _no(
        "--fp16, --bf16, --best, --noTF32",
        "a model has its own dtypes; `torch-rtx build --dtype float16` casts it",
    ),
    _no("--int8, --fp8, --int4, --fp4, --calib", "`torch-rtx build --quantize int8_dynamic`, `torch-rtx calibrate`"),
    _no("--dumpProfile, --exportProfile", "`torch-rtx profile ENGINE`, with `--json` or `--trace FILE`"),
    _no("--exportTimes", "`torch-rtx bench ENGINE --json`"),
    _no("--dumpLayerInfo, --exportLayerInfo, --profilingVerbosity", "`torch-rtx inspect ENGINE --layers`"),
    _no("--dumpRefit, --getPlanVersionOnly, --dumpOptimizationProfile", "`torch-rtx inspect ENGINE`"),
    _no("--dumpOutput, --dumpRawBindingsToFile", "`torch-rtx run ENGINE --out FILE`"),
    _no(
        "--timingCacheFile, --errorOnTimingCacheMiss, --avgTiming, --minTiming, --heuristic",
        "builds measure nothing; `torch-rtx bench -O runtime_cache=FILE` does",
    ),
    _no("--memPoolSize, --workspace, --allocationStrategy", "an engine has one arena, of the size that it needs"),
    _no(
        "--builderOptimizationLevel, --tacticSources, --maxAuxStreams, --maxTactics",
        "`torch-rtx bench -O tactics=library`",
    ),
    _no("--layerPrecisions, --layerOutputTypes, --layerDeviceTypes, --precisionConstraints", "cast the layers before"),
    _no("--inputIOFormats, --outputIOFormats, --directIO", "cast the inputs and the results in the model"),
    _no("--sparsity", "zeros in weights are not made use of"),
    _no("--useDLACore, --allowGPUFallback", "engines run on GPUs and CPUs, not on a DLA"),
    _no(
        "--plugins, --staticPlugins, --dynamicPlugins, --setPluginsToSerialize",
        "there are no plugins; `torch_rtx.register_kernel` registers kernels of yours",
    ),
    _no("--batch, --maxBatch", "shapes contain the batch: `--shapes=x:8x3x224x224`"),
    _no("--sleepTime, --idleTime, --timeDeserialize, --timeRefit, --monitorMemory", "`bench` does not do this"),
    _no("--useManagedMemory, --exposeDMA, --persistentCacheRatio", "this is not for you to select"),
    _no("--tempdir, --tempfileControls, --asyncFileReader", "this is not for you to select"),
    _no("--markDebug, --markUnfusedTensorsAsDebugTensors, --saveDebugTensors", "`TORCH_RTX_DUMP=FOLDER` dumps stages"),
    _no(
        "--hardwareCompatibilityLevel, --runtimePlatform",
        "`torch-rtx build --target`, `--platform`",
    ),
    _no("--safe, --consistency, --restricted", "there is no restricted mode"),
    _no("--excludeLeanRuntime, --leanDLLPath, --useRuntime", "there is one runtime, PyTorch with this package"),
    _no("--uff, --model, --deploy, --uffInput, --output", "models are read from ONNX and PyTorch"),
)
_BY_NAME = {name: flag for flag in FLAGS for name in flag.names.split(", ")}
_COMMANDS = {name for flag in FLAGS for name in flag.commands.split()}
SAME = {  # options of ours, too, which these are in a line that names a command
    *("--shapes", "--iterations", "--duration", "--percentile", "--streams", "--threads"),
    *("--device", "--verbose", "--profile", "--model"),
}
STRIPPED = {"--stripWeights", "--stripAllWeights", "--weightless"}
SHAPES = {"--minShapes", "--optShapes", "--maxShapes"}


def table() -> str:
    """The table of flags in the documentation."""
    return "| trtexec, tensorrt_rtx | torch-rtx | |\n|---|---|---|\n" + "".join(flag.row() for flag in FLAGS)


def translated(line: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """The command lines of ours that do what `line` says, and what is to be told of it.

    Raises:
        SettingsError: a flag of theirs has no equivalent, or does not fit the others; the message says what to type.
    """
    first = next((word for word in line if not word.startswith("-")), None)
    if first in _COMMANDS:
        return _replaced(_joined(line, SAME), first)
    given, line = list(line), _joined(line)
    names = [word.partition("=")[0] for word in line]
    if not all(word.startswith("-") for word in line) or not any(_BY_NAME.keys() & {*names} - {"--verbose"}):
        return [given], []
    unknown = [name for name in names if name not in _BY_NAME]
    if unknown:
        near = difflib.get_close_matches(unknown[0], _BY_NAME, n=1, cutoff=0.8)
        hint = f"did you mean {near[0]}?" if near else "`torch-rtx --help` lists the commands"
        raise SettingsError(f"no flag {unknown[0]} of trtexec is known", hint=hint)
    lines = list(_without_command([(word.partition("=")[0], word.partition("=")[2]) for word in line]))
    notes = [f"{name}: {_BY_NAME[name].why}" for name in names if not _BY_NAME[name].ours]
    return lines, [*notes, *(f"torch-rtx {shlex.join(line)}" for line in lines)]


def _joined(line: Sequence[str], ours: Container[str] = ()) -> list[str]:
    """The line with `--onnx=model.onnx` in place of `--onnx model.onnx`, but for flags in `ours`."""
    found = list[str]()
    for word in line:
        flag = _BY_NAME.get(found[-1]) if found and found[-1] not in ours else None
        if flag is not None and "{}" in flag.ours and not word.startswith("-"):
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def _replaced(line: Sequence[str], command: str) -> tuple[list[list[str]], list[str]]:
    """A line of ours with our arguments in place of flags of theirs."""
    found, notes = list[str](), list[str]()
    for word in line:
        name, _, value = word.partition("=")
        flag = None if name in SAME else _BY_NAME.get(name)
        if flag is None:
            found.append(word)
            continue
        if flag.commands and command not in flag.commands.split():
            raise SettingsError(f"{name} is no flag of {command}", hint=f"it is one of {flag.commands}")
        found += flag.arguments(name, value)
        notes += [f"{name}: {flag.why}"] * (not flag.ours)
    return [found], notes


def _without_command(given: Sequence[tuple[str, str]]) -> Iterator[list[str]]:
    """The lines for flags of theirs alone, with the defaults of theirs."""
    values = dict(given)
    flags = [(name, value, _BY_NAME[name]) for name, value in given]
    arguments = [(name, flag.commands.split(), flag.arguments(name, value)) for name, value, flag in flags]

    def of(command: str) -> Iterator[str]:
        return (word for _, commands, words in arguments if command in commands for word in words)

    engine, model = values.get("--loadEngine"), values.get("--onnx")
    exported = "--exportOutput" in values
    measured = any(commands == ["bench"] for _, commands, _ in arguments) or not (model or exported)
    if (model is None) == (engine is None):
        hint = "torch-rtx build model.onnx --out model.rtx, or torch-rtx bench model.rtx"
        raise SettingsError("one of --onnx and --loadEngine says what to do", hint=hint)
    if engine is None:
        engine = values.get("--saveEngine")
        if engine is None:
            hint = f"torch-rtx build {model} --out model.rtx, and then torch-rtx bench model.rtx"
            raise SettingsError("--onnx without --saveEngine: an engine is built into a file", hint=hint)
        static = ["--opt-shapes", values["--shapes"]] if "--shapes" in values and not values.keys() & SHAPES else []
        yield ["build", *of("build"), *static, *([] if values.keys() & STRIPPED else ["--no-strip"])]
        if values.keys() & {"--skipInference", "--buildOnly"}:
            return
        arguments.append(("--loadEngine", ["bench", "run"], [engine, "--trust-binaries"]))
    elif wrong := [name for name, commands, _ in arguments if commands == ["build"]]:
        raise SettingsError(f"{wrong[0]} is for builds", hint=f"torch-rtx bench {engine} measures an engine")
    if exported:
        yield ["run", *of("run")]
    if measured:
        yield ["bench", *of("bench"), *([] if "--noDataTransfers" in values else ["--transfers"])]
