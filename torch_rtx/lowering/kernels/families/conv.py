"""Convolutions.

Implicit GEMM (Chetlur et al., 2014): rows are output pixels, columns output channels, and K is the window times the
input channels. The loop over the window is outside of the one over channels, so with channels-last memory each step
reads contiguous channels of a pixel, as in a matrix product. Groups are batches.

Convolutions of int8 are `torch_rtx.int_conv`, which no library has.

Depthwise: with a group per channel there is no contraction over channels; each program sums its window elementwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import ceil, prod

from torch_rtx.chips import MODEL_ERROR, SLOWER
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Dim, Graph, Node, TensorType, Value, contiguous, dim_expr
from torch_rtx.lowering.kernels.body_builder import BodyBuilder, argument, names_in, type_of
from torch_rtx.lowering.kernels.emit import Axis, Emitter, Operand, indent
from torch_rtx.lowering.kernels.expressions import A, B
from torch_rtx.lowering.kernels.families.family import (
    Family,
    Offer,
    added_to,
    around,
    bare,
    library_us,
    splits,
)
from torch_rtx.lowering.kernels.gemm_perf_model import best_num_splits, config_us, gemm_us, ranked_configs
from torch_rtx.lowering.kernels.gemv_template import GemvWriter
from torch_rtx.lowering.kernels.index import Index, constant, from_dim, unravel
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.kernel_ir import (
    ONE,
    ZERO,
    Load,
    Position,
    Select,
    Tensor,
    View,
    cast,
    number,
    pointwise,
)
from torch_rtx.lowering.kernels.matmul_template import (
    FEW_CHANNELS,
    TAPS,
    Contraction,
    GemmConfig,
    KLoop,
    M,
    N,
    TileWriter,
    anchor_result,
    operand,
    stored_load,
)
from torch_rtx.lowering.kernels.memory_model import epilogue_us, prologue_us, streaming_us, typical
from torch_rtx.lowering.kernels.mma_template import MmaWriter
from torch_rtx.lowering.kernels.region import Region, tensor_type
from torch_rtx.lowering.kernels.split import added, split_anchor
from torch_rtx.lowering.kernels.triton_ops import tl_dtype
from torch_rtx.op_work import ANCHORS, INT_CONV
from torch_rtx.targets import Arch

STATIC = "tl.static_range"
# Taps of a depthwise convolution. Unrolled code of 49 is larger than caches of instructions, spills registers, and
# compiles in up to ten seconds, in place of half of one.
UNROLLED = 25


def conv_kernel(region: Region, name: str, config: GemmConfig) -> Kernel:
    """The kernel that computes a region around a convolution.

    Raises:
        Unsupported: another anchor, a convolution that is transposed or has no batch, a dtype that `tl.dot` does not
            multiply, or an epilogue whose indices can't be inverted.
    """
    contraction = conv_contraction(region)
    return _writer(contraction, config)(region, contraction, config).kernel(name)


def conv_configs(region: Region, arch: Arch) -> list[GemmConfig]:
    """Configurations for `arch`, the fastest first.

    Raises:
        Unsupported: see `conv_kernel`, or a dtype that the target does not multiply.
    """
    contraction = conv_contraction(region)
    if is_depthwise(contraction):
        return _depthwise_configs(contraction, arch)
    return ranked_configs(region, contraction, arch)


def _depthwise_configs(contraction: Contraction, arch: Arch) -> list[GemmConfig]:
    """Depthwise convolutions are memory-bound. Tiles span cache lines along the contiguous dimension, and are as large
    as leaves enough programs, since neighbouring pixels share inputs."""
    source = stored_load(contraction.a)
    channels_last = source is None or source.strides[1] == ONE
    pixels, channels = typical(dim_expr("*", contraction.batch, contraction.rows)), typical(contraction.columns)
    found = []
    for block_m, block_n in [(64, 64), (32, 64), (16, 64), (8, 64), (32, 32), (16, 32), (8, 32)]:
        config = GemmConfig(block_m, block_n, 1, 4 if block_m * block_n > 512 else 2, 1)
        found.append(config if channels_last else replace(config, block_m=4 * block_m, block_n=block_n // 4))

    def cost(config: GemmConfig) -> float:
        tiles = max(ceil(pixels / config.block_m) * ceil(channels / config.block_n), 1)  # a batch may be empty
        area = config.block_m * config.block_n
        share = tiles * area * (1 + 128 / area)  # padded work, and a program's overhead
        return share / min(tiles / arch.chip.processors / 4, 1)

    return sorted(found, key=cost)


def _writer(contraction: Contraction, config: GemmConfig) -> type[TileWriter]:
    if is_depthwise(contraction):
        return DepthwiseWriter
    return GemvWriter if config.gemv else MmaWriter


def is_depthwise(contraction: Contraction) -> bool:
    """Each input channel is its own group."""
    return contraction.depth == 1 and contraction.a.shape[1].number != 1


def conv_contraction(region: Region) -> Contraction:
    """The region's convolution as a contraction.

    Raises:
        Unsupported: see `conv_kernel`.
    """
    node, out, type_ = anchor_result(region, "conv")
    source, weight = (tensor_type(argument(node, name)) for name in ("input", "weight"))
    rank, groups = len(weight.shape) - 2, node.arg("groups", 1)
    if node.arg("transposed", False) or len(source.shape) != rank + 2 or not 1 <= rank <= len(TAPS):
        raise Unsupported("a transposed convolution, or one without a batch")
    window, filters = weight.shape[2:], weight.shape[0]
    if not isinstance(groups, int) or not isinstance(filters, int) or not all(isinstance(tap, int) for tap in window):
        raise Unsupported("a convolution whose weight has no static shape")
    stride, padding, dilation = (
        _sizes(node.arg(name, default), rank) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    padded = _padded(region.values[argument(node, "input").name], padding)
    depth, pixels = constant(_number(weight.shape[1])), (type_.shape[0], *type_.shape[2:])
    pixels_shape = tuple(map(from_dim, pixels))
    each = constant(filters // groups)
    depthwise = weight.shape[1] == 1 and groups > 1

    def a_at(z: Index, m: Index, k: Position) -> Position:
        batch, *places = unravel(m, pixels_shape)
        moved = zip(places, k[:-1], stride, dilation, strict=True)
        return (batch, z * depth + k[-1], *(place * s + tap * d for place, tap, s, d in moved))

    def b_at(z: Index, n: Index, k: Position) -> Position:
        return (z * each + n, k[-1], *k[:-1])

    return Contraction(
        out=out,
        axis=1,
        batch=1 if depthwise else groups,
        rows=dim_expr("*", 1, *pixels),
        columns=filters if depthwise else filters // groups,
        grouped=True,
        taps=tuple(map(_number, window)),
        depth=weight.shape[1],
        channels_last=weight.strides[1] == 1,
        a=padded,
        b=region.values[argument(node, "weight").name],
        a_at=a_at,
        b_at=b_at,
        epilogue=_epilogue(region, node, out),
    )


class DepthwiseWriter(TileWriter):
    """A depthwise convolution."""

    def body(self) -> list[str]:
        """Pointers, the loop over the window, and the epilogue."""
        config, contraction = self.config, self.contraction
        emitter = Emitter([Axis(M, config.block_m, self.rows_mask), Axis(N, config.block_n, self.columns_mask)])
        k_loop = KLoop(contraction, 1, flat=False)
        k_loop.enter(emitter, "")
        tap = (*k_loop.at, ZERO)
        channels = contraction.a.shape[1].number
        assert isinstance(contraction.columns, int)
        assert channels is not None
        group = self.n // constant(contraction.columns // channels)
        pixel = operand(emitter, contraction.a, contraction.a_at(group, self.m, tap), self.sums, full_tile=False)
        weight = operand(emitter, contraction.b, contraction.b_at(ZERO, self.n, tap), self.sums, full_tile=False)
        total = Operand("acc0", frozenset((M, N)))
        before = [*emitter.outer.lines, f"{total.text} = tl.zeros({emitter.shape(total.axes)}, {tl_dtype(self.sums)})"]
        sums = [*emitter.inner(), f"{total.text} += {pixel} * {weight}"]
        # Unrolled, so that all loads of a window are in flight at once, or of a row where that is enough of them.
        rows = len(contraction.taps) > 1 and prod(contraction.taps) > UNROLLED
        lines = [*before, *_row_by_row(contraction.taps, sums)] if rows else k_loop.loop(before, [], sums, STATIC)
        emitter.outer.lines = []
        self.write_epilogue(emitter, [total])
        return lines + emitter.outer.lines


def _row_by_row(taps: tuple[int, ...], inside: list[str]) -> list[str]:
    """A loop for each dimension of a window, of which the last one is unrolled."""
    names = TAPS[len(TAPS) - len(taps) :]
    for name, tap in reversed(list(zip(names, taps, strict=True))):
        steps = STATIC if name == TAPS[-1] else "range"
        inside = [f"for {name} in {steps}(0, {tap}):", *indent(inside)]
    return inside


def _number(dim: Dim) -> int:
    assert isinstance(dim, int)
    return dim


def _sizes(given: Attr, rank: int) -> list[Index]:
    """An argument that is one number, or one per dimension."""
    found = list(given) if isinstance(given, tuple) else [given]
    if not all(isinstance(one, int) for one in found):
        raise Unsupported(f"a convolution with {given}")
    numbers = [constant(one) for one in found if isinstance(one, int)]
    return numbers * rank if len(numbers) == 1 else numbers


def _padded(source: Tensor, padding: list[Index]) -> Tensor:
    """`source` zero-padded."""
    shape = source.shape[:2] + tuple(s + p + p for s, p in zip(source.shape[2:], padding, strict=True))
    return Select(shape, source.dtype, source, number(0, source.dtype), (ZERO, ZERO, *padding))


def _epilogue(region: Region, node: Node, out: Load) -> Callable[[Tensor], Tensor]:
    bias = node.arg("bias")
    if not isinstance(bias, Value):
        return lambda total: total
    added = region.values[bias.name]

    def epilogue(total: Tensor) -> Tensor:
        wide = View(out.shape, added.dtype, added, lambda position: (position[1],))
        return pointwise(A + B, out.dtype, total, cast(wide, "f32"))

    return epilogue


# ---- split-K ---------------------------------------------------------------------------------------------------------


def conv_split(body: Graph, name: str, num_splits: int) -> Graph:
    """`body`, of the kernel `name`, with its channels split into `num_splits` (split-K); see `split_anchor`."""
    anchor = next(node for node in body.nodes if node.op in OPS)
    return split_anchor(body, name, anchor, num_splits, _convolution, _convolution_sum, ("bias",))


def _convolution(calls: BodyBuilder, anchor: Node, num_splits: int) -> tuple[Value, ...]:
    """[batch, num_splits * filters, *pixels]: a grouped convolution, with a range of the channels per group."""
    (result,) = anchor.outputs
    assert result is not None
    exact = anchor.op == INT_CONV  # otherwise parts are summed in f32
    source, weight = (
        argument(anchor, name) if exact else calls.cast(argument(anchor, name), "f32") for name in ("input", "weight")
    )
    filters, channels, *window = type_of(weight).shape
    grouped = calls.move_to_front(calls.split_dim(weight, 1, num_splits), 1)
    shape = (dim_expr("*", num_splits, filters), dim_expr("//", channels, num_splits), *window)
    batch, _, *places = type_of(result).shape
    given = {
        "input": source,
        "weight": calls.reshape(grouped, shape),
        **({"bias": None} if anchor.op == "aten.convolution.default" else {}),
        **{name: attr for name, attr in anchor.args if name not in ("input", "weight", "bias", "groups")},
        "groups": num_splits,
    }
    out = (batch, shape[0], *places)
    strides = _channels_last(out) if type_of(result).strides[1] == 1 else contiguous(out)
    sums = "i32" if exact else "f32"
    return (calls.call(anchor.op.removeprefix("aten."), TensorType(sums, out, strides), **given),)


def _channels_last(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Channels-last strides."""
    order = (0, *range(2, len(shape)), 1)
    found = dict(zip(order, contiguous(tuple(shape[axis] for axis in order)), strict=True))
    return tuple(found[axis] for axis in range(len(shape)))


def _convolution_sum(calls: BodyBuilder, anchor: Node, partials: tuple[Value, ...]) -> Value:
    (result,) = anchor.outputs
    assert result is not None
    strides = type_of(result).strides
    filters, *places = type_of(result).shape[1:]
    count = dim_expr("//", type_of(partials[0]).shape[1], filters)
    assert isinstance(count, int)  # `conv_contraction` only takes static weights
    total = added(calls, calls.unbind(calls.split_dim(partials[0], 1, count), 1), strides)
    bias = anchor.arg("bias")
    if isinstance(bias, Value):
        wide = calls.reshape(bias, (filters, *(1 for _ in places)))
        total = calls.pointwise("add.Tensor", total, other=wide)
    return total


# ---- library calls ---------------------------------------------------------------------------------------------------


def _others(region: Region, name: str, arch: Arch, us: float) -> Iterator[Offer]:
    contraction = conv_contraction(region)
    if contraction.batch == 1 and not is_depthwise(contraction):
        num_splits, split_us = best_num_splits(region, contraction, arch)
        yield from splits(conv_split, region.body, name, num_splits, split_us * MODEL_ERROR, us)
    assert region.anchor is not None
    if region.anchor.op == INT_CONV:
        return
    # Libraries are tuned for many channels, and for windows in two dimensions.
    _, channels, *window = tensor_type(argument(region.anchor, "weight")).shape
    usual = typical(channels) >= FEW_CHANNELS and sum(size != 1 for size in window) > 1
    plain = us if is_depthwise(contraction) else MODEL_ERROR * gemm_us(region, contraction, arch)
    before_us = prologue_us(region, arch)
    _, _, type_ = anchor_result(region, "conv")
    bias_us = streaming_us([type_, type_], arch)  # PyTorch adds it by a kernel after cuDNN's
    without, after_us = _without_bias(region.body, name), epilogue_us(region, arch)
    expected_us = library_us(FAMILY.name, region, arch, plain, before_us, after_us, usual)
    yield Offer("library", expected_us + (bias_us if without is not None and usual else 0.0))
    if without is not None:
        yield Offer("bare", expected_us + (0.0 if after_us else bias_us), without)
    fused = _with_relu(region.body)
    if fused is not None:  # cuDNN may refuse the call, so it is measured but never expected to be the fastest
        yield Offer("cudnn", max(expected_us, SLOWER * us), fused)


def _without_bias(body: Graph, name: str) -> Graph | None:
    """See `bare`."""
    _, anchor, _ = around(body, OPS)
    (result,) = anchor.outputs
    assert result is not None
    given = {key: attr for key, attr in anchor.args if key != "bias"}
    given = {**dict(list(given.items())[:2]), "bias": None, **given}  # in the order of the schema

    def call(calls: BodyBuilder) -> Value:
        return calls.call(anchor.op.removeprefix("aten."), type_of(result), **given)

    return bare(body, name, anchor, anchor.arg("bias"), call)


def _with_relu(body: Graph) -> Graph | None:
    """`body` as one call of cuDNN, if it is relu(conv2d + bias) or relu(conv2d + bias + tensor) in half precision
    (`aten.cudnn_convolution_relu`, `aten.cudnn_convolution_add_relu`)."""
    before, anchor, after = around(body, OPS)
    if not after or after[-1].op != "aten.relu.default" or not isinstance(anchor.arg("bias"), Value):
        return None
    *sums, last = after
    other, result = added_to(anchor, sums[0]) if len(sums) == 1 else None, body.outputs[0]
    if body.outputs != last.outputs or len(sums) > 1 or (sums and other is None):
        return None
    if last.inputs != (sums[0] if sums else anchor).outputs or not isinstance(result, Value):
        return None
    source, weight = argument(anchor, "input"), argument(anchor, "weight")
    rank = len(type_of(weight).shape) - 2
    if type_of(source).dtype not in ("f16", "bf16") or rank != 2 or anchor.arg("transposed", False):
        return None
    names = (("stride", 1), ("padding", 0), ("dilation", 1))
    sizes = {key: tuple(one.number for one in _sizes(anchor.arg(key, default), rank)) for key, default in names}
    calls = BodyBuilder(names_in(body), before)
    op = "cudnn_convolution_relu.default" if other is None else "cudnn_convolution_add_relu.default"
    given = {"self": source, "weight": weight, **({} if other is None else {"z": other, "alpha": None})}
    groups = anchor.arg("groups", 1)
    calls.call(op, type_of(result), **given, bias=anchor.arg("bias"), **sizes, groups=groups)
    return calls.body(body.inputs, result)


def _expected_us(region: Region, arch: Arch, config: GemmConfig) -> float:
    contraction = conv_contraction(region)
    if is_depthwise(contraction):
        return streaming_us(region.memory_types, arch)
    return MODEL_ERROR * config_us(region, contraction, arch, config)


OPS = frozenset(op for op, kind in ANCHORS.items() if kind == "conv")
FAMILY = Family("conv", OPS, conv_configs, conv_kernel, _expected_us, _others)
