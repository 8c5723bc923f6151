"""Files that were made to crash, stall or corrupt the process that reads them, each loaded and called in a subprocess
with limits: every one ends in an error of torch_rtx or in a result, soon and in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine_files import Parts, forge
from tests.paths import ROOT
from torch_rtx.binaries import compress
from torch_rtx.engine import Engine
from torch_rtx.engine_header import MAX_GRAPH, MAX_TABLES
from torch_rtx.irparse import MAX_LINES, parse
from torch_rtx.manifest import Manifest

SECONDS, MEGABYTES = 2.0, 300  # for each file; a slow machine gets twice the second that is promised
LEAVES = {"type": "builtins.tuple", "context": None}
NONE = {"type": "builtins.dict", "context": [], "children": []}
SIGNATURE = {
    "names": ["x"],
    "leaves": [0],
    "in": {**LEAVES, "children": [{**LEAVES, "children": [None]}, NONE]},
    "out": {**LEAVES, "children": [None]},
}
SCRIPT = """
import faulthandler, json, resource, sys, time, torch
import torch.fx.experimental.symbolic_shapes  # PyTorch's meta functions import it once per process
faulthandler.enable()
torch.set_num_threads(1)
import torch_rtx
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
for path in sys.argv[1:]:
    print(json.dumps({"path": path}), flush=True)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    stage, kind, message = "loaded", "", ""
    try:
        module = torch_rtx.load(path)
        stage = "called"
        result = module(torch.zeros(4, 4))
        kind, message = "result", repr(result)[:200]
    except BaseException as error:
        typed = isinstance(error, torch_rtx.RtxError)
        kind, message = ("" if typed else "UNTYPED ") + type(error).__name__, str(error)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([stage, kind, message[:300], time.process_time() - start, (after - before) >> 10]), flush=True)
"""


def graph(*lines: str) -> str:
    return "graph fused {\n" + "".join(f"  {line}\n" for line in ("input x: f32[4, 4]", *lines)) + "}\n"


def call(node: str, type_: str = "f32[4, 4]", *before: str) -> str:
    return graph(*before, f"y: {type_} = {node}", "return [y]")


def relu(shape: str) -> str:
    return call("extern aten.relu.default(self=x)", f"f32[{shape}]", "dim s = 1, 9, 1")


def mm(name: str, source: str) -> str:
    return f"{name}: f32[4, 4] = extern aten.mm.default(self={source}, mat2=x)"


POOL = "kernel_size=[2, 2], stride=[2, 2], padding=[0, 0], dilation=[1, 1], ceil_mode=False, indices=i)"
POOLED = f"aten.max_pool2d_with_indices_backward.default(grad_output=g, self=s, {POOL}"
TYPES = {"g": "f32[1, 1, 2, 2]", "s": "f32[1, 1, 4, 4]", "i": "i64[1, 1, 2, 2]"}
GIVEN = [f"constant {name!r}: {type_}" for name, type_ in TYPES.items()]
WEIGHTS = [f"weight {name}: {type_} = {name!r}" for name, type_ in TYPES.items()]
RECIPE = ("graph import {", *(f"  input {name}: {type_}" for name, type_ in TYPES.items()))
SHORT = ("constant 'c': f32[1]", "weight w: f32[1] = 'c'")
NORM = "extern aten._native_batch_norm_legit_no_training.default(input=x, weight=None, bias=w, running_mean=w, "
HUGE = "w: f32[2147483648] = op aten.full.default(size=[2147483648], fill_value=1.0, device='main')"
WIDE = "0x" + "F" * 200_000
SPREAD = f"z: f32[{2**60}, 4, 4](0, 4, 1) = view aten.expand.default(self=x, size=[{2**60}, 4, 4])"
MANY = [mm(f"y{index}", "x") for index in range(1000)]
FULL = "extern aten.full.default(size=[{0}], fill_value=1.0, dtype='f32', device='main')"
DATA = {"g": torch.ones(1, 1, 2, 2), "s": torch.ones(1, 1, 4, 4), "i": torch.full((1, 1, 2, 2), 2**40)}
DATA |= {"c": torch.ones(1), "k": torch.tensor([2**40]), "d": torch.ones(4, 4)}

REFUSED = {
    # writes to, and reads of, other memory
    "write": call(f"extern {POOLED}", TYPES["s"], *GIVEN, *WEIGHTS),
    "write at load": graph(
        *GIVEN,
        f"weight w: {TYPES['s']} = 'g', 's', 'i' {RECIPE[0]}",
        *(*RECIPE[1:], f"  y: {TYPES['s']} = op {POOLED}", "  return [y]", "}", "return [w]"),
    ),
    "read": graph(*SHORT, f"y: f32[4, 4], _, _ = {NORM}running_var=w, momentum=0.1, eps=0.0)", "return [y]"),
    "constant": call(
        "fallback aten.copy_.default(self=w, src=x)",
        "f32[4, 4]",
        "constant 'd': f32[4, 4]",
        "weight w: f32[4, 4] = 'd'",
    ),
    "arena": graph(
        mm("y", "x").replace("[4, 4]", "[1, 1]"), "z: f32[4, 4] = extern aten.relu.default(self=y)", "return [z]"
    ),
    # crashes
    "dtype": call("extern aten._to_copy.default(self=x, dtype=-1)"),
    "dim": call("extern aten._fft_r2c.default(self=x, dim=[1000000], normalization=0, onesided=True)"),
    "type of an argument": call("extern aten.add.Tensor(self=x, other=x, alpha='1')"),
    "unpacking": graph("y: f32[4, 4], z: f32[4, 4] = extern aten.relu.default(self=x)", "return [z]"),
    "overflow": call("extern aten.add.Scalar(self=x, other=18446744073709551616)"),
    "python": call("fallback python(index=0, inputs=[x])"),
    # time and memory
    "recipe": graph("weight w: f32[2147483648] = graph import {", f"  {HUGE}", "  return [w]", "}", "return [x]"),
    "full": call(FULL.format(2**62), f"f32[{2**62}]"),
    "rank": relu(", ".join(["s"] * 20_000)),
    "digits": relu(f"{WIDE} // 0x1{WIDE[2:100_000]}"),
    "product": relu(" * ".join(["9223372036854775807"] * 10_000)),
    "sum": relu(" + ".join(["s"] * 50_000)),
    "deep dim": relu("(" * 150 + "s" + " // 2)" * 150),
    "minus": call(f"extern aten.add.Scalar(self=x, other={'-' * 100_000}1)"),
    "lists": call(f"extern aten.cat.default(tensors={'[' * 150}x{']' * 150})"),
    "name": graph(f"{'a' * 100_000}: f32[4, 4] = extern aten.relu.default(self=x)", "return [x]"),
    "arguments": call(f"extern aten.add.Tensor({', '.join(f'a{index}=x' for index in range(20_000))})"),
    "results": graph(
        f"{', '.join(f'y{index}: f32[4]' for index in range(15_000))} = view aten.unbind.int(self=x)", "return [y0]"
    ),
    "many lines": call("extern aten.relu.default(self=x)" + "\n" * MAX_LINES),
    "pieces": call("view aten.unbind.int(self=z)", "f32[4, 4]", SPREAD),
}
CALLED = {  # what a call does
    "heap": (call("extern aten.empty.memory_format(size=[4, 4], dtype='f32', device='main')"), "result"),
    "index": (
        call(
            "extern aten.index_select.default(self=x, dim=0, index=k)",
            "f32[1, 4]",
            "constant 'k': i64[1]",
            "weight k: i64[1] = 'k'",
        ),
        "CallError",
    ),
    "too large": (call(FULL.format(2**40), f"f32[{2**40}]"), "CallError"),
    "alive": (
        call(
            f"extern aten.cat.default(tensors=[{', '.join(f'y{index}' for index in range(1000))}])",
            "f32[4000, 4]",
            *MANY,
        ),
        "result",
    ),
    "long": (
        graph(*(mm(f"y{index}", f"y{index - 1}" if index else "x") for index in range(1000)), "return [y999]"),
        "result",
    ),
}


def gigabyte() -> bytes:
    """2**30 zeros: a thousand times what one MiB of them is, which is a thousand times faster than to compress all."""
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = (2**30 % 65521) << 16 | 1
    return b"\x78\xda" + block * 2**10 + packer.flush() + checksum.to_bytes(4, "big")


# What makes them, once they are needed: every worker reads this file.
BOMBS: dict[str, tuple[Callable[[], bytes], dict[str, Any]]] = {
    "more than it says": (gigabyte, {}),
    "more than it says, by LZMA": (lambda: compress(bytes(2**26)), {"codec": "xz"}),
    "a gigabyte": (gigabyte, {"graph": 2**30}),
    "spaces": (
        lambda: zlib.compress(b" " * (MAX_TABLES + MAX_GRAPH)),
        {"tables": MAX_TABLES, "graph": MAX_GRAPH},
    ),
    "objects": (
        lambda: zlib.compress(b"[" + b"{}," * (MAX_TABLES // 3 - 1) + b"0]"),
        {"tables": MAX_TABLES // 3 * 3 - 1},
    ),
    "nested": (lambda: zlib.compress(b"[" * MAX_TABLES), {"tables": MAX_TABLES, "graph": 0}),
    "lines": (
        lambda: zlib.compress(b'{"manifest":{}}' + b"\n" * MAX_GRAPH),
        {"tables": 15, "graph": MAX_GRAPH},
    ),
}
Outcome = list[Any]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Stage, error, message, seconds and megabytes of each file, until one ends the process."""
    folder = tmp_path_factory.mktemp("hostile")
    texts = REFUSED | {name: text for name, (text, _) in CALLED.items()}
    for name, text in texts.items():
        write(folder / f"{name}.rtx", text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    good = Parts.of((folder / "heap.rtx").read_bytes())
    for name, (stored, sizes) in BOMBS.items():
        (folder / f"{name}.rtx").write_bytes(good.join(stored(), **sizes))
    command = [sys.executable, "-c", SCRIPT, *(f"{name}.rtx" for name in (*texts, *BOMBS))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=folder)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, f"{lines[-1]} ended the process: {run.stderr[-2000:]}"
    return {Path(one["path"]).stem: outcome for one, outcome in zip(lines[::2], lines[1::2], strict=True)}


def write(path: Path, text: str) -> None:
    """A file with this graph and the constants that it names, under right digests."""
    data = {name: tensor for name, tensor in DATA.items() if f"constant '{name}'" in text}
    table, end = {}, 0
    for name, tensor in data.items():
        dtype, begin, end = "I64" if tensor.dtype == torch.int64 else "F32", end, end + tensor.nbytes
        table[f"constant/{name}"] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}

    def edit(program: dict[str, Any]) -> None:
        program["graph"] = text

    empty = Engine(parse("graph fused {\n  return []\n}\n"), Manifest("cpu", ("x",), SIGNATURE), {}, {})
    forge(path, edit, lambda header: header.update(table), b"".join(t.numpy().tobytes() for t in data.values()), empty)


@pytest.mark.parametrize("name", REFUSED | BOMBS | CALLED)
def test_a_hostile_file(name: str, outcomes: dict[str, Outcome]) -> None:
    stage, kind, message, seconds, megabytes = outcomes[name]
    if name not in CALLED:
        assert (stage, kind) in (("loaded", "EngineFormatError"), ("loaded", "InvalidIR")), message
    else:
        assert (stage, kind) == ("called", CALLED[name][1]), message
    assert seconds < SECONDS, message
    assert megabytes < MEGABYTES, message


def test_no_memory_of_the_process_is_returned(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["heap"][2].count("0.") == 16
