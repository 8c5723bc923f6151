"""Two ranks, on gloo or NCCL, in processes of their own that live as long as the tests: starting them takes long.

`Ranks.run(function, *args)` calls a function of a module, which the ranks import, on all of them at once, and returns
what each returned. A rank that raises, ends, or does not answer in time fails the call, and ends the others.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

SECONDS = 240  # for one call, and for one collective: the machine may be busy
SIZE = 2
CHECKS = [f"tests.distributed.{name}" for name in ("collective_checks", "parallel_checks", "training_checks")]


def serve(rank: int, size: int, backend: str, folder: str, seconds: float, connection: Connection) -> None:
    """Answer calls until there are no more."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
    connection.send(None)
    while (call := connection.recv()) is not None:
        function, args = call
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            connection.send((True, function(*args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    dist.destroy_process_group()


def device() -> Any:
    """Where this rank computes."""
    import torch
    import torch.distributed as dist

    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


class Ranks:
    """Processes that are the ranks of one group, in which a collective may take so many seconds."""

    def __init__(self, backend: str = "gloo", size: int = SIZE, seconds: float = SECONDS) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context: Any = multiprocessing.get_context("forkserver" if backend == "gloo" else "spawn")
        context.set_forkserver_preload(CHECKS)  # so that one process imports them
        self._connections: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(rank, size, backend, self._folder.name, seconds, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self.processes.append(process)
        self._answers(SECONDS)

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = SECONDS) -> list[Any]:
        """What `function(*args)` returned on each rank.

        Raises:
            AssertionError: it raised on one of them; or one ended, or is not done after so many seconds: all of them
                are gone then.
        """
        self.start(function, *args)
        answers = self._answers(seconds)
        failed = [f"rank {rank}: {answer}" for rank, (done, answer) in enumerate(answers) if not done]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Call `function(*args)` on each rank, and do not wait for what they return."""
        for connection in self._connections:
            connection.send((function, args))

    def _answers(self, seconds: float) -> list[Any]:
        found: dict[Any, Any] = {}
        while len(found) < len(self._connections):
            ready = wait([one for one in self._connections if one not in found], seconds)
            if not ready:
                self.close()
                raise AssertionError(f"only {len(found)} ranks answered within {seconds} seconds: {[*found.values()]}")
            for connection in ready:
                try:
                    found[connection] = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    self.close()
                    raise AssertionError("a rank ended") from None
                answer = found[connection]
                if answer is not None and not answer[0]:
                    seconds = min(seconds, 30)  # the others may wait for it
        return [found[one] for one in self._connections]

    def close(self) -> None:
        """End the ranks."""
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()
