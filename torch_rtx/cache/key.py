"""Cache keys: everything that an engine depends on, as named parts that can be compared.

A part is a digest of its content and a text for people, in lines `name: value`. The text of a small part (settings,
versions, inputs) is its content; that of a large one (the graph) is a summary. The digest of a key covers the names and
digests of its parts alone. The part `kind` tells keys of engines from keys of captures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

DIGEST_BYTES = 20
SHOWN = 4  # printed lines per part that differs


def digest(content: str | bytes) -> str:
    """The digest of a part's content, as hexadecimal digits."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


class Part:
    """A part of a key: the digest of its content, and a text for people."""

    __slots__ = ("_text", "digest")

    def __init__(self, digest: str, text: str | Callable[[], str]) -> None:
        self.digest, self._text = digest, text

    @staticmethod
    def of(text: str | Callable[[], str], content: str | bytes | None = None) -> Part:
        """A part with this `content`; None: the text is the content. A callable text is evaluated on first use."""
        if content is None:
            assert isinstance(text, str)
            content = text
        return Part(digest(content), text)

    @property
    def text(self) -> str:
        """Lines `name: value`."""
        if not isinstance(self._text, str):
            self._text = self._text()
        return self._text


@dataclass(frozen=True)
class Key:
    """An ordered mapping of parts."""

    parts: Mapping[str, Part]

    @cached_property
    def digest(self) -> str:
        """The name of the key, independent of the order of its parts."""
        return digest("".join(f"{name}={part.digest}\n" for name, part in sorted(self.parts.items())))

    @property
    def kind(self) -> str:
        """The kind of entry: `engine` or `capture`."""
        return self.parts["kind"].text if "kind" in self.parts else "unknown"

    def differing(self, other: Key) -> list[str]:
        """The names of the parts that differ between the keys."""
        names = [*self.parts, *(name for name in other.parts if name not in self.parts)]
        return [name for name in names if _digest_of(self, name) != _digest_of(other, name)]

    def why(self, other: Key) -> list[str]:
        """One line per part that differs: names, the values of this key, an arrow, the values of `other`."""
        return [f"{name}: {_compare(_lines(self, name), _lines(other, name))}" for name in self.differing(other)]


def _compare(here: dict[str, str], there: dict[str, str]) -> str:
    labels = [label for label in {**here, **there} if here.get(label) != there.get(label)]
    if not labels:
        return "equal summaries, different content"
    shown = [f"{label} {here.get(label, 'none')} -> {there.get(label, 'none')}" for label in labels[:SHOWN]]
    return "; ".join(shown) + (f"; and {len(labels) - SHOWN} more" if len(labels) > SHOWN else "")


def _digest_of(key: Key, name: str) -> str | None:
    part = key.parts.get(name)
    return None if part is None else part.digest


def _lines(key: Key, name: str) -> dict[str, str]:
    part = key.parts.get(name)
    pairs = (line.partition(": ") for line in part.text.splitlines()) if part else ()
    return {label: value for label, _, value in pairs}
