"""The client of the compile worker: starts the process and sends it requests."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from torch_rtx.artefacts import NO_FILES, Artefacts
from torch_rtx.errors import KernelError
from torch_rtx.ir import Graph
from torch_rtx.tactics import Candidate

TIMEOUT_S = 600.0  # of a request: a compiler that hangs would block all later ones
# The program of the worker. Its `sys.path` is ours; `-P` keeps the current folder out. It ignores Ctrl-C, which a
# terminal sends to all processes of a group, and ends when its input ends.
MAIN = """\
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = sys.argv[1:]
from torch_rtx.lowering.kernels.compile_worker import main
main()
"""


class CompileClient:
    """A worker process that compiles kernels: starts with the first request and ends with this process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._stopped = False

    def build(
        self, bodies: Mapping[str, tuple[Graph, int]], sm: int, artefacts: Artefacts = NO_FILES
    ) -> dict[str, Candidate]:
        """Send a request to `compile_worker.build`; requests of several threads run one after another.

        Raises:
            KernelError: the worker can't be started, ended, timed out, or can't compile kernels.
        """
        with self._lock:
            timer: threading.Timer | None = None
            try:
                process = self._running()
                timer = threading.Timer(TIMEOUT_S, process.kill)
                timer.daemon = True
                timer.start()
                assert process.stdin is not None
                assert process.stdout is not None
                pickle.dump((bodies, sm, artefacts), process.stdin)
                process.stdin.flush()
                answer: dict[str, Candidate] | str = pickle.load(process.stdout)
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
        if isinstance(answer, str):
            raise KernelError(answer)
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            if self._stopped:
                raise OSError("the program ends")
            if find_spec("triton") is None:
                raise OSError("the package triton is not installed")
            if getattr(sys, "frozen", False) or not sys.executable:
                raise OSError("no Python interpreter can be started: this program is frozen")
            command = [sys.executable, "-P", "-c", MAIN, *sys.path, str(Path(__file__).parents[2])]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self._process

    def stop(self) -> None:
        """Close, and refuse later requests: this process is ending."""
        self._stopped = True
        self.close()

    def close(self) -> None:
        """End the worker. A running request gets an error; a later one starts a new worker."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()
        self._process = None


COMPILE_CLIENT = CompileClient()
