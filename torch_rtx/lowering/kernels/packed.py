"""Second operands of products that are packed in integers: how kernels unpack them with few instructions.

Values of b bits, 4 or 8, lie in words of 32, of which each half has `parts = 16 / b`. For each run of `2 * h * parts`
values of K there are h words, and bits b*i to b*i+b-1 of the lower half of word r hold value `i*2*h + 2*r` of the run,
the same bits of the upper half the next value:

    at = arange(0, 32, b).view(2, parts).t().view(parts, 1, 2)
    codes = words.view(N, K/(2*h*parts), 1, h, 1) >> at & (2**b - 1)                view(N, K)

So a tile of words makes `parts` tiles of the operand, of which each is a range of K: no word is read twice. The values
of both halves are neighbours along K, as in a register of an operand of tensor cores: none moves, neither between
threads nor between registers. An integer becomes a float without a conversion, which runs at a quarter of the rate: as
bits of the mantissa of a number, which is subtracted. Both halves of a word are done at once.
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

HALVES_OF_WORD, BITS_OF_HALF = 2, 16
SIZES = (4, 8)  # bits of a value
RUNS = (32, 16)  # words of a run, best first: a kernel reads twice as many values of the other operand at once
WORD = "word"


class Packing(NamedTuple):
    """Values of `bits` bits in runs of `run` words."""

    bits: int
    run: int

    @property
    def parts(self) -> int:
        """Ranges of K in a run."""
        return BITS_OF_HALF // self.bits

    @property
    def values(self) -> int:
        """Values of a word."""
        return HALVES_OF_WORD * self.parts

    @property
    def depth(self) -> int:
        """Values of a run."""
        return self.values * self.run

    def bit(self, part: int, half: int) -> int:
        """The first bit of a value in its word."""
        return self.bits * part + BITS_OF_HALF * half

    def of_word(self, word: Index, part: int, half: int) -> Index:
        """K of a value in the word that is number `word` of those along K."""
        run, width = constant(self.run), constant(HALVES_OF_WORD)
        within = word % run * width + constant(half)
        return word // run * constant(self.depth) + constant(part) * run * width + within

    def of_value(self, value: Index, part: Index) -> Index:
        """K of a value that is number `value` of those of a part."""
        size = constant(HALVES_OF_WORD * self.run)
        return value // size * constant(self.depth) + part * size + value % size


class Magic(NamedTuple):
    """What integers are combined with to be floats: the number that they are added to, the bits of that number in both
    halves of a word, and the bit of the mantissa that counts 1. Of 4 bits in f16 the number is small, so that sums that
    have it in them stay exact; of bf16 the first bits need no shift."""

    number: float
    bits: int
    one: int


MAGIC = {
    (4, "f16"): Magic(16.0, 0x4C004C00, 6),
    (4, "bf16"): Magic(128.0, 0x43004300, 0),
    (8, "f16"): Magic(1024.0, 0x64006400, 0),
}
# A mantissa of bf16 has no place for 8 bits: 7 are added to 128, and of the last one comes what is subtracted, 256 or
# 128. The difference is the byte minus 128.
LOW_BITS, LAST_BIT = "& 0x7F007F | 0x43004300", "& 0x800080 ^ 0x43804380"
# As a half: what a byte is combined with to be the last bits of 2**10 plus a number, and what is subtracted. Hardware
# converts to f16 at a quarter of the rate; for bf16 Triton has a way of its own.
BYTES = {"i8": (0x6480, 1024.0 + 128), "u8": (0x6400, 1024.0)}
SINGLE = ["add"], ["sub"], ["mul"]  # operations that round once, as the calls do


class Code(NamedTuple):
    """An integer in a word and a number: the word's tensor, the position in it, the integer's first bit and how many it
    has, and what is added."""

    words: Tensor
    position: Position
    bit: Index
    bits: int
    added: int


def code(tensor: Tensor, position: Position) -> Code | None:
    """What `tensor` is at `position` if that is `(words >> bit & mask) + added`, with a mask for 4 or 8 bits."""
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
    bits = next((bits for bits in SIZES if mask.value == mask_of(bits)), 0)
    if not bits or words.dtype != "i32" or not isinstance(by, Iota):
        return None
    fits = all(lowest(dtype) <= added and added + mask_of(bits) <= highest(dtype) for dtype in held)
    return Code(words, at, by.at(at_by), bits, added) if fits else None


def mask_of(bits: int) -> int:
    """The largest integer of so many bits."""
    return (1 << bits) - 1


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


def packing_of(tensor: Tensor, position: Position, k: str, depth: int) -> Packing | None:
    """How `tensor` at `position`, where the variable `k` of `depth` is K, is packed; None if it is not, or in another
    way."""
    found = next(_codes(tensor, position), None)
    if found is None:
        return None
    for run in RUNS:
        packing = Packing(found.bits, run)
        words = variable(WORD, constant(depth // packing.values))
        places = [(part, half) for part in range(packing.parts) for half in range(HALVES_OF_WORD)]
        bits = [substitute(found.bit, {k: packing.of_word(words, *place)}) for place in places]
        if depth % packing.depth == 0 and bits == [constant(packing.bit(*place)) for place in places]:
            return packing
    return None


def _codes(tensor: Tensor, position: Position) -> Iterator[Code]:
    """All that `tensor` at `position` is computed from."""
    if (found := code(tensor, position)) is not None:
        yield found
    elif isinstance(tensor, View):
        yield from _codes(tensor.source, tensor.at(position))
    elif isinstance(tensor, Pointwise):
        for arg in tensor.args:
            if len(arg.shape) == len(position):
                yield from _codes(arg, position)


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


def _known(tensor: Tensor, position: Position, dtype: str) -> Code | None:
    """The integer in a word that `tensor` is at `position`, if its place is known, and `dtype` has all numbers on the
    way from there."""
    found = code(tensor, position)
    if found is None or found.bit.number is None:
        return None
    magic = MAGIC.get((found.bits, dtype))
    fits = -256 <= found.added <= 1 if magic is None else _is_exact(magic.number - found.added, dtype)
    return found if fits else None


def _as_float(emitter: Emitter, found: Code, dtype: str) -> Operand:
    magic = MAGIC.get((found.bits, dtype))
    if magic is not None:
        word = _with_magic(emitter, found, dtype)
        return emitter.named(f"{word.text} - {magic.number - found.added}", word.axes)
    low, last = (_half(emitter, found, bits, dtype) for bits in (LOW_BITS, LAST_BIT))
    more = f" + {found.added + 128.0}" if found.added != -128 else ""
    return emitter.named(f"{low.text} - {last.text}{more}", low.axes)


def _with_magic(emitter: Emitter, found: Code, dtype: str) -> Operand:
    """The integer as a float plus MAGIC."""
    magic = MAGIC[found.bits, dtype]
    mask = (mask_of(found.bits) << BITS_OF_HALF | mask_of(found.bits)) << magic.one
    return _half(emitter, found, f"& 0x{mask:08X} | {magic.bits:#x}", dtype, magic.one)


def _half(emitter: Emitter, found: Code, bits: str, dtype: str, one: int = 0) -> Operand:
    """The half of a word that has the integer, shifted to where the bit number `one` counts 1, and with `bits`."""
    bit = found.bit.number or 0
    word, by = emitter.value(found.words, found.position), bit % BITS_OF_HALF - one
    shifted = f"({word.text} {'>>' if by >= 0 else '<<'} {abs(by)})"
    pair = emitter.named(f"{shifted} {bits}", word.axes)
    half = f"({pair.text} >> {BITS_OF_HALF})" if bit >= BITS_OF_HALF else pair.text
    return Operand(f"{half}.to(tl.int16).to({tl_dtype(dtype)}, bitcast=True)", word.axes)


def with_magic(emitter: Emitter, tensor: Tensor, position: Position, dtype: str) -> tuple[Operand, float] | None:
    """The elements of `tensor`, a cast of integers of 4 bits to `dtype`, plus a number, and that number; None if it is
    no such cast. Sums with the larger numbers of 8 bits would lose digits."""
    if not isinstance(tensor, Pointwise) or not is_cast(tensor.expression):
        return None
    found = _known(tensor.args[0], position, dtype)
    if found is None or found.bits != SIZES[0]:
        return None
    return _with_magic(emitter, found, dtype), MAGIC[found.bits, dtype].number - found.added


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
