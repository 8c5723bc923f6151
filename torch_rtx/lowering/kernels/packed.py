"""Second operands of products that are packed in integers: how kernels unpack them with few instructions.

Values of 4 bits lie in words of 32: for each run of `8 * h` values of K there are h words, and bits 4*i to 4*i+3 of
word r hold value `i*h + r` of the run:

    codes = words.view(N, K/(8*h), 1, h) >> arange(0, 32, 4).view(8, 1) & 15        view(N, K)

So a tile of words makes 8 tiles of the operand, of which each is a range of K: no word is read twice, and no value
moves between threads. An integer becomes a float without a conversion, which runs at a quarter of the rate: as bits of
the mantissa of a number, which is subtracted. Two values of a word are done at once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from torch_rtx.dtypes import INTS, highest, lowest
from torch_rtx.lowering.kernels.emit import Emitter, Operand
from torch_rtx.lowering.kernels.expressions import Apply, Arg, Expression, operations
from torch_rtx.lowering.kernels.index import Index, constant, substitute, variable
from torch_rtx.lowering.kernels.kernel_ir import Const, Iota, Load, Pointwise, Position, Tensor, View
from torch_rtx.lowering.kernels.triton_ops import template, tl_dtype

BITS, PARTS = 4, 8  # of a value, and values of a word
MASK = (1 << BITS) - 1
RUNS = (32, 16)  # words of a run, best first: a kernel reads as many values of the other operand at once
WORD = "word"


class Magic(NamedTuple):
    """What an integer of 4 bits is combined with to be a float: the number that it is added to, the bits of that number
    in both halves of a word, and the bit of the mantissa that counts 1. Of f16 the number is small, so that sums that
    have it in them stay exact; of bf16 the first bits need no shift."""

    number: float
    bits: int
    one: int


MAGIC = {"f16": Magic(16.0, 0x4C004C00, 6), "bf16": Magic(128.0, 0x43004300, 0)}
# As a half: what a byte is combined with to be the last bits of 2**10 plus a number, and what is subtracted. Hardware
# converts to f16 at a quarter of the rate; for bf16 Triton has a way of its own.
BYTES = {"i8": (0x6480, 1024.0 + 128), "u8": (0x6400, 1024.0)}
SINGLE = ["add"], ["sub"], ["mul"]  # operations that round once, as the calls do


class Nibble(NamedTuple):
    """4 bits of a word and a number: the word's tensor, the position in it, the first bit, and what is added."""

    words: Tensor
    position: Position
    bit: Index
    added: int


def nibble(tensor: Tensor, position: Position) -> Nibble | None:
    """What `tensor` is at `position` if that is `(words >> bit & 15) + added`."""
    both, position, held = _bare(tensor, position)
    added = 0
    match both:
        case Pointwise(expression=Apply("add", (Arg(0), Arg(1))), args=(inner, Const(value=int() as added))):
            held.append(both.dtype)
            both, position, _ = _bare(inner, position)
    if not isinstance(both, Pointwise) or not _is(both, "and"):
        return None
    (shifted, at, _), (mask, *_) = (_bare(one, position) for one in both.args)
    if not isinstance(shifted, Pointwise) or not _is(shifted, "shr") or not isinstance(mask, Const):
        return None
    words, (by, at_by, _) = shifted.args[0], _bare(shifted.args[1], at)
    if mask.value != MASK or words.dtype != "i32" or not isinstance(by, Iota):
        return None
    fits = all(lowest(dtype) <= added and added + MASK <= highest(dtype) for dtype in held)
    return Nibble(words, at, by.at(at_by), added) if fits else None


def _bare(tensor: Tensor, position: Position) -> tuple[Tensor, Position, list[str]]:
    """What `tensor` at `position` is behind views and casts of integers, and the dtypes of these casts."""
    dtypes: list[str] = []
    while True:
        match tensor:
            case View():
                position = tensor.at(position)
                tensor = tensor.source
            case Pointwise(expression=Apply("cast", (Arg(0),)), args=(inner,)) if {tensor.dtype, inner.dtype} <= {
                *INTS
            }:
                dtypes.append(tensor.dtype)
                tensor = inner
            case _:
                return tensor, position, dtypes


def _is(tensor: Pointwise, op: str) -> bool:
    match tensor.expression:
        case Apply(found, (Arg(0), Arg(1))):
            return found == op
    return False


def k_of(word: Index, run: int, part: Index) -> Index:
    """K of value number `part` in a word that is number `word` of those along K."""
    size = constant(run)
    return word // size * constant(PARTS * run) + part * size + word % size


def packed_run(tensor: Tensor, position: Position, k: str, depth: int) -> int:
    """The words of a run, h, of `tensor` at `position`, where the variable `k` of `depth` is K; 0 if it is not packed,
    or not in such runs."""
    found = next(_nibbles(tensor, position), None)
    if found is None:
        return 0
    for run in RUNS:
        words = variable(WORD, constant(depth // PARTS))
        bits = (substitute(found.bit, {k: k_of(words, run, constant(part))}) for part in range(PARTS))
        if depth % (PARTS * run) == 0 and list(bits) == [constant(BITS * part) for part in range(PARTS)]:
            return run
    return 0


def _nibbles(tensor: Tensor, position: Position) -> Iterator[Nibble]:
    """All that `tensor` at `position` is computed from."""
    if (found := nibble(tensor, position)) is not None:
        yield found
    elif isinstance(tensor, View):
        yield from _nibbles(tensor.source, tensor.at(position))
    elif isinstance(tensor, Pointwise):
        for arg in tensor.args:
            if len(arg.shape) == len(position):
                yield from _nibbles(arg, position)


def fits_halves(tensor: Tensor, position: Position, dtype: str) -> bool:
    """Whether `in_halves` computes `tensor` at `position`."""
    match tensor:
        case View():
            return fits_halves(tensor.source, tensor.at(position), dtype)
        case Load():
            return tensor.dtype == dtype and not tensor.anchor
        case Const():
            return _is_exact(tensor.value, dtype)
        case Pointwise(args=(source,)) if tensor.dtype == dtype and is_cast(tensor.expression):
            return source.dtype in ("f32", "i8", "u8") or _known(source, position, dtype) is not None
        case Pointwise() if {tensor.dtype, *(arg.dtype for arg in tensor.args)} == {dtype}:
            is_single = [*operations(tensor.expression)] in SINGLE
            return is_single and all(fits_halves(arg, position, dtype) for arg in tensor.args)
    return False


def in_halves(emitter: Emitter, tensor: Tensor, position: Position, dtype: str) -> Operand:
    """The tile of `tensor`, of the half precision `dtype`, computed in this dtype, two values at once; each operation
    rounds as the call that it stands for."""
    match tensor:
        case View():
            return in_halves(emitter, tensor.source, tensor.at(position), dtype)
        case Load():
            return emitter.memory(tensor, position, (), dtype)
        case Pointwise(args=(source,)) if is_cast(tensor.expression):
            found = _known(source, position, dtype)
            if found is not None:
                return _as_float(emitter, found, dtype)
            value = emitter.value(source, position)
            if dtype == "f16" and source.dtype in BYTES:
                xor, number = BYTES[source.dtype]
                bits = f"(({value.text}.to(tl.int16) & 0xFF) ^ {xor:#x})"
                return emitter.named(f"{bits}.to(tl.float16, bitcast=True) - {number}", value.axes)
            return emitter.named(f"{value.text}.to({tl_dtype(dtype)})", value.axes)
        case Pointwise():
            args = [in_halves(emitter, arg, position, dtype) for arg in tensor.args]
            text = template(tensor.expression, [dtype] * len(args)).format(*(arg.text for arg in args))
            return emitter.named(text, frozenset[str]().union(*(arg.axes for arg in args)))
    return emitter.value(tensor, position)


def _known(tensor: Tensor, position: Position, dtype: str) -> Nibble | None:
    """The 4 bits that `tensor` is at `position`, if their place in the word is known, and `dtype` has what they are
    subtracted from."""
    found = nibble(tensor, position)
    if found is None or found.bit.number is None or not _is_exact(MAGIC[dtype].number - found.added, dtype):
        return None
    return found


def _as_float(emitter: Emitter, found: Nibble, dtype: str) -> Operand:
    word = _with_magic(emitter, found, dtype)
    return emitter.named(f"{word.text} - {MAGIC[dtype].number - found.added}", word.axes)


def _with_magic(emitter: Emitter, found: Nibble, dtype: str) -> Operand:
    """The 4 bits as floats plus MAGIC."""
    magic, bit = MAGIC[dtype], found.bit.number or 0
    word, by = emitter.value(found.words, found.position), bit % 16 - magic.one
    shifted = f"({word.text} {'>>' if by >= 0 else '<<'} {abs(by)})"
    mask = (MASK << 16 | MASK) << magic.one
    pair = emitter.named(f"{shifted} & 0x{mask:08X} | {magic.bits:#x}", word.axes)
    half = f"({pair.text} >> 16)" if bit >= 16 else pair.text
    return Operand(f"{half}.to(tl.int16).to({tl_dtype(dtype)}, bitcast=True)", word.axes)


def with_magic(emitter: Emitter, tensor: Tensor, position: Position, dtype: str) -> tuple[Operand, float] | None:
    """The elements of `tensor`, a cast of 4 bits to `dtype`, plus a number, and that number; None if it is no such
    cast."""
    if not isinstance(tensor, Pointwise) or not is_cast(tensor.expression):
        return None
    found = _known(tensor.args[0], position, dtype)
    return found and (_with_magic(emitter, found, dtype), MAGIC[dtype].number - found.added)


def _is_exact(number: object, dtype: str) -> bool:
    """Whether `dtype` has this number."""
    if not isinstance(number, int | float) or abs(number) > 65504:
        return False
    if dtype == "f16":
        return bool(struct.unpack("e", struct.pack("e", number))[0] == number)
    (bits,) = struct.unpack("I", struct.pack("f", number))
    return bits & 0xFFFF == 0 and bool(struct.unpack("f", struct.pack("f", number))[0] == number)


def is_cast(expression: Expression) -> bool:
    """Whether `expression` is its argument in another dtype."""
    match expression:
        case Apply("cast", (Arg(0),)) | Apply("round_to", (Apply("cast", (Arg(0),)) | Arg(0),)):
            return True
    return False
