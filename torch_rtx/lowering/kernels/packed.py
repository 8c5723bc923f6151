"""Second operands of products that are packed in integers: how kernels unpack them with few instructions.

Values of 4 bits lie in words of 32: for each run of `8 * h` values of K there are h words, and bits 4*i to 4*i+3 of
word r hold value `i*h + r` of the run:

    codes = words.view(N, K/(8*h), 1, h) >> arange(0, 32, 4).view(8, 1) & 15        view(N, K)

So a tile of words makes 8 tiles of the operand, of which each is a range of K: no word is read twice, and no value
moves between threads. An integer becomes a float without a conversion, which runs at a quarter of the rate: as the last
bits of the mantissa of a number whose last bit counts 1, from which that number is subtracted. Two values of a word are
done at once.
"""

from __future__ import annotations

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
# The number 2**n whose last bit counts 1, and its bits in both halves of a word.
MAGIC = {"f16": (1024.0, 0x64006400), "bf16": (128.0, 0x43004300)}
EXACT = frozenset({"add", "sub", "mul"})  # the tensor's own dtype rounds these as PyTorch does


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


def k_of(word: Index, run: int, part: int) -> Index:
    """K of value number `part` in a word that is number `word` of those along K."""
    size = constant(run)
    return word // size * constant(PARTS * run) + constant(part * run) + word % size


def packed_run(tensor: Tensor, position: Position, k: str, depth: int) -> int:
    """The words of a run, h, of `tensor` at `position`, where the variable `k` of `depth` is K; 0 if it is not packed,
    or not in such runs."""
    found = next(_nibbles(tensor, position), None)
    if found is None:
        return 0
    for run in RUNS:
        words = variable(WORD, constant(depth // PARTS))
        bits = (substitute(found.bit, {k: k_of(words, run, part)}) for part in range(PARTS))
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


def as_float(emitter: Emitter, found: Nibble, dtype: str) -> Operand | None:
    """The integer as a float, in registers of f16 or bf16; None if its place in the word is not known."""
    bit = found.bit.number
    if bit is None:
        return None
    number, bits = MAGIC[dtype]
    word = emitter.value(found.words, found.position)
    pair = emitter.named(f"({word.text} >> {bit % 16}) & 0x000F000F | {bits:#x}", word.axes)
    half = f"({pair.text} >> 16)" if bit >= 16 else pair.text
    return emitter.named(f"{half}.to(tl.int16).to({tl_dtype(dtype)}, bitcast=True) - {number - found.added}", word.axes)


def in_halves(emitter: Emitter, tensor: Tensor, position: Position, dtype: str) -> Operand | None:
    """The tile of `tensor`, of the half precision `dtype`, computed in this dtype, two values at once; each operation
    rounds as the call that it stands for. None if that is not all it takes."""
    match tensor:
        case View():
            return in_halves(emitter, tensor.source, tensor.at(position), dtype)
        case Load(anchor=False) if tensor.dtype == dtype:
            return emitter.memory(tensor, position, (), dtype)
        case Pointwise(args=(source,)) if tensor.dtype == dtype and _is_cast(tensor.expression):
            return _rounded(emitter, source, position, dtype)
        case Pointwise() if {tensor.dtype, *(arg.dtype for arg in tensor.args)} == {dtype}:
            if not EXACT.issuperset(operations(tensor.expression)):
                return None
            args = []
            for arg in tensor.args:
                is_number = isinstance(arg, Const)
                found = emitter.value(arg, position) if is_number else in_halves(emitter, arg, position, dtype)
                if found is None:
                    return None
                args.append(found)
            text = template(tensor.expression, [dtype] * len(args)).format(*(arg.text for arg in args))
            return emitter.named(text, frozenset[str]().union(*(arg.axes for arg in args)))
    return None


def _is_cast(expression: Expression) -> bool:
    match expression:
        case Apply("cast", (Arg(0),)) | Apply("round_to", (Apply("cast", (Arg(0),)) | Arg(0),)):
            return True
    return False


def _rounded(emitter: Emitter, source: Tensor, position: Position, dtype: str) -> Operand | None:
    """`source` rounded to `dtype`."""
    found = nibble(source, position)
    value = None if found is None else as_float(emitter, found, dtype)
    if value is not None:
        return value
    if source.dtype not in ("f32", "i8", "u8"):
        return None
    value = emitter.value(source, position)
    return emitter.named(f"{value.text}.to({tl_dtype(dtype)})", value.axes)
