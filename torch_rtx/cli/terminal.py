"""What the command line prints: errors in one line, and text from files, which a terminal must not obey."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from torch_rtx.errors import RtxError


def escaped(text: str) -> str:
    """`text` with escapes in place of all that a terminal would act on or can't show: control characters, marks that
    change the direction of text, halves of surrogate pairs. Line ends and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


def echo(value: object, end: str = "\n", *, problem: bool = False) -> None:
    """Print `str(value)` to stdout, escaped; a problem in red to stderr."""
    stream = sys.stderr if problem else sys.stdout
    encoding = stream.encoding or "utf-8"
    text = escaped(str(value)).encode(encoding, "backslashreplace").decode(encoding)
    typer.secho(text + end, nl=False, err=problem, fg="red" if problem else None)


def echo_json(value: object) -> None:
    """Print a value as JSON, which has no names for infinity and NaN: they become strings."""
    text = json.dumps(value)
    echo(json.dumps(json.loads(text, parse_constant=str), indent=1))


@contextmanager
def errors() -> Iterator[None]:
    """Print errors as one line and exit with status 1."""
    try:
        yield
    except (RtxError, OSError) as error:
        echo(f"error: {error}", problem=True)
        raise typer.Exit(1) from None
