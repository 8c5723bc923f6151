"""Kernels around a convolution, in Triton's interpreter against ATen."""

from __future__ import annotations

import re

import pytest
from expecttest import TestCase

from tests.lowering.kernels.kernel_bodies import body, check
from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.families.conv import conv_configs, conv_contraction, conv_kernel
from torch_rtx.lowering.kernels.families.gemm import GemmConfig
from torch_rtx.lowering.kernels.gemm_perf_model import shared_memory
from torch_rtx.lowering.kernels.gemm_problem import gemm_problem
from torch_rtx.lowering.kernels.region import region
from torch_rtx.lowering.kernels.toolchain import Job, lower
from torch_rtx.targets import ARCHES, Arch, arch_of

SMALL = GemmConfig(64, 16, 16)
DTYPES = ("f16", "bf16", "f32")


def call(
    source: tuple[int, ...],
    weight: tuple[int, ...],
    channels_last: bool = True,
    bias: bool = True,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
    rest: str = "return h",
) -> str:
    """A convolution in two dimensions, and what follows; `OUT` in there stands for the type of its result."""
    spatial = [
        (size + 2 * p - d * (tap - 1) - 1) // s + 1
        for size, tap, p, d, s in zip(source[2:], weight[2:], padding, dilation, stride, strict=True)
    ]
    out = typed((source[0], weight[0], *spatial), channels_last)
    lines = [f"x: {typed(source, channels_last)}", f"w: {typed(weight, channels_last)}", f"b: H[{weight[0]}]"]
    args = "input=x, weight=w" + (", bias=b" if bias else "")
    args += f", stride={list(stride)}, padding={list(padding)}, dilation={list(dilation)}, groups={groups}"
    inputs = [line.replace("OUT", out) for line in rest.splitlines() if ":" in line and " = " not in line]
    others = [line.replace("OUT", out) for line in rest.splitlines() if ":" not in line or " = " in line]
    return "\n".join([*lines, *inputs, f"h: {out} = conv2d.default({args})", *others])


def typed(shape: tuple[int, ...], channels_last: bool) -> str:
    """A tensor type of the dtype of the test."""
    n, c, h, w = shape
    return f"H[{n}, {c}, {h}, {w}]" + (f"({c * h * w}, 1, {w * c}, {c})" if channels_last else "")


EPILOGUE = """r: OUT
a: OUT = add.Tensor(self=h, other=r)
y: OUT = relu.default(self=a)
return y"""
SHAPES = {
    "3x3": {"source": (2, 32, 6, 5), "weight": (20, 32, 3, 3), "padding": (1, 1), "rest": EPILOGUE},
    "stride": {"source": (1, 16, 9, 8), "weight": (20, 16, 3, 3), "padding": (1, 1), "stride": (2, 2)},
    "dilation": {"source": (1, 16, 9, 8), "weight": (20, 16, 3, 3), "padding": (2, 0), "dilation": (2, 3)},
    "few channels": {"source": (2, 3, 9, 9), "weight": (20, 3, 5, 3), "padding": (2, 1), "stride": (2, 1)},
    "one channel": {"source": (1, 1, 9, 9), "weight": (4, 1, 3, 3)},
    "odd channels": {"source": (1, 21, 5, 6), "weight": (9, 21, 2, 3), "bias": False},
    "1x1": {"source": (2, 24, 5, 4), "weight": (20, 24, 1, 1), "rest": EPILOGUE},
    "1x1, stride": {"source": (2, 16, 5, 4), "weight": (20, 16, 1, 1), "stride": (2, 2), "bias": False},
    "groups": {"source": (1, 32, 5, 4), "weight": (24, 16, 3, 3), "groups": 2, "rest": EPILOGUE},
    "many groups": {"source": (1, 16, 5, 4), "weight": (16, 4, 3, 3), "groups": 4, "padding": (1, 1)},
    "depthwise": {"source": (2, 24, 6, 5), "weight": (24, 1, 3, 3), "groups": 24, "padding": (1, 1), "rest": EPILOGUE},
    "depthwise, stride": {
        "source": (1, 12, 9, 8),
        "weight": (24, 1, 5, 3),
        "groups": 12,
        "padding": (2, 0),
        "stride": (2, 1),
    },
    "depthwise, row by row": {
        "source": (1, 12, 9, 10),
        "weight": (24, 1, 7, 5),
        "groups": 12,
        "padding": (3, 4),
        "stride": (2, 1),
        "dilation": (1, 2),
        "rest": EPILOGUE,
    },
    "depthwise, one row": {"source": (2, 8, 2, 40), "weight": (8, 1, 1, 31), "groups": 8, "padding": (0, 15)},
}
CALLS = {
    "in one dimension": """
x: H[2, 32, 12]
w: H[24, 32, 3]
b: H[24]
h: H[2, 24, 6] = conv1d.default(input=x, weight=w, bias=b, stride=[2], padding=[1])
y: H[2, 24, 6] = gelu.default(self=h)
return y
""",
    "in three dimensions": """
x: H[1, 16, 4, 5, 4]
w: H[8, 16, 2, 3, 2]
h: H[1, 8, 3, 5, 3] = conv3d.default(input=x, weight=w, padding=[0, 1, 0])
return h
""",
    "in three dimensions, depthwise": """
x: H[1, 8, 4, 5, 4]
w: H[8, 1, 3, 3, 3]
h: H[1, 8, 4, 5, 2] = conv3d.default(input=x, weight=w, padding=[1, 1, 0], groups=8)
return h
""",
    "as one number for all dimensions": """
x: H[1, 16, 5, 4]
w: H[8, 16, 3, 3]
h: H[1, 8, 5, 4] = convolution.default(input=x, weight=w, bias=None, padding=[1], transposed=False, REST)
return h
""".replace("REST", "stride=[1], dilation=[1], output_padding=[0], groups=1"),
    "tokens of patches": """
x: H[2, 3, 8, 12]
w: H[24, 3, 4, 4]
b: H[24]
p: H[1, 6, 24]
h: H[2, 24, 2, 3] = conv2d.default(input=x, weight=w, bias=b, stride=[4, 4])
f: H[2, 24, 6] = view.default(self=h, size=[2, 24, 6])
t: H[2, 6, 24](144, 1, 6) = transpose.int(self=f, dim0=1, dim1=2)
y: H[2, 6, 24] = add.Tensor(self=t, other=p)
return y
""",
    "a range of channels": """
x: H[1, 32, 6, 5](960, 1, 160, 32)
w: H[8, 16, 3, 3](144, 1, 48, 16)
a: H[1, 16, 6, 5](960, 1, 160, 32) = slice.Tensor(self=x, dim=1, start=8, end=24)
h: H[1, 8, 4, 3](96, 1, 24, 8) = conv2d.default(input=a, weight=w)
return h
""",
    "a range of channels, depthwise": """
x: H[1, 6, 5, 32]
w: H[8, 1, 3, 3](9, 1, 3, 1)
b: H[1, 6, 5, 8](960, 160, 32, 1) = slice.Tensor(self=x, dim=3, start=24, end=32)
p: H[1, 8, 6, 5](960, 1, 160, 32) = permute.default(self=b, dims=[0, 3, 1, 2])
h: H[1, 8, 6, 5](240, 1, 40, 8) = conv2d.default(input=p, weight=w, padding=[1, 1], groups=8)
return h
""",
    "a normalization and two results": """
x: H[1, 16, 5, 4](320, 1, 64, 16)
w: H[8, 16, 3, 3](144, 1, 48, 16)
s: f32[1, 8, 1, 1]
h: H[1, 8, 3, 2](48, 1, 16, 8) = conv2d.default(input=x, weight=w)
f: f32[1, 8, 3, 2](48, 1, 16, 8) = mul.Tensor(self=h, other=s)
y: H[1, 8, 3, 2](48, 1, 16, 8) = _to_copy.default(self=f, dtype=TYPE)
z: H[1, 8, 3, 2](48, 1, 16, 8) = hardswish.default(self=y)
return y, z
""",
    "a border of ones": """
x: H[1, 16, 5, 4]
w: H[8, 16, 3, 3]
p: H[1, 16, 7, 5] = constant_pad_nd.default(self=x, pad=[0, 1, 1, 1], value=1.0)
h: H[1, 8, 5, 5] = conv2d.default(input=p, weight=w, padding=[0, 1])
return h
""",
    "a border of zeros before one": """
x: H[1, 16, 5, 4]
w: H[8, 16, 3, 3]
p: H[1, 16, 6, 5] = constant_pad_nd.default(self=x, pad=[0, 1, 0, 1])
h: H[1, 8, 3, 3] = conv2d.default(input=p, weight=w, stride=[2, 2], padding=[1, 1])
return h
""",
    "twice as large before": """
x: H[1, 16, 3, 4]
w: H[8, 16, 3, 3]
u: H[1, 16, 6, 8] = upsample_nearest2d.vec(input=x, output_size=None, scale_factors=[2.0, 2.0])
h: H[1, 8, 6, 8] = conv2d.default(input=u, weight=w, padding=[1, 1])
return h
""",
    "an activation before": """
x: H[1, 16, 5, 4](320, 1, 64, 16)
w: H[8, 16, 3, 3](144, 1, 48, 16)
e: H[1, 16, 5, 4](320, 1, 64, 16) = exp.default(self=x)
h: H[1, 8, 5, 4](160, 1, 32, 8) = conv2d.default(input=e, weight=w, padding=[1, 1])
return h
""",
}


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, channels_last: bool) -> None:
    check(call(channels_last=channels_last, **SHAPES[name]), conv_kernel, SMALL)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("name", ["3x3", "few channels", "depthwise"])
def test_dtypes(name: str, dtype: str) -> None:
    check(call(**SHAPES[name]), conv_kernel, GemmConfig(32, 32, 32, programs=2), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str, dtype: str) -> None:
    check(CALLS[name].replace("TYPE", repr(dtype)), conv_kernel, SMALL, dtype)


@pytest.mark.parametrize("size", [0, 3])
def test_symbolic_batch_and_height(size: int) -> None:
    text = """
dim s = 0, 64, 1
dim t = 3, 64, 1
x: H[s, 16, t, 4]((64 * t), 1, 64, 16)
w: H[24, 16, 3, 3](144, 1, 48, 16)
h: H[s, 24, t, 4]((96 * t), 1, 96, 24) = conv2d.default(input=x, weight=w, padding=[1, 1])
y: H[s, 24, t, 4]((96 * t), 1, 96, 24) = relu.default(self=h)
return y
"""
    check(text, conv_kernel, SMALL, dims={"s": size, "t": 5})


@pytest.mark.quick
def test_a_convolution_of_points_is_a_matrix_product() -> None:
    source = conv_kernel(region(body(call((2, 32, 8, 8), (16, 32, 1, 1)))), "kernel", SMALL).source
    assert "//" not in source.replace("(tile //", """""")
    assert "mask" not in source


REFUSED = {
    "transposed": """
x: H[1, 16, 5, 4]
w: H[16, 8, 3, 3]
h: H[1, 8, 7, 6] = convolution.default(input=x, weight=w, bias=None, padding=[0], transposed=True, REST)
return h
""".replace("REST", "stride=[1], dilation=[1], output_padding=[0], groups=1"),
    "without a batch": """
x: H[16, 5, 4]
w: H[8, 16, 3, 3]
h: H[8, 3, 2] = conv2d.default(input=x, weight=w)
return h
""",
    "no static shape": """
dim s = 1, 64, 1
x: H[1, 16, 5, 4]
w: H[s, 16, 3, 3]
h: H[1, s, 3, 2] = conv2d.default(input=x, weight=w)
return h
""",
    "different parts": call(
        (1, 16, 5, 4),
        (8, 16, 3, 3),
        rest="s: H[1, 4, 3, 2](48, 1, 16, 8) = slice.Tensor(self=h, dim=1, start=0, end=4)\nreturn h, s",
    ),
    "as a conv kernel": """
x: H[16, 8]
y: H[16, 8] = relu.default(self=x)
return y
""",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        conv_kernel(region(body(REFUSED[reason])), "kernel", SMALL)


@pytest.mark.parametrize("arch", ARCHES.values(), ids=ARCHES)
@pytest.mark.parametrize("name", SHAPES)
def test_configurations_fit_their_target(name: str, arch: Arch) -> None:
    given = region(body(call(**SHAPES[name])))
    configs = conv_configs(given, arch)
    assert len(configs) == len(set(configs)) > 0
    what = gemm_problem(given, conv_contraction(given), arch)
    for config in configs:
        assert shared_memory(what, config, arch) <= arch.shared
    assert conv_kernel(given, "kernel", configs[0]) == conv_kernel(given, "kernel", configs[0])


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", ["3x3", "few channels", "groups", "depthwise"])
def test_the_best_configuration_is_right(name: str, channels_last: bool) -> None:
    text = call(channels_last=channels_last, **SHAPES[name])
    check(text, conv_kernel, conv_configs(region(body(text)), arch_of(86))[0])


def test_one_pixel_is_summed_without_tensor_cores() -> None:
    text = call((1, 96, 1, 1), (40, 96, 1, 1))
    config = conv_configs(region(body(text)), arch_of(90))[0]
    assert config.gemv
    check(text, conv_kernel, config)


def test_an_empty_batch_has_configurations() -> None:
    assert conv_configs(region(body(call((0, 24, 6, 5), (24, 1, 3, 3), groups=24))), arch_of(90))


@pytest.mark.parametrize(("channels", "vectors"), [(3, False), (4, True)])
def test_pixels_of_four_halves_are_loaded_at_once(channels: int, vectors: bool) -> None:
    """Which is why the pass `channels_last` adds channels: the border of the image does not keep vectors apart."""
    text = call((2, channels, 16, 16), (64, channels, 7, 7), stride=(2, 2), padding=(3, 3))
    kernel = conv_kernel(region(body(text)), "kernel", GemmConfig(64, 64, 32))
    job = Job("kernel", kernel.source, kernel.pointers, (), False, kernel.num_warps, kernel.num_stages, 80)
    ptx = lower(job).ptx
    assert (b"ld.global.b16" not in ptx) == vectors
    assert (re.search(rb"cp\.async\.ca.*, 0x8,", ptx) is not None) == vectors


class TestSource(TestCase):
    """What kernels look like."""

    def source(self, text: str, config: GemmConfig) -> str:
        """The text of the function."""
        kernel = conv_kernel(region(body(text)), "kernel", config)
        return "".join(kernel.source.partition("@triton.jit")[1:])

    def test_window_with_residual(self) -> None:
        text = call((32, 64, 56, 56), (64, 64, 3, 3), padding=(1, 1), rest=EPILOGUE)
        self.assertExpectedInline(
            self.source(text, GemmConfig(128, 64, 32, 8)),
            """\
@triton.jit
def kernel(x, w, b, r, out0):
    tile = tl.program_id(0)
    M = tile * 128 + tl.arange(0, 128)[:, None]
    N = tl.arange(0, 64)[None, :]
    KA = tl.arange(0, 32)[None, :]
    KB = tl.arange(0, 32)[:, None]
    ai0 = ((M // 56) % 56)
    ai1 = (M % 56)
    ap6 = x + (KA + 64 * M + -3648)
    bp0 = w + (KB + 576 * N)
    acc0 = tl.zeros([128, 64], tl.float32)
    for step in range(0, 18):
        kh = (step // 6)
        kw = ((step // 2) % 3)
        ac2 = ai0 + kh >= 1
        ac3 = ai0 + kh < 57
        ac4 = ai1 + kw >= 1
        ac5 = ai1 + kw < 57
        at7 = tl.load(ap6 + (32 * (step % 2) + 3584 * kh + 64 * kw), mask=ac2 & ac3 & ac4 & ac5, other=0)
        bt1 = tl.load(bp0 + (32 * (step % 2) + 192 * kh + 64 * kw))
        acc0 = tl.dot(at7, bt1, acc0)
    t0 = tl.load(b + (N)).to(tl.float32)
    t1 = acc0 + t0
    t2 = tl.load(r + (64 * M + N)).to(tl.float32)
    t3 = t1 + t2
    t4 = tl.where(t3 <= 0, 0, t3)
    tl.store(out0 + (64 * M + N), t4)
""",
        )

    def test_depthwise(self) -> None:
        text = call((1, 64, 28, 28), (64, 1, 3, 3), padding=(1, 1), groups=64)
        self.assertExpectedInline(
            self.source(text, GemmConfig(32, 64, 1)),
            """\
@triton.jit
def kernel(x, w, b, out0):
    tile = tl.program_id(0)
    M = tile * 32 + tl.arange(0, 32)[:, None]
    in_m = M < 784
    N = tl.arange(0, 64)[None, :]
    i0 = (M // 28)
    i1 = (M % 28)
    p6 = x + (64 * M + N + -1856)
    p8 = w + (9 * N)
    acc0 = tl.zeros([32, 64], tl.float32)
    for step in tl.static_range(0, 9):
        kh = (step // 3)
        kw = (step % 3)
        c2 = i0 + kh >= 1
        c3 = i0 + kh < 29
        c4 = i1 + kw >= 1
        c5 = i1 + kw < 29
        t7 = tl.load(p6 + (1792 * kh + 64 * kw), mask=in_m & c2 & c3 & c4 & c5, other=0).to(tl.float32)
        t9 = tl.load(p8 + (3 * kh + kw)).to(tl.float32)
        acc0 += t7 * t9
    t10 = tl.load(b + (N)).to(tl.float32)
    t11 = acc0 + t10
    tl.store(out0 + (64 * M + N), t11, mask=in_m)
""",
        )
