"""`torch-rtx bench`: latency and throughput of an engine.

Two phases, each at least `--iterations` calls and half of `--duration`. In the first one, calls are made one by one,
the device idle before each: their latency, and the host's part of it. In the second one `--threads` threads, each with
a CUDA stream of its own, call without waits in between: the throughput, and on a GPU the time per call by events.
"""

from __future__ import annotations

import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torch_rtx.cli import calls
from torch_rtx.cli.sources import load_source
from torch_rtx.cli.terminal import Report
from torch_rtx.errors import SettingsError
from torch_rtx.progress import stage

if TYPE_CHECKING:
    from torch_rtx.runtime.module import CompiledModule

Call = Callable[..., Any]
PERCENTILES = (90.0, 99.0)
WAIT_S = 600.0  # for kernels that are compiled and measured in the background
IN_FLIGHT = 32  # calls that a thread queues before it waits: a full queue of the driver blocks the host in any case

ITERATIONS_HELP = "Fewest calls of each phase."
PERCENTILE_HELP = "Percentiles to print, as 90,99.9; repeatable; default: 90 and 99."
TRANSFERS_HELP = "Copy inputs from, and results to, pinned host memory in each call."
THREADS_HELP = "Threads that call at once, with a CUDA stream each."
MODEL_HELP = "The model, as `build` takes it: its weights are the engine's."
PEERS_HELP = "What runs the model beside the engine: eager, inductor, or another backend of torch.compile; repeatable."
GRAPHS_HELP = "CUDA graphs; default: as in applications."
Count = Annotated[int, typer.Option(min=1, help=ITERATIONS_HELP)]
Seconds = Annotated[float, typer.Option(min=0, help="Seconds of measuring, for both phases.")]
Percentiles = Annotated[list[str] | None, typer.Option("--percentiles", "--percentile", help=PERCENTILE_HELP)]


@dataclass(frozen=True)
class Times:
    """Milliseconds of calls.

    Attributes:
        percentiles: by percent.
    """

    count: int
    min: float
    mean: float
    median: float
    max: float
    percentiles: dict[str, float]

    @staticmethod
    def of(seconds: Sequence[float], percentiles: Sequence[float]) -> Times:
        """The summary of times in seconds; percentiles are interpolated between neighbours."""
        from torch_rtx.runtime.call_times import percentile

        ms = sorted(1e3 * each for each in seconds)
        found = {f"{percent:g}": percentile(ms, percent) for percent in percentiles}
        return Times(len(ms), ms[0], statistics.fmean(ms), statistics.median(ms), ms[-1], found)

    def __str__(self) -> str:
        parts = [f"p{percent} {ms:.4g}" for percent, ms in self.percentiles.items()]
        shown = ", ".join([f"min {self.min:.4g}, mean {self.mean:.4g}, median {self.median:.4g}", *parts])
        return f"{shown}, max {self.max:.4g} ms over {self.count} calls"


@dataclass(frozen=True)
class Figures:
    """What `bench` measures.

    Attributes:
        throughput: calls per second, of all threads together.
        latency: of a call until its results are there, the device idle before it.
        host: the part of it until the call returns.
        device: per call, in a row of calls, by events; None on the CPU.
        graphs: calls replayed CUDA graphs of torch_rtx.
        peers: of the model itself, by the name of what ran it.
    """

    device_name: str
    threads: int
    throughput: float
    latency: Times
    host: Times
    device: Times | None
    graphs: bool
    peers: Mapping[str, Figures] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"device: {self.device_name}, CUDA graphs {'on' if self.graphs else 'off'}",
            f"throughput: {self.throughput:.5g} calls/s, {self.threads} thread{'s' * (self.threads > 1)}",
            f"latency: {self.latency}",
            f"host: {self.host}",
        ]
        lines += [] if self.device is None else [f"device: {self.device}"]
        for name, peer in self.peers.items():
            ratios = self.throughput / peer.throughput, peer.latency.median / self.latency.median
            lines += [f"{name}: {peer.throughput:.5g} calls/s, latency: {peer.latency}"]
            lines += [
                f"    the engine has {ratios[0]:.2f} times the throughput, its median is {ratios[1]:.2f} times as fast"
            ]
        return "\n".join(lines)


def bench(
    path: calls.EngineFile,
    weights: calls.Weights = None,
    inputs: calls.InputFiles = None,
    size: calls.Sizes = None,
    shapes: calls.Shapes = None,
    seed: calls.Seed = 0,
    device: calls.Device = None,
    trust_binaries: calls.Trust = False,
    option: calls.Options = None,
    iterations: Count = 10,
    duration: Seconds = 3.0,
    warmup: Annotated[float, typer.Option(min=0, help="Seconds of calls before.")] = 0.2,
    percentile: Percentiles = None,
    threads: Annotated[int, typer.Option("--threads", "--streams", min=1, help=THREADS_HELP)] = 1,
    transfers: Annotated[bool, typer.Option(help=TRANSFERS_HELP)] = False,
    graphs: Annotated[bool | None, typer.Option("--graphs/--no-graphs", help=GRAPHS_HELP)] = None,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    peer: Annotated[list[str] | None, typer.Option("--peers", "--peer", help=PEERS_HELP)] = None,
) -> Report:
    """Measure latency and throughput; without --inputs and --weights, those are random."""
    if peer and model is None:
        raise SettingsError("--peers measures a model beside its engine", hint="give --model")
    percentiles = percentiles_given(percentile or ())
    strategy = {None: None, True: "whole_graph_capture", False: "disabled"}[graphs]
    settings = {} if strategy is None else {"cuda_graph_strategy": strategy}
    module = calls.opened(path, weights, device, trust_binaries, option, **settings)
    values = calls.inputs_given(module, inputs, size, shapes, seed)
    source = None if model is None else load_source(model).model.to(module.device)
    if source is not None and not weights and module.engine.weights is None:
        module.attach(source)
    elif not weights and module.engine.weights is None:
        calls.fill_in_weights(module, seed)
    from torch_rtx.runtime.background import wait

    def called(function: Call) -> list[Call]:
        return [_call(function, module, values, transfers) for _ in range(threads)]

    made = called(module)
    if module.device.type == "cuda":
        stage("compiling and measuring kernels")
    made[0]()
    if not wait(WAIT_S):
        raise SettingsError(f"kernels are still being compiled after {WAIT_S:g} s", hint="use a portable engine")
    how = iterations, duration / 2, warmup, percentiles
    figures = replace(measure(module.device, made, *how), graphs=_replayed(module))
    peers: dict[str, Figures] = {}
    for name in (name for text in peer or () for name in text.split(",")):
        stage(f"running the model by {name}")
        peers[name] = measure(module.device, called(_peer(source, name)), *how)
    figures = replace(figures, peers=peers)
    return Report(figures, figures)


def _peer(model: Any, name: str) -> Call:
    """The model, run by "eager" or by a backend of torch.compile.

    Raises:
        SettingsError: there is no such backend.
    """
    import torch

    if name == "eager":
        compiled = model
    elif name in torch.compiler.list_backends(exclude_tags=()):
        compiled = torch.compile(model, backend=name)
    else:
        known = ", ".join(["eager", *torch.compiler.list_backends()])
        raise SettingsError(f"{name!r} runs no models here", hint=f"peers are {known}")

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode():
            return compiled(*args, **kwargs)

    return call


def _replayed(module: CompiledModule) -> bool:
    pool = module.session.pool
    return pool is not None and pool.disabled is None and pool.replays > 0


def percentiles_given(given: Iterable[str]) -> tuple[float, ...]:
    """The percentiles that texts such as `90,99.9` stand for; the usual ones if there are none.

    Raises:
        typer.BadParameter: a text is none.
    """
    try:
        found = tuple(float(part) for text in given for part in text.split(","))
    except ValueError:
        found = (math.nan,)
    if not all(0 <= percent <= 100 for percent in found):
        raise typer.BadParameter(f"{', '.join(given)} are not percentiles, from 0 to 100", param_hint="--percentiles")
    return found or PERCENTILES


def _call(function: Call, module: CompiledModule, inputs: Sequence[Any], transfers: bool) -> Call:
    """A call of `function`, whose arguments are the module's, with inputs of its own, several sets in turns, and with
    copies to and from the device if `transfers`."""
    import torch
    from torch.utils import _pytree as pytree

    from torch_rtx.runtime.call_times import SETS

    if not transfers or module.device.type != "cuda":
        own = [[x.clone() if isinstance(x, torch.Tensor) else x for x in inputs] for _ in range(SETS)]
        sets = itertools.cycle([calls.arguments(module, each) for each in own])

        def rotating() -> Any:
            args, kwargs = next(sets)
            return function(*args, **kwargs)

        return rotating
    pinned = [x.cpu().pin_memory() if isinstance(x, torch.Tensor) and x.is_cuda else x for x in inputs]
    back: list[torch.Tensor] = []

    def call() -> Any:
        here = [x.to(module.device, non_blocking=True) if isinstance(x, torch.Tensor) else x for x in pinned]
        args, kwargs = calls.arguments(module, here)
        results = [x for x in pytree.tree_leaves(function(*args, **kwargs)) if isinstance(x, torch.Tensor)]
        if not back:
            back.extend(torch.empty_like(x, device="cpu", pin_memory=True) for x in results)
        for target, result in zip(back, results, strict=True):
            target.copy_(result, non_blocking=True)
        return back

    return call


def measure(
    device: Any,
    made: Sequence[Call],
    iterations: int,
    duration: float,
    warmup: float,
    percentiles: Sequence[float],
) -> Figures:
    """Both phases.

    Args:
        made: a call for each thread.
        duration: seconds of each phase.
    """
    import torch

    from torch_rtx.runtime.call_times import alone, undisturbed

    stage("measuring latency")
    _repeat(lambda: _finished(made[0], device), 3, warmup)
    single: list[tuple[float, float]] = []
    with undisturbed(device):
        _repeat(lambda: single.append(alone(made[0], lambda: _synchronize(device))), iterations, duration)
        stage("measuring throughput")
        per_call, throughput = _in_rows(made, device, iterations, duration, warmup)
    host, latency = zip(*single, strict=True)
    return Figures(
        torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        len(made),
        throughput,
        Times.of(latency, percentiles),
        Times.of(host, percentiles),
        Times.of(per_call, percentiles) if per_call else None,
        graphs=False,
    )


def _in_rows(
    made: Sequence[Call], device: Any, iterations: int, duration: float, warmup: float
) -> tuple[list[float], float]:
    """Seconds per call of the first thread, by events, none on the CPU; and calls per second of all threads."""
    from torch_rtx.runtime.call_times import in_a_row

    barrier, counts, spans, problems = threading.Barrier(len(made)), [0] * len(made), [0.0] * len(made), []
    per_call: list[float] = []

    def work(index: int) -> None:
        with _stream_of(device):
            _repeat(lambda: _finished(made[index], device), 3, warmup)
            barrier.wait()
            start = time.perf_counter()
            while counts[index] < iterations or time.perf_counter() - start < duration:
                if device.type == "cuda":
                    row = in_a_row(made[index], IN_FLIGHT - 1)
                    per_call.extend(row if index == 0 else ())
                    counts[index] += IN_FLIGHT
                else:
                    made[index]()
                    counts[index] += 1
            spans[index] = time.perf_counter() - start

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:  # raised again in the thread of the caller
            problems.append(error)
            barrier.abort()

    workers = [threading.Thread(target=guarded, args=(index,)) for index in range(len(made))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    real = [error for error in problems if not isinstance(error, threading.BrokenBarrierError)]
    if real:
        raise real[0]
    return per_call, sum(count / span for count, span in zip(counts, spans, strict=True))


def _stream_of(device: Any) -> AbstractContextManager[Any]:
    import torch

    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def _finished(call: Call, device: Any) -> None:
    call()
    _synchronize(device)


def _synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _repeat(call: Call, count: int, duration: float) -> None:
    """Call `count` times at least, and for `duration` seconds."""
    start, done = time.perf_counter(), 0
    while done < count or time.perf_counter() - start < duration:
        call()
        done += 1
