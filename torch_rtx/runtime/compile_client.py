"""The client of the compile worker: it starts the process that compiles kernels, and asks it."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch_rtx.artefacts import Artefacts
from torch_rtx.errors import KernelError
from torch_rtx.ir import Graph
from torch_rtx.tactics import Candidate

NONE = Artefacts()
LIMIT = 600.0  # seconds for a request: a compiler that hangs holds up all that comes after it
# What the process runs, with this very package wherever it is.
# What is found here is found there, and nothing of the folder that the program happens to run in. Ctrl-C in a terminal
# or a notebook reaches every process of a group; this one ends with its input.
MAIN = """\
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = sys.argv[1:]
from torch_rtx.lowering.kernels.compile_worker import main
main()
"""


class CompileClient:
    """A process of its own that compiles kernels. It starts with the first request and ends with this process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._stopped = False

    def build(
        self, bodies: Mapping[str, tuple[Graph, int]], sm: int, artefacts: Artefacts = NONE
    ) -> dict[str, Candidate]:
        """What `compile_worker.build` returns. One thread at a time.

        Raises:
            KernelError: kernels can't be compiled here; it says why.
        """
        found: dict[str, Candidate] = self._ask((bodies, sm, artefacts))
        return found

    def _ask(self, request: tuple[Mapping[str, tuple[Graph, int]], int, Artefacts]) -> Any:
        with self._lock:
            timer: threading.Timer | None = None
            try:
                process = self._running()
                timer = threading.Timer(LIMIT, process.kill)
                timer.daemon = True
                timer.start()
                assert process.stdin is not None
                assert process.stdout is not None
                pickle.dump(request, process.stdin)
                process.stdin.flush()
                answer = pickle.load(process.stdout)
            except (OSError, EOFError, pickle.UnpicklingError) as error:
                self.close()
                late = timer is not None and not timer.is_alive()
                why = f"took more than {LIMIT:g} s" if late else f"ended: {type(error).__name__} {error}"
                raise KernelError(f"the process that compiles kernels {why}") from None
            except BaseException:  # Ctrl-C: its answer would be taken for that of the next request
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
                raise OSError("this program is its own Python, which can't be started once more")
            command = [sys.executable, "-P", "-c", MAIN, *sys.path, str(Path(__file__).parents[2])]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self._process

    def stop(self) -> None:
        """As `close`, and for ever: this process ends."""
        self._stopped = True
        self.close()

    def close(self) -> None:
        """End the process; whoever waits for it gets an error, and a later request starts another."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()
        self._process = None


COMPILE_CLIENT = CompileClient()
