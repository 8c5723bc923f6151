"""What all commands share: options, exit status, results as text or JSON, and text from files, which a terminal must
not obey.

A command is a function that returns a `Report`; `command` gives it `--json` and `-v`. The exit status is 0; 1 after an
error, or where the report has a problem; 2 where the command line itself is wrong.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from functools import wraps
from typing import Annotated, Any

import typer

from torch_rtx.errors import RtxError
from torch_rtx.progress import STAGES

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Log what happens; -vv: in detail.")
]


@dataclass(frozen=True)
class Report:
    """What a command found.

    Attributes:
        value: for programs; dataclasses become dictionaries.
        text: for people; the value, where it is a text itself.
        problem: what is wrong although the command did its work; the exit status is 1 then.
    """

    value: Any
    text: object
    problem: str | None = None


def command(function: Callable[..., Report]) -> Callable[..., None]:
    """`function` as a command of typer: with the options that all commands have, it prints its report, and errors in
    one line."""

    @wraps(function)
    def called(as_json: bool, verbose: int, **given: Any) -> None:
        log_to_stderr(verbose)
        with errors(), _stages_shown():
            report = function(**given)
            if as_json:
                echo_json(report.value)
            elif str(report.text):
                echo(str(report.text).removesuffix("\n"))
        if report.problem is not None:
            echo(f"error: {report.problem}", problem=True)
            raise typer.Exit(1)

    keyword = inspect.Parameter.KEYWORD_ONLY
    own = inspect.signature(function, eval_str=True).parameters.values()
    common = (
        inspect.Parameter("as_json", keyword, default=False, annotation=AsJson),
        inspect.Parameter("verbose", keyword, default=0, annotation=Verbose),
    )
    parameters = [*own, *common]
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def log_to_stderr(verbose: int) -> None:
    """Show the messages of torch_rtx from level INFO, or for 2 and more from DEBUG."""
    if verbose:
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("torch_rtx").setLevel(logging.DEBUG if verbose > 1 else logging.INFO)


class _Stages(logging.Handler):
    """Prints one line for each message, with the seconds since the command began."""

    def __init__(self) -> None:
        super().__init__()
        self.start = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        echo(f"[{time.monotonic() - self.start:6.1f} s] {record.getMessage()}", to_stderr=True)


@contextmanager
def _stages_shown() -> Iterator[None]:
    log = logging.getLogger(STAGES)
    if log.isEnabledFor(logging.INFO):  # as -v and TORCH_LOGS show all messages
        yield
        return
    handler = _Stages()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.propagate = True
        log.setLevel(logging.NOTSET)
        log.removeHandler(handler)


def escaped(text: str) -> str:
    """`text` with escapes in place of all that a terminal would act on or can't show: control characters, marks that
    change the direction of text, halves of surrogate pairs. Line ends and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


def echo(value: object, end: str = "\n", *, problem: bool = False, to_stderr: bool = False) -> None:
    """Print `str(value)` to stdout, escaped; to stderr a problem, in red, and what is no result."""
    to_stderr = to_stderr or problem
    stream = sys.stderr if to_stderr else sys.stdout
    encoding = stream.encoding or "utf-8"
    text = escaped(str(value)).encode(encoding, "backslashreplace").decode(encoding)
    typer.secho(text + end, nl=False, err=to_stderr, fg="red" if problem else None)


def echo_json(value: object) -> None:
    """Print a value as JSON, which has no names for infinity and NaN: they become strings."""
    text = json.dumps(value, default=_plain)
    echo(json.dumps(json.loads(text, parse_constant=str), indent=1))


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


@contextmanager
def errors() -> Iterator[None]:
    """Print errors as one line and exit with status 1."""
    try:
        yield
    except BrokenPipeError:
        raise  # nobody reads on, as in `torch-rtx inspect model.rtx | head`
    except (RtxError, OSError) as error:
        echo(f"error: {error}", problem=True)
        raise typer.Exit(1) from None
