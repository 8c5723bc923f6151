"""What each rank of `benchmarks.ranks` does: cases one after the other, a row of JSON for each.

A row has milliseconds of a call (the median of blocks in a row), how far its result is off from that of the first case
with the same weights, seconds until the first result, and from there to full speed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import torch_rtx
from benchmarks.rank_models import LLAMA_1B, LLAMA_8B, SMALL, Layer, Llama, divided, tokens_of

TIMEOUT = timedelta(seconds=240)  # of collectives: a rank may compile for so long while another one waits
SETTLE_S = (150, 30)  # for the background work of a case, and for what its results begin
BLOCKS = 5
Row = dict[str, Any]
Call = Callable[[], Tensor]


class Rank:
    """This process: its device, its place among the others, and what cases have computed before."""

    def __init__(self, small: bool) -> None:
        self.small, self.cuda = small, torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
        backend, bound = ("nccl", self.device) if self.cuda else ("gloo", None)
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=bound)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.first: dict[str, Tensor] = {}

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def settle(self, call: Call, ours: bool) -> dict[str, Any]:
        """Call until it is at full speed, as often on all ranks; the seconds that it took, and whether it is."""
        start, settled = time.perf_counter(), True
        for seconds in SETTLE_S if ours else (0,):
            for _ in range(4):
                call()
            settled = not ours or torch_rtx.wait(seconds)
        for _ in range(2):
            call()
        self.synchronize()
        return {"settling_s": time.perf_counter() - start, "settled": settled}

    def ms(self, call: Call, count: int) -> float:
        """Milliseconds of a call in a row of them; the median of a few rows."""
        found = []
        for _ in range(BLOCKS):
            self.synchronize()
            dist.barrier()
            self.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                call()
            self.synchronize()
            found.append(1e3 * (time.perf_counter() - start) / count)
        return statistics.median(found)

    def error(self, name: str, result: Tensor) -> float:
        """How far a result is off from that of the first case of this name, relative to its largest number."""
        result = result.detach().float()
        first = self.first.setdefault(name, result.clone())
        return float((result - first).abs().max() / first.abs().max())


def inference(rank: Rank, peer: str, parts: int, length: int) -> Row:
    """A step of the 8B model's layers; `length` 1: one token after others, else the first ones of a text."""
    shape = SMALL if rank.small else LLAMA_8B
    length = min(length, shape.context)
    mesh = init_device_mesh(rank.device.type, (rank.size,), mesh_dim_names=("tp",)) if parts > 1 else None
    torch.manual_seed(0)
    torch.set_default_dtype(rank.dtype)
    with rank.device:
        model = Llama(shape, 1, parts).eval()
    torch.set_default_dtype(torch.float32)
    if mesh is not None:
        divided(model, mesh)
    tokens = tokens_of(shape, (1, length), 0, rank.device)
    at = torch.arange(length, device=rank.device) + (7 if length == 1 else 0)
    start = time.perf_counter()
    with torch.no_grad():
        call = partial(_compiled(model, peer, (tokens, at), mesh), tokens, at)
        call()
        compiling = {"compiling_s": time.perf_counter() - start}
        compiling |= rank.settle(call, not peer.startswith(("inductor", "eager")))
        few = rank.small or not rank.cuda
        error = rank.error(f"{length} {parts}", call())
        count = 3 if few else 100 if length == 1 else 10
        return {"ms": rank.ms(call, count), "error": error, **compiling}


def _compiled(model: nn.Module, peer: str, inputs: tuple[Tensor, ...], mesh: Any) -> Callable[..., Tensor]:
    filtered = {"guard_filter_fn": torch_rtx.skip_layer_guards}
    options: dict[str, dict[str, Any]] = {
        "rtx": {"backend": "rtx", "options": filtered},
        "rtx-guarded": {"backend": "rtx"},
        "inductor": {"mode": "reduce-overhead"},
        "inductor-filtered": {"options": {"triton.cudagraphs": True, **filtered}},
    }
    if peer == "eager":
        return model
    if peer == "engine":
        return torch_rtx.compile(model, inputs, groups=mesh)
    return torch.compile(model, fullgraph=True, dynamic=False, **options[peer])


def _trained(rank: Rank, peer: str, losses: Callable[[], Tensor], parameters: Sequence[Tensor], count: int) -> Row:
    """A step of AdamW on a loss; `error` is that of the loss after five steps."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=rank.cuda)
    start = time.perf_counter()

    def step() -> Tensor:
        loss = losses()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    found = [step() for _ in range(5)]
    compiling = {"compiling_s": time.perf_counter() - start, **rank.settle(step, peer == "rtx")}
    error = rank.error(str(len(parameters)), torch.stack(found)[-1:])
    return {"ms": rank.ms(step, count), "error": error, **compiling, "losses": torch.stack(found).tolist()}


def fsdp(rank: Rank, peer: str, parts: int) -> Row:
    """A step of the 1B model, each layer sharded and compiled; bfloat16 with sums over ranks in float32."""
    shape = SMALL if rank.small else LLAMA_1B
    torch.manual_seed(0)
    with rank.device:
        model = Llama(shape)
    mesh = init_device_mesh(rank.device.type, (rank.size,), mesh_dim_names=("dp",))
    policy = MixedPrecisionPolicy(param_dtype=rank.dtype, reduce_dtype=torch.float32)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        if peer != "eager":
            layer.compile(backend=peer)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    tokens = tokens_of(shape, (1 if rank.small else 2, shape.context + 1), rank.rank, rank.device)
    at = torch.arange(shape.context, device=rank.device)

    def entropy(scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores.flatten(0, 1).float(), labels.flatten())

    of_scores = entropy if peer == "eager" else torch.compile(entropy, backend=peer)
    return _trained(
        rank,
        peer,
        lambda: of_scores(model(tokens[:, :-1], at), tokens[:, 1:]),
        [*model.parameters()],
        2 if rank.small else 5,
    )


def ddp(rank: Rank, peer: str, parts: int) -> Row:
    """A step of ResNet-50 on 64 images per rank, in bfloat16 autocast and channels-last."""
    from benchmarks import models, training

    torch.manual_seed(0)
    built, args, kwargs = models.build("resnet50", "small" if rank.small else "full", batch=2 if rank.small else 64)
    learner = training.learner("resnet50", built)
    (images,), labels = training.labelled(learner, (args, kwargs), rank.rank)
    images = images.to(rank.device, memory_format=torch.channels_last)
    labels = {name: value.to(rank.device) for name, value in labels.items()}
    model = learner.to(rank.device, memory_format=torch.channels_last)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    call = wrapped if peer == "eager" else torch.compile(wrapped, backend=peer)

    def losses() -> Tensor:
        with torch.autocast(rank.device.type, torch.bfloat16, enabled=rank.cuda):
            found: Tensor = call(images, **labels).loss
        return found

    return _trained(rank, peer, losses, [*model.parameters()], 2 if rank.small else 10)


def started(rank: Rank, peer: str, parts: int) -> Row:
    """Seconds from the start of the command until the first result, and of those the ones since all was imported."""
    imported = time.time()
    shape = SMALL if rank.small else LLAMA_8B
    mesh = init_device_mesh(rank.device.type, (rank.size,), mesh_dim_names=("tp",))
    torch.set_default_dtype(rank.dtype)
    with rank.device:
        model = divided(Llama(shape, 1, rank.size).eval(), mesh)
    made = time.time()
    with torch.no_grad():
        call = torch.compile(model, backend="rtx", fullgraph=True, dynamic=False)
        inputs = tokens_of(shape, (1, 1), 0, rank.device), torch.tensor([7], device=rank.device)
        call(*inputs)
        rank.synchronize()
        first = time.time()
        rank.settle(partial(call, *inputs), True)
    begun = float(os.environ["RANKS_BEGUN"])
    return {"seconds": first - begun, "since_import_s": first - imported, "compiling_s": first - made}


ITEMS: dict[str, Callable[[Rank, str, int], Row]] = {
    "decode": partial(inference, length=1),
    "prefill": partial(inference, length=2048),
    "fsdp": fsdp,
    "ddp": ddp,
    "start": started,
}


def _end_with(torchrun: int, runner: int) -> None:
    """End this process soon after one of these: torchrun gives ranks sessions of their own, and who kills it would
    leave them on the GPUs, beside whatever is measured next."""
    with contextlib.suppress(ProcessLookupError):
        while os.getppid() == torchrun:
            os.kill(runner, 0)  # nothing, if there is such a process
            time.sleep(0.5)
    os._exit(1)


def main() -> None:
    """Run the cases, such as `decode:engine:2`, and write their rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--rows", required=True, help="the file that rows are added to, by the first rank")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    others = os.getppid(), int(os.environ["RANKS_OF"])
    threading.Thread(target=_end_with, args=others, daemon=True).start()
    rank = Rank(options.small)
    for case in options.cases:
        item, peer, parts = case.split(":")
        row: Row = {"case": case}
        _say(rank, options.rows, {**row, "begun": time.time()})
        torch._dynamo.reset()
        try:
            row |= ITEMS[item](rank, peer, int(parts))
        except Exception:
            row["failed"] = traceback.format_exc()[-2000:]
            print(f"rank {rank.rank}: {case}: {row['failed']}", file=sys.stderr, flush=True)
        gc.collect()
        _say(rank, options.rows, row)
        if "failed" in row:
            os._exit(1)  # the other ranks may be in a collective
    with contextlib.suppress(Exception):
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # a CUDA graph with collectives may outlive its process group


def _say(rank: Rank, path: str, row: Row) -> None:
    if rank.rank == 0:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
