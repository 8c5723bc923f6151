"""How much is lost by taking the tactic that is expected to be the fastest: on this GPU, and on parts of it.

    python -m benchmarks.cost_model [--json FILE] [--processors 66,24]

Of each layer the tactics that are ranked first are measured, on the whole GPU, on some of its multiprocessors (a green
context), and on some of them while the others fill the memory. Where the GPU is limited its figures are measured as
`torch-rtx measure-gpu` does. A row says by how much the first tactic is slower than the fastest: `sheet` ranks by the
data sheet of the whole GPU, `figures` by what was measured of the part. The numbers are geometric means, and the worst.
"""

from __future__ import annotations

import argparse
import json
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from torch_rtx.chips import Chip
from torch_rtx.errors import RtxError
from torch_rtx.ir import Graph, Node
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.build import Binaries, build
from torch_rtx.lowering.kernels.generate import tactics
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.runtime import driver as driver_api
from torch_rtx.runtime.benchmark import Run, device_us
from torch_rtx.runtime.candidate_check import CandidateCheck, InputPool
from torch_rtx.runtime.driver import checked
from torch_rtx.runtime.gpu_figures import measure
from torch_rtx.runtime.launch import gpu_of, load
from torch_rtx.runtime.tuning_context import known_chip
from torch_rtx.tactics import Tactic
from torch_rtx.targets import Target, arch_of

FIRST = 4  # tactics of each order that are measured
HOG_BYTES, IN_FLIGHT = 128 << 20, 6  # of what fills the memory
PRODUCT = """graph import {{
  input in0: f16[{m}, {k}]
  input in1: f16[{n}, {k}]
  a: f16[{m}, {n}] = op aten.linear.default(input=in0, weight=in1)
{after}}}
"""
AFTER = {
    "": "  return [a]\n",
    "gelu": "  b: f16[{m}, {n}] = op aten.gelu.default(self=a)\n  return [b]\n",
}
SIZES = [(1, 4096, 4096), (16, 4096, 4096), (16, 14336, 4096), (64, 2048, 8192), (128, 768, 768), (128, 3072, 768)]
SIZES += [(128, 768, 3072), (512, 2048, 2048), (1024, 3072, 768), (3072, 768, 3072), (2048, 4096, 4096)]
CONVOLUTION = """graph import {{
  input in0: f16[{b}, {c}, {h}, {h}]({chh}, 1, {ch}, {c})
  input in1: f16[{c}, {c}, 3, 3]({c9}, 1, {c3}, {c})
  a: f16[{b}, {c}, {h}, {h}]({chh}, 1, {ch}, {c}) = op aten.conv2d.default(input=in0, weight=in1, padding=[1, 1])
  return [a]
}}
"""
CONVOLUTIONS = [(1, 64, 56), (8, 256, 14), (32, 128, 28)]
ROWS = """graph import {{
  input in0: f16[{rows}, {size}]
  a: f16[{rows}, {size}] = op aten._softmax.default(self=in0, dim=-1, half_to_float=False)
  return [a]
}}
"""


def layers() -> dict[str, Graph]:
    """What is measured, by name."""
    found = {}
    for m, n, k in SIZES:
        for name, after in AFTER.items():
            if m >= 128 or not name:
                text = PRODUCT.format(m=m, n=n, k=k, after=after.format(m=m, n=n))
                found[f"{m}x{n}x{k} {name}".strip()] = parse(text)
    for b, c, h in CONVOLUTIONS:
        text = CONVOLUTION.format(b=b, c=c, h=h, chh=c * h * h, ch=c * h, c9=9 * c, c3=3 * c)
        found[f"conv {b}x{c}x{h}"] = parse(text)
    for rows, size in ((1, 50257), (512, 4096)):
        found[f"softmax {rows}x{size}"] = parse(ROWS.format(rows=rows, size=size))
    return found


# ---- parts of a GPU --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of the GPU: a stream whose kernels run on `processors` of it."""

    name: str
    processors: int
    stream: Any
    hog: Any = None


def parts(device: torch.device, wanted: list[int]) -> Iterator[Part]:
    """The whole GPU, then `wanted` multiprocessors of it, and the first of these while the others fill the memory."""
    yield Part(
        "whole", torch.cuda.get_device_properties(device).multi_processor_count, torch.cuda.current_stream(device)
    )
    for at, count in enumerate(wanted):
        try:
            stream, processors, rest = green(device, count)
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:
            print(f"no green context of {count} multiprocessors: {type(error).__name__}: {error}")
            continue
        yield Part(f"{processors} SMs", processors, stream)
        if at == 0:
            yield Part(f"{processors} SMs, busy memory", processors, stream, rest)


def green(device: torch.device, count: int) -> tuple[Any, int, Any]:
    """A stream on about `count` multiprocessors, how many they are, and a stream on the others."""
    cuda = driver_api.driver()
    handle = checked(cuda.cuDeviceGet(device.index))
    everything = checked(cuda.cuDeviceGetDevResource(handle, cuda.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    status, groups, *_, rest = cuda.cuDevSmResourceSplitByCount(1, everything, 0, count)
    checked((status,))
    (one, *_), flags = groups, cuda.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM

    def stream(resource: Any) -> Any:
        description = checked(cuda.cuDevResourceGenerateDesc([resource], 1))
        context = checked(cuda.cuGreenCtxCreate(description, handle, flags))
        raw = checked(cuda.cuGreenCtxStreamCreate(context, cuda.CUstream_flags.CU_STREAM_NON_BLOCKING, 0))
        return torch.cuda.ExternalStream(int(raw), device)

    return stream(one), int(one.sm.smCount), stream(rest)


@contextmanager
def on(part: Part, device: torch.device) -> Iterator[None]:
    """Run on a part, beside kernels that fill the memory if it has such."""
    stop = threading.Event()

    def fill() -> None:
        with torch.cuda.stream(part.hog):
            source, target = (torch.zeros(HOG_BYTES // 4, device=device) for _ in range(2))
            ends: list[Any] = []
            while not stop.is_set():
                torch.neg(source, out=target)
                ends.append(torch.cuda.Event())
                ends[-1].record()
                if len(ends) > IN_FLIGHT:
                    ends.pop(0).synchronize()

    thread = None if part.hog is None else threading.Thread(target=fill, daemon=True)
    if thread is not None:
        thread.start()
    try:
        with torch.cuda.stream(part.stream):
            yield
            torch.cuda.current_stream(device).synchronize()
    finally:
        stop.set()
        if thread is not None:
            thread.join()


# ---- tactics ---------------------------------------------------------------------------------------------------------

Name = tuple[str, ...]  # the kind of a tactic, and the sources of its kernels


def name_of(tactic: Tactic[Kernel]) -> Name:
    """What tells a tactic from others of its layer."""
    return tactic.kind, *(f"{k.source} {k.num_warps} {k.num_stages}" for k in tactic.kernels.values())


def ranked(body: Graph, sm: int, chip: Chip) -> dict[Name, Tactic[Kernel]]:
    """The first tactics by expected time on a chip, the one to take first."""
    found = islice(tactics(body, "layer", replace(arch_of(sm), chip=chip)), FIRST)
    return {name_of(tactic): tactic for tactic in found}


def compiled(wanted: Mapping[tuple[str, Name], Tactic[Kernel]], target: Target) -> dict[tuple[str, Name], Any]:
    """What fits of `wanted`, with its binaries."""
    chosen, _ = build((key, iter([(0, tactic)]), target) for key, tactic in wanted.items())
    found = {}
    for key, result in chosen.items():
        if result.problem is None:
            binaries = Binaries()
            found[key] = binaries.tactic(result), binaries.stored
    return found


def runs_of(
    bodies: Mapping[str, Graph], made: Mapping[tuple[str, Name], Any], target: Target, device: torch.device
) -> dict[tuple[str, Name], list[Run]]:
    """What to time of each tactic whose results are right."""
    gpu, pool, found = gpu_of(driver_api.driver(), device.index), InputPool(device), {}
    for layer, body in bodies.items():
        args = tuple((value.name, value) for value in body.inputs)
        node = Node("kernel", "layer", args, tuple(body.outputs), body)  # type: ignore[arg-type]
        check = CandidateCheck(node, device)
        for key in [key for key in made if key[0] == layer]:
            tactic, stored = made[key]
            try:
                code = check.code({"layer": load(gpu, node, tactic, target, stored)})
                if check.problem(code) is None:
                    found[key] = check.runs(code, pool)
            except RtxError as error:
                print(f"{layer}: a {tactic.kind} is left out: {error}")
    return found


def regret(order: Mapping[Name, Any], times: Mapping[Name, float]) -> float:
    """The time of the first tactic over that of the fastest."""
    first = next((name for name in order if name in times), None)
    return times[first] / min(times.values()) if first is not None else math.nan


def summary(ratios: list[float]) -> dict[str, float]:
    """The geometric mean of ratios, and the largest."""
    kept = [ratio for ratio in ratios if not math.isnan(ratio)]
    return {"mean": math.exp(sum(map(math.log, kept)) / len(kept)), "worst": max(kept)}


# ---- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, and print a row for each part of the GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="a file for all times")
    parser.add_argument(
        "--processors", default="66,24", help="how many multiprocessors the parts have, separated by commas"
    )
    given = parser.parse_args()
    start, device = time.monotonic(), torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    sm, bodies = 10 * major + minor, layers()
    sheet, target = known_chip(sm, device), arch_of(sm).target
    found, chips = [*parts(device, list(map(int, given.processors.split(","))))], {}
    for part in found:
        with on(part, device):
            figures = measure(device)
        chips[part.name] = replace(sheet, processors=part.processors).measured(figures)
        print(f"[{time.monotonic() - start:5.1f} s] {part.name}:", {n: round(f, 3) for n, f in figures.items()})
    orders = {(n, layer): ranked(body, sm, chip) for n, chip in chips.items() for layer, body in bodies.items()}
    orders |= {("sheet", layer): ranked(body, sm, sheet) for layer, body in bodies.items()}
    made = compiled({(layer, n): t for (_, layer), order in orders.items() for n, t in order.items()}, target)
    print(f"[{time.monotonic() - start:5.1f} s] {len(made)} tactics of {len(bodies)} layers are compiled")
    timed, rows = runs_of(bodies, made, target, device), {}
    for part in found:
        with on(part, device):
            times = {key: device_us(runs) for key, runs in timed.items()}
        rows[part.name] = report(part.name, bodies, orders, times)
        print(f"[{time.monotonic() - start:5.1f} s]")
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1))


def report(part: str, bodies: Mapping[str, Graph], orders: Mapping[tuple[str, str], Any], times: Any) -> dict[str, Any]:
    """Print and return what is lost on a part."""
    row: dict[str, Any] = {"layers": {}}
    lost: dict[str, list[float]] = {"sheet": [], "figures": []}
    for layer in bodies:
        own = {name: us for (at, name), us in times.items() if at == layer}
        if not own:
            continue
        for by, order in (("sheet", orders["sheet", layer]), ("figures", orders[part, layer])):
            lost[by].append(regret(order, own))
        best = min(own, key=lambda name: own[name])
        row["layers"][layer] = {
            "best": [best[0], own[best]],
            "measured": {kind: min(us for name, us in own.items() if name[0] == kind) for kind, *_ in own},
            "expected": {name[0]: tactic.expected_us for name, tactic in reversed(orders[part, layer].items())},
            **{by: ratios[-1] for by, ratios in lost.items()},
        }
    for by, ratios in lost.items():
        row[by] = summary(ratios)
        print(f"{part}, by {by}: {row[by]['mean']:.3f}, at worst {row[by]['worst']:.2f}")
    return row


if __name__ == "__main__":
    main()
