"""Where `torch-rtx` and `python -m torch_rtx` begin: the packages that a command line needs, and flags of trtexec."""

from __future__ import annotations

import atexit
import gc
import sys


def main() -> None:
    """Run the command line of this process, and end it with the exit status 0, 1 or 2."""
    atexit.register(gc.freeze)  # at its end, Python would look for garbage among all objects of PyTorch: for a second
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        sys.exit(f"error: the command line needs {error.name}, which is not installed\n  pip install 'torch_rtx[cli]'")
    from torch_rtx.cli.app import app
    from torch_rtx.cli.terminal import echo
    from torch_rtx.cli.trtexec import translated
    from torch_rtx.errors import SettingsError

    program = "python -m torch_rtx" if sys.argv[0].endswith("__main__.py") else "torch-rtx"
    try:
        lines, notes = translated(sys.argv[1:])
    except SettingsError as error:
        echo(f"error: {error}", problem=True)
        sys.exit(2)
    for note in notes:
        echo(note, to_stderr=True)
    for line in lines:
        try:
            app(line, prog_name=program)
        except SystemExit as ended:
            if ended.code:
                raise
