"""The client of the compile worker: starts the process and sends it requests."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

from torch_rtx.artefacts import NO_FILES, Artefacts
from torch_rtx.chips import Chip
from torch_rtx.errors import KernelError
from torch_rtx.foreign import find, launch_in
from torch_rtx.ir import Graph
from torch_rtx.tactics import Candidate
from torch_rtx.targets import EXACT, Float32, arch_of

TIMEOUT_S = 600.0  # of a request: a compiler that hangs would block all later ones
# The program of the worker. Its `sys.path` is ours; `-P` keeps the current folder out. It ignores Ctrl-C, and ends when
# its input ends, as it does when this process is killed.
MAIN = """\
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = sys.argv[1:]
from torch_rtx.lowering.kernels.compile_worker import main
main()
"""


class CompileClient:
    """A worker process that compiles kernels: starts with the first request and ends with this process.

    Attributes:
        stopped: this process is ending, and nothing is compiled any more.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self.stopped = False

    def build(
        self,
        bodies: Mapping[str, tuple[Graph, int]],
        sm: int,
        artefacts: Artefacts = NO_FILES,
        chip: Chip | None = None,
        float32: Float32 = EXACT,
    ) -> dict[str, Candidate]:
        """Send a request to `compile_worker.build`; requests of several threads run one after another.

        Raises:
            KernelError: the worker can't be started, ended, timed out, or can't compile kernels; or Triton rejects a
                kernel that others wrote.
        """
        wanted = _with_foreign(bodies, sm, chip)
        if bodies and not wanted:
            return {}
        found: dict[str, Candidate] = self._answer("build", (wanted, sm, artefacts, chip, float32))
        return found

    def some(
        self,
        bodies: Mapping[str, tuple[Graph, int]],
        sm: int,
        artefacts: Artefacts = NO_FILES,
        chip: Chip | None = None,
        float32: Float32 = EXACT,
        later: Sequence[tuple[str, Graph, int]] = (),
    ) -> dict[str, Candidate | None]:
        """Send a request to `compile_worker.some`, as `build` does."""
        wanted = _with_foreign(bodies, sm, chip)
        if len(wanted) < len(bodies):
            return {name: None for name in bodies if name not in wanted}
        then = [one for one in later if launch_in(one[1]) is None]
        found: dict[str, Candidate | None] = self._answer("some", (wanted, sm, artefacts, chip, float32, then))
        return found

    def _answer(self, wanted: str, request: tuple[Any, ...]) -> Any:
        with self._request(wanted, request) as process:
            assert process.stdout is not None
            answer = pickle.load(process.stdout)
        if isinstance(answer, str):
            raise KernelError(answer)
        return answer

    @contextmanager
    def _request(self, wanted: str, request: tuple[Any, ...]) -> Iterator[subprocess.Popen[bytes]]:
        """Send a request; the block reads the answer. Other threads wait meanwhile."""
        timer: threading.Timer | None = None
        with self._lock:
            try:
                process = self._running()
                timer = threading.Timer(TIMEOUT_S, _kill, [process])
                timer.daemon = True
                timer.start()
                assert process.stdin is not None
                pickle.dump((wanted, request), process.stdin)
                process.stdin.flush()
                yield process
            except (OSError, EOFError, pickle.UnpicklingError) as error:
                self.close()
                late = timer is not None and not timer.is_alive()
                why = f"took more than {TIMEOUT_S:g} s" if late else f"ended: {type(error).__name__} {error}"
                raise KernelError(f"the process that compiles kernels {why}") from None
            except BaseException:  # Ctrl-C: the next request would read this one's answer
                self.close()
                raise
            finally:
                if timer is not None:
                    timer.cancel()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            if self.stopped:
                raise OSError("the program ends")
            if find_spec("triton") is None:
                raise OSError("the package triton is not installed")
            if getattr(sys, "frozen", False) or not sys.executable:
                raise OSError("no Python interpreter can be started: this program is frozen")
            command = [sys.executable, "-P", "-c", MAIN, *sys.path, str(Path(__file__).parents[2])]
            # A group of its own, so that the assemblers that it starts can be ended with it.
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
        return self._process

    def stop(self) -> None:
        """Close, and refuse later requests: this process is ending."""
        self.stopped = True
        self.close()

    def close(self) -> None:
        """End the worker. A running request gets an error; a later one starts a new worker."""
        process = self._process
        if process is not None:
            _kill(process)
            process.wait()
        self._process = None

    def abandon(self) -> None:
        """In a fork: the worker is that of the parent, at whose end its pipes have to be closed."""
        process = self._process
        for stream in (process.stdin, process.stdout) if process is not None else ():
            if isinstance(stream, BufferedReader | BufferedWriter):
                stream.raw.close()  # without a flush: what is buffered is the parent's
        self._process, self._lock = None, threading.Lock()


def _with_foreign(bodies: Mapping[str, tuple[Graph, int]], sm: int, chip: Chip | None) -> dict[str, tuple[Any, int]]:
    """`bodies`, with the tactics in place of those that launch kernels which others wrote: this process has their
    sources, and the worker does not. Those whose sources nobody has are left out."""
    wanted: dict[str, tuple[Any, int]] = {}
    for name, (body, first) in bodies.items():
        launch = launch_in(body)
        kernel = None if launch is None else find(launch[1].kernel)
        if launch is None:
            wanted[name] = body, first
        elif kernel is not None:
            arch = arch_of(sm).target.arch
            wanted[name] = tuple(kernel.offers(body, arch if chip is None else replace(arch, chip=chip))), first
    return wanted


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the worker and what it has started."""
    if process.poll() is None and hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


COMPILE_CLIENT = CompileClient()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=COMPILE_CLIENT.abandon)
