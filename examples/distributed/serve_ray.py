"""An engine on several GPUs behind HTTP, with Ray Serve: a replica has an actor for each rank, and asks them all.

    python examples/distributed/serve_ray.py                   builds an engine, serves it, asks it, and compares

It needs `ray[serve]`. On GPUs each rank gets one of its own; without GPUs the ranks talk through gloo.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from engines import RANKS, Mlp, build
from ray import serve
from starlette.requests import Request

import torch_rtx


@ray.remote(num_cpus=0)
class Rank:
    """A process with a part of the model. Ray lets it see its own GPU alone."""

    def __init__(self, rank: int, folder: str) -> None:
        gpus = torch.cuda.is_available()
        store = dist.FileStore(f"{folder}/store", RANKS)
        dist.init_process_group("nccl" if gpus else "gloo", store=store, rank=rank, world_size=RANKS)
        path, device = f"{folder}/model.rtx", "cuda" if gpus else "cpu"
        group = {"tp": dist.group.WORLD}
        self.module = torch_rtx.load(path, weights=f"{path}.safetensors", device=device, groups=group)

    def run(self, rows: list[list[float]]) -> list[list[float]]:
        """What the model makes of `rows`; all ranks get the same, and return the same."""
        return self.module(torch.tensor(rows, device=self.module.device)).tolist()


@serve.deployment
class Model:
    """The ranks of one model. Each request goes to all of them in one go: all see requests in one order."""

    def __init__(self, folder: str) -> None:
        gpus = int(torch.cuda.is_available())
        self.ranks = [Rank.options(num_gpus=gpus).remote(rank, folder) for rank in range(RANKS)]

    async def __call__(self, request: Request) -> list[list[float]]:
        """The answer of the first rank to the rows in the body of the request."""
        rows = await request.json()
        answers = [rank.run.remote(rows) for rank in self.ranks]
        return (await asyncio.gather(*answers))[0]


def ask(url: str, rows: torch.Tensor) -> torch.Tensor:
    """The answer to a request."""
    body = json.dumps(rows.tolist()).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as answer:
        return torch.tensor(json.load(answer))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> None:
    """Serve the model of `engines.py`, ask it a few times at once, and compare with the whole model."""
    with tempfile.TemporaryDirectory() as folder:
        build(f"{folder}/model.rtx")
        environment: dict[str, Any] = {"env_vars": {"PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path])}}
        ray.init(include_dashboard=False, log_to_driver=False, runtime_env=environment)
        port = free_port()
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(Model.bind(folder))
            torch.manual_seed(0)
            whole = Mlp()
            for _ in range(3):
                rows = torch.randn(4, 64)
                error = (ask(f"http://127.0.0.1:{port}/", rows) - whole(rows)).abs().max().item()
                print(f"{RANKS} ranks, error {error:.1e}")
        finally:
            serve.shutdown()
            ray.shutdown()


if __name__ == "__main__":
    main()
