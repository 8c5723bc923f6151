"""Latency of ONNX models: engines beside what else runs the same file, in one process.

    python -m benchmarks.onnx_latency [NAME ...] [--seconds 60] [--peers rtx-kernels,inductor,onnxruntime]
                                      [--dtypes float32,float16] [--json FILE]

Names are models that packages ship (`benchmarks.shipped`), and models of the zoo. Of these `bert_base:dynamo` is what
comes back from the newer exporter of PyTorch, `bert_base:script` from the older one, and `bert_base` the module itself.
The forms and the peers of a model take turns. Errors are those of the largest element, to onnxruntime on the CPU; for
float16, what does not stand it is run by autocast. A peer that fails has its error in its row, and no peer is begun
when the time of its model is over.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import models, timing
from benchmarks.exports import EXPORTERS, Positional, export
from benchmarks.peers import PEERS, Prepared, Subject
from benchmarks.shipped import MODELS, run_onnxruntime
from torch_rtx.onnx.module import from_onnx

ZOO = {"bert_base": (1, 128), "resnet50": (1, None)}
NAMES = (*MODELS, *(f"{name}{suffix}" for name in ZOO for suffix in ("", *(f":{how}" for how in EXPORTERS))))
DTYPES = {"float32": torch.float32, "float16": torch.float16}
DEFAULT_PEERS = ("rtx-kernels", "inductor", "reduce-overhead", "onnxruntime")


@dataclass
class Case:
    """A model, inputs of one call on the CPU, and the results that they should have.

    Attributes:
        file: what onnxruntime takes; None: there is none.
        half: the whole model can be in float16.
    """

    module: nn.Module
    inputs: Sequence[Tensor]
    wanted: Sequence[np.ndarray]
    file: Path | None
    half: bool = True


def case(name: str, size: models.Size, folder: Path) -> Case:
    """The case of a name.

    Raises:
        LookupError: there is no such model here.
    """
    if name in MODELS:
        shipped = MODELS[name]
        path = shipped.path()
        if path is None:
            raise LookupError(f"no package {shipped.package}")
        inputs, wanted = shipped.expected(path)
        return Case(from_onnx(path, shipped.fixed), [torch.from_numpy(x) for x in inputs], wanted, path, shipped.half)
    model, _, exporter = name.partition(":")
    batch, length = ZOO[model]
    whole = Positional(*models.build(model, size, batch=batch, length=length))
    path = folder / f"{model}.onnx"
    export(whole, exporter or "dynamo", path)
    wanted = run_onnxruntime(path, [x.numpy() for x in whole.inputs])
    return Case(from_onnx(path) if exporter else whole.eval(), whole.inputs, wanted, path)


def measure(
    cases: Mapping[str, Case], dtype: torch.dtype, peers: Sequence[str], seconds: float, device: str
) -> dict[str, dict[str, dict[str, Any]]]:
    """For each case and peer the milliseconds of a call, by events and by the clock of the wall, and its error. All
    take turns, so that forms of one model can be compared."""
    until = time.perf_counter() + seconds * len(cases)
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    calls: dict[str, timing.Call] = {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for name, case in cases.items():
            place = Path(folder, name.replace(":", "_"))
            place.mkdir()
            rows[name] = {}
            for peer, (row, call) in _peers(case, dtype, peers, until, device, place):
                rows[name][peer] = row
                if call is not None:
                    calls[f"{name} {peer}"] = call
        for which, found in timing.interleaved(calls, device, 8, lambda name: None).items():
            name, _, peer = which.partition(" ")
            for clock, rounds in found.items():
                rows[name][peer][clock] = statistics.median(ms for one in rounds for ms in one)
    return rows


def _peers(
    case: Case, dtype: torch.dtype, peers: Sequence[str], until: float, device: str, folder: Path
) -> Iterator[tuple[str, tuple[dict[str, Any], timing.Call | None]]]:
    """Each peer, with its row so far, and the call to measure; None: it can't run."""
    whole = dtype if case.half else torch.float32
    module = copy.deepcopy(case.module).to(device, whole).eval()
    inputs = [x.to(device, whole if x.is_floating_point() else x.dtype) for x in case.inputs]
    mixed = torch.autocast(device, dtype, enabled=dtype is not whole)
    subject = Subject(module, tuple(inputs), {}, folder, device)
    for peer in peers:
        why_not = PEERS[peer].why_not(device) or _why_not(peer, case, dtype)
        if time.perf_counter() > until:
            why_not = "no time is left"
        if why_not is not None:
            yield peer, ({"why_not": why_not}, None)
            continue
        try:
            with mixed:
                began = time.perf_counter()
                call = _prepared(peer, subject, case)
                results = [call(*inputs) for _ in range(3)][-1]
                timing.synchronize(device)
            row = {"error": _error(results, case.wanted), "prepare_s": time.perf_counter() - began}
        except Exception as error:
            traceback.print_exc()
            yield peer, ({"why_not": f"{type(error).__name__}: {str(error)[:200]}"}, None)
            continue
        yield peer, (row, _within(mixed, call, inputs))


def _why_not(peer: str, case: Case, dtype: torch.dtype) -> str | None:
    if peer != "onnxruntime":
        return None
    if case.file is None:
        return "no file"
    return None if dtype is torch.float32 else "the file is in float32"


def _prepared(peer: str, subject: Subject, case: Case) -> Prepared:
    if peer != "onnxruntime":
        torch._dynamo.reset()
        return PEERS[peer].prepare(subject)
    assert case.file is not None
    from benchmarks.onnx_peer import load

    return load(case.file, subject.device)


def _within(mixed: torch.autocast, call: Prepared, inputs: Sequence[Tensor]) -> timing.Call:
    def run() -> Any:
        with mixed:
            return call(*inputs)

    return run


def _error(results: Any, wanted: Sequence[np.ndarray]) -> float:
    found = [results] if isinstance(results, Tensor) else list(results)
    pairs = zip((y.float().cpu().numpy() for y in found), wanted, strict=True)
    return max(float(np.abs(y - x).max() / max(np.abs(x).max(), 1e-30)) for y, x in pairs)


def _cases(names: Sequence[str], size: models.Size, folder: Path) -> Iterator[tuple[str, Case]]:
    """The cases of these names, but for those that fail, which are printed."""
    for name in names:
        place = folder / name.replace(":", "_")
        place.mkdir()
        try:
            yield name, case(name, size, place)
        except Exception as error:
            traceback.print_exc()
            print(f"{name:18} {type(error).__name__}: {str(error)[:90]}", flush=True)


def line(name: str, dtype: str, peer: str, row: dict[str, Any]) -> str:
    """A line of the table."""
    if "why_not" in row:
        return f"{name:18} {dtype:8} {peer:16} {row['why_not'].splitlines()[0][:90]}"
    device, wall = (f"{row[clock]:9.4f}" if clock in row else " " * 9 for clock in ("device_ms", "wall_ms"))
    return f"{name:18} {dtype:8} {peer:16} {device} {wall} {row['error']:9.1e} {row['prepare_s']:7.1f}"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Print a table, and write it as JSON; the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.onnx_latency", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--seconds", type=float, default=60, help="for each model and dtype")
    parser.add_argument("--peers", default=",".join(DEFAULT_PEERS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--size", choices=["small", "full"], default="full", help="of models of the zoo")
    parser.add_argument("--json", type=Path, help="the file for the rows")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    print(f"{'model':18} {'dtype':8} {'peer':16} {'device ms':>9} {'wall ms':>9} {'error':>9} {'begin s':>7}")
    groups: dict[str, list[str]] = {}  # the forms of a model
    for name in options.names or NAMES:
        groups.setdefault(name.partition(":")[0], []).append(name)
    for names in groups.values():
        with tempfile.TemporaryDirectory() as folder:
            cases = dict(_cases(names, options.size, Path(folder)))
            for dtype in options.dtypes.split(","):
                measured = measure(cases, DTYPES[dtype], options.peers.split(","), options.seconds, device)
                for name, found in measured.items():
                    for peer, row in found.items():
                        print(line(name, dtype, peer, row), flush=True)
                        rows.append({"model": name, "dtype": dtype, "peer": peer, **row})
                if options.json is not None:
                    options.json.write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
