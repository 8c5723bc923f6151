"""Flags of trtexec and tensorrt_rtx: what becomes of them, and the table of the documentation."""

from __future__ import annotations

import shlex

import pytest
import typer

from tests.paths import ROOT
from torch_rtx.cli import trtexec
from torch_rtx.cli.app import app
from torch_rtx.errors import SettingsError
from torch_rtx.settings import RuntimeSettings

TREE = typer.main.get_command(app)
SAMPLES = {
    "--computeCapabilities": "8.9,12.0",
    "--warmUp": "200",
    "--loadInputs": "in.npz",
    "--rtxCudaGraphStrategy": "wholeGraph",
    "--cudaGraphStrategy": "disable",
    "--weightStreamingBudget": "2G",
    "--specializeStrategyDS": "eager",
    "--iterations": "3",
    "--duration": "3",
    "--infStreams": "2",
    "--streams": "2",
}


def test_documented() -> None:
    assert trtexec.table() in (ROOT / "docs" / "command-line.md").read_text(), "paste trtexec.table()"


@pytest.mark.parametrize("name", trtexec._BY_NAME)
def test_every_flag_has_an_answer(name: str) -> None:
    """Arguments that our commands take, or a reason."""
    flag = trtexec._BY_NAME[name]
    assert flag.ours or flag.why
    for command in flag.commands.split():
        words = flag.arguments(name, SAMPLES.get(name, "x") if "{}" in flag.ours else "")
        TREE.commands[command].make_context(command, [*words, *["model"] * (words[0] != "x")])
        if words[0] == "-O":
            key, _, value = words[1].partition("=")
            RuntimeSettings(**{key: value})
    if flag.refused:
        with pytest.raises(SettingsError, match="has no equivalent here\n  ."):
            flag.arguments(name, "x")


def test_names_that_are_ours_too() -> None:
    """They mean ours where a command is named."""
    options = {name for command in TREE.commands.values() for option in command.params for name in option.opts}
    assert {name for name in trtexec._BY_NAME if name in options} == trtexec.SAME


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--onnx=m.onnx --saveEngine=m.rtx", ["build m.onnx --out m.rtx --no-strip"]),
        ("--onnx=m --saveEngine=a --stripWeights --skipInference --iterations=9", ["build m --out a --strip"]),
        (
            "--onnx=m --saveEngine=a --minShapes=x:1 --maxShapes=x:8 --shapes=x:4 --warmUp=50 --noDataTransfers",
            [
                "build m --out a --min-shapes x:1 --max-shapes x:8 --no-strip",
                "bench --shapes x:4 --warmup 0.05 --no-transfers a --trust-binaries",
            ],
        ),
        ("--onnx=m --saveEngine=a --shapes=x:4", ["build m --out a --opt-shapes x:4 --no-strip"]),
        (
            "--loadEngine=a --percentile=90,99 --device=1 --runtimeCacheFile=c --infStreams=2",
            ["bench a --percentiles 90,99 --device 1 -O runtime_cache=c --streams 2 --transfers"],
        ),
        (
            "--loadEngine=a --loadInputs=i.npz --exportOutput=o.npz --verbose",
            ["run a --inputs i.npz --out o.npz --verbose"],
        ),
        (
            "--loadEngine=a --exportOutput=o.npz --duration=2",
            ["run a --out o.npz", "bench a --duration 2 --transfers"],
        ),
        ("build m --saveEngine=a --computeCapabilities=8.9,12.0", ["build m --out a --target 8.9 --target 12.0"]),
        ("bench a --iterations=5 --warmUp=1000 --cpuOnly", ["bench a --iterations=5 --warmup 1"]),
        ("-v inspect a", ["-v inspect a"]),
        ("inspect a --onnx=b", ["inspect a --onnx=b"]),
        ("nonsense --device 3", ["nonsense --device 3"]),
        ("--loadEngine a --shapes x:3 --useCudaGraph", ["bench a --shapes x:3 --graphs --transfers"]),
        ("bench a --shapes x:3 --warmUp 10 --threads 2", ["bench a --shapes x:3 --warmup 0.01 --threads 2"]),
        ("run a --model x:y", ["run a --model x:y"]),
        ("--help", ["--help"]),
        ("--verbose", ["--verbose"]),
        ("", [""]),
    ],
)
def test_translated(theirs: str, ours: list[str]) -> None:
    assert [shlex.join(line) for line in trtexec.translated(shlex.split(theirs))[0]] == ours


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--onnx=m.onnx", "torch-rtx build m.onnx --out model.rtx"),
        ("--shapes=x:3", "one of --onnx and --loadEngine"),
        ("--onnx=m --loadEngine=a", "one of --onnx and --loadEngine"),
        ("--loadEngine=a --saveEngine=b", "--saveEngine is for builds\n  torch-rtx bench a measures an engine"),
        ("--loadEngine", "--loadEngine needs a value"),
        ("--loadEngine=a --warmUp=x", "'x' is no number of milliseconds"),
        ("--loadEngine=a --loadInputs=x:x.bin", r"numpy.savez\('inputs.npz', x=numpy.fromfile\('x.bin'"),
        ("--loadEngine=a --weightStreamingBudget=-1", "is no budget"),
        ("--loadEngine=a --cudaGraphStrategy=all", "strategies are disable and wholeGraph"),
        ("--loadEngine=a --itterations=3", "did you mean --iterations?"),
        ("--loadEngine=a --fp16", "torch-rtx build --dtype float16"),
        ("bench a --saveEngine=b", "--saveEngine is no flag of bench\n  it is one of build"),
        ("bench a --exportTimes=b", "torch-rtx bench ENGINE --json"),
    ],
)
def test_refused(given: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        trtexec.translated(shlex.split(given))
