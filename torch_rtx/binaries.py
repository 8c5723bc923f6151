"""Binaries of kernels, and the form in which engine files have them.

Kernels are alike, so those for GPUs of one generation are compressed together, as one *pack*, in half the bytes of each
by itself. A reader decompresses the pack of its GPU alone, when a binary of it is first asked for. Neither torch nor
triton is needed.

PTX numbers its registers in the order of their first use, so that no two lines are equal. In a pack, a register has the
difference to the last one of its kind instead: unrolled code repeats itself, and takes half the bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch_rtx.errors import EngineFormatError

MAX_BINARY = 64 << 20  # bytes of a binary or a pack, decompressed; a hostile file can't make a reader allocate more
ELF = b"\x7fELF"  # the start of machine code
FULL = 8 << 20  # bytes with which a writer closes a pack
DICTIONARY = 1 << 20  # bytes back to which LZMA looks for repetitions: more than the code of a few kernels


def digest(data: bytes) -> str:
    """The name of a binary or of a pack: half of the SHA-256 of its bytes."""
    return hashlib.sha256(data).hexdigest()[:32]


def named(binary: bytes) -> tuple[str, bytes]:
    """A binary with its name."""
    return digest(binary), binary


def compress(data: bytes) -> bytes:
    """LZMA: a fifth to a third smaller than zlib. Equal bytes give equal ones."""
    import lzma  # an optional part of Python, which engines without kernels do not need

    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": DICTIONARY}]
    return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=filters)


def decompress(stored: bytes, limit: int = MAX_BINARY) -> bytes:
    """Inverse of `compress`. It takes no more memory than `limit` and as much again.

    Raises:
        EngineFormatError: other bytes, or more than `limit` come out.
    """
    import lzma

    try:
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2 * MAX_BINARY)
        data = decompressor.decompress(stored, limit + 1)  # so that it comes to the end
    except lzma.LZMAError as error:
        raise EngineFormatError(f"it can't be decompressed: {error}") from None
    if not decompressor.eof or decompressor.unused_data or len(data) > limit:
        raise EngineFormatError("what is compressed is too large or has no end")
    return data


_REGISTER = re.compile(rb"%([a-z]{1,8})(\d{1,9})(?!\d)")
_DIFFERENCE = re.compile(rb"%([a-z]{1,8})([+-]\d{1,9})(?!\d)")


def with_differences(text: bytes) -> bytes:
    """PTX with differences in place of the numbers of registers."""
    last: dict[bytes, int] = {}

    def difference(found: re.Match[bytes]) -> bytes:
        kind, number = found[1], int(found[2])
        before, last[kind] = last.get(kind, 0), number
        return b"%%%s%+d" % (kind, number - before)

    return _REGISTER.sub(difference, text)


def with_numbers(text: bytes) -> bytes:
    """Inverse of `with_differences`, of what that returns for PTX."""
    last: dict[bytes, int] = {}

    def number(found: re.Match[bytes]) -> bytes:
        kind = found[1]
        last[kind] = last.get(kind, 0) + int(found[2])
        return b"%%%s%d" % (kind, last[kind])

    return _DIFFERENCE.sub(number, text)


@dataclass(frozen=True)
class Pack:
    """Compressed binaries.

    Attributes:
        stored: their bytes one after the other, compressed.
        sizes: by name, the bytes of each, in order. None: the one binary of a file up to format 6, whose name is the
            digest of `stored`.
        ptx: before they were compressed, registers got differences in place of numbers.
    """

    stored: bytes
    sizes: tuple[tuple[str, int], ...] | None
    ptx: bool = False

    @property
    def key(self) -> str:
        """The name of its tensor in a file."""
        return f"{'ptx' if self.ptx else 'kernel' if self.sizes is None else 'kernels'}/{digest(self.stored)}"

    def names(self) -> tuple[str, ...]:
        """The names of the binaries."""
        return (digest(self.stored),) if self.sizes is None else tuple(name for name, _ in self.sizes)

    def unpacked(self) -> dict[str, bytes]:
        """The binaries by name.

        Raises:
            EngineFormatError: they are not what the names and sizes say.
        """
        if self.sizes is None:
            return {digest(self.stored): decompress(self.stored)}
        total = sum(size for _, size in self.sizes)
        data = with_numbers(decompress(self.stored)) if self.ptx else decompress(self.stored, total)
        found, start = dict[str, bytes](), 0
        for name, size in self.sizes:
            found[name], start = data[start : start + size], start + size
            if digest(found[name]) != name or len(data) != total:
                raise EngineFormatError(f"the binary {name} of a kernel is damaged: its digest is not its name")
        return found


class Binaries(Mapping[str, bytes]):
    """Binaries in packs, by name. Each pack is decompressed once, when a binary of it is asked for.

    Args:
        read: those that are known without, by name.

    Raises:
        EngineFormatError: when a binary of a wrong pack is asked for.
    """

    def __init__(self, packs: Sequence[Pack], read: Mapping[str, bytes] | None = None) -> None:
        self.packs = packs
        self._pack = {name: pack for pack in packs for name in pack.names()}
        self._read = dict(read or {})

    def __getitem__(self, name: str) -> bytes:
        if name not in self._read:
            self._read.update(self._pack[name].unpacked())
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pack)

    def __len__(self) -> int:
        return len(self._pack)


def packs_of(groups: Sequence[Sequence[str]], binaries: Mapping[str, bytes]) -> list[Pack]:
    """The packs of a file: one for the names in each group, and more where that is larger than `FULL`. Those that
    `binaries` has already are taken from there; others are compressed in parallel."""
    contents = list[tuple[str, ...]]()
    for group in groups:
        left, size = list[str](), 0
        for name in group:
            if left and size + len(binaries[name]) > FULL:
                contents.append(tuple(left))
                left, size = [], 0
            left.append(name)
            size += len(binaries[name])
        contents.append(tuple(left))
    known = {pack.names(): pack for pack in binaries.packs} if isinstance(binaries, Binaries) else {}
    missing = [names for names in contents if names not in known]
    with ThreadPoolExecutor(thread_name_prefix="torch_rtx compress") as pool:  # LZMA releases the GIL
        known |= zip(missing, pool.map(lambda names: _pack(names, binaries), missing), strict=True)
    return [known[names] for names in contents]


def _pack(names: Sequence[str], binaries: Mapping[str, bytes]) -> Pack:
    data = b"".join(binaries[name] for name in names)
    sizes = tuple((name, len(binaries[name])) for name in names)
    if not data.startswith(ELF):
        coded = with_differences(data)
        if coded != data and with_numbers(coded) == data:  # not so of a text that has differences already
            return Pack(compress(coded), sizes, ptx=True)
    return Pack(compress(data), sizes)
