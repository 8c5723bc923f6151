"""torch.compile(backend="rtx") is eager, whatever operators a function calls, in any dtype and layout."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.compiled import check, compile_rtx, counted, same

CUSTOM = "torch_rtx_tests"
aten = torch.ops.aten


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# Dtypes, layouts, autocast -------------------------------------------------------------------------------------------

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
def test_float_dtypes(dtype, recorder):
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Softmax(-1)).to(dtype)
    with torch.no_grad():
        check(model, torch.randn(3, 4, dtype=dtype), compiled=compile_rtx(model))
    assert recorder.fallbacks == []


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8])
def test_int_dtypes(dtype, recorder):
    def f(x):
        return x * 2 + 1, x // 2, x % 3, x & 3, x.sum(), x > 1, x.to(torch.float32) / 2, x.max(0)

    check(f, torch.arange(9, dtype=dtype).view(3, 3))
    assert recorder.fallbacks == []


def test_bool(recorder):
    check(lambda x, y: (x & ~y, x.any(), x.sum(), torch.where(x, 1, 2)), torch.eye(3) > 0, torch.ones(3, 3) > 0)
    assert recorder.fallbacks == []


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex(dtype):
    def f(x):
        rotated = x * torch.polar(torch.ones(3), torch.arange(3.0)).to(dtype)
        return rotated.real, torch.view_as_real(rotated), x.abs(), x.conj() * x, x * 2j

    check(f, torch.randn(2, 3, dtype=dtype))


def test_rope_by_complex_numbers():
    def f(x, freqs):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * freqs).flatten(-2)

    check(f, torch.randn(2, 3, 8), torch.polar(torch.ones(3, 4), torch.randn(3, 4)))


LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 3),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x[:, :, ::2, 1:],
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    "flipped": lambda x: x.flip(1).permute(0, 1, 3, 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    def f(x):
        return x * 2, x.sum(1), x.flatten(1).relu(), F.avg_pool2d(x, 2), x.permute(0, 2, 3, 1).softmax(-1)

    # deepcopy makes memory of its own without changing strides
    check(f, LAYOUTS[name](torch.randn(2, 4, 4, 4)))


def test_channels_last_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        check(model, torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last), compiled=compile_rtx(model))


@pytest.mark.parametrize("where", ["caller", "inside"])
def test_autocast(where, recorder):
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 4))

    def inside(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x) + x

    f = model if where == "caller" else inside
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=where == "caller"):
        compiled = check(f, torch.randn(3, 4), compiled=compile_rtx(f))
        assert compiled(torch.randn(3, 4)).dtype == f(torch.randn(3, 4)).dtype
    assert recorder.fallbacks == []


def test_autocast_switched_on_later():
    model = nn.Linear(4, 4)
    compiled = compile_rtx(model)
    with torch.no_grad():
        for enabled in (False, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                check(model, torch.randn(3, 4), runs=1, compiled=compiled)


# Random numbers and factories ----------------------------------------------------------------------------------------


def test_factories():
    def f(x):
        grid = torch.meshgrid(torch.arange(3.0), torch.linspace(0, 1, 3), indexing="ij")
        return torch.zeros_like(x), torch.eye(3) + grid[0], torch.full((2,), 3), x.new_zeros(2), grid

    check(f, torch.randn(3))


def test_random_numbers_are_those_of_aot_eager():
    def f(x):
        noise = torch.rand(3), torch.randn_like(x), torch.randint(0, 10, (4,)), torch.bernoulli(x.sigmoid())
        return *noise, F.dropout(x, 0.5, training=True), torch.rand(3), torch.randperm(5)

    results = []
    for backend in ("rtx", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(f, backend=backend, fullgraph=True)
        torch.manual_seed(3)
        results.append([compiled(torch.ones(3)) for _ in range(2)])
    same(*results)
    first, second = results[0]
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[0], first[5])


# Fallbacks -----------------------------------------------------------------------------------------------------------


def masked(x):
    kept = x[x > 0]
    return kept * 2, kept.shape[0], (x > 0).nonzero() + 1


def takes_item(x):
    n = x.sum().to(torch.int64).item()
    torch._check(n >= 0)
    torch._check(n <= 100)
    return torch.zeros(n) + x[0], n + 1


@pytest.mark.parametrize("f", [masked, takes_item, lambda x: x * x.long().max().item(), lambda x: x.unique()])
def test_sizes_that_data_decides(f, recorder):
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        compiled, counter = counted(f)
        for values in ([1.0, -2.0, 3.0], [1.0, 2.0, 3.0], [4.0, 2.0, 2.0]):
            check(f, torch.tensor(values), runs=1, compiled=compiled)
    assert counter.frame_count == 1
    assert recorder.fallbacks


@torch.library.custom_op(f"{CUSTOM}::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@double.register_fake
def _(x):
    return torch.empty_like(x)


@torch.library.custom_op(f"{CUSTOM}::split_sum", mutates_args=())
def split_sum(x: torch.Tensor, sizes: list[int], factor: float = 1.0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return x.sum() * factor, [part.clone() for part in x.split(sizes)]


@split_sum.register_fake
def _(x, sizes, factor=1.0):
    return x.new_empty(()), [x.new_empty(size) for size in sizes]


@torch.library.custom_op(f"{CUSTOM}::bump", mutates_args={"x"})
def bump(x: torch.Tensor, by: float) -> None:
    x.add_(by)


def test_custom_ops(recorder):
    def f(x):
        y = double(x.relu()) + 1
        total, parts = split_sum(y, [1, 2], factor=2.0)
        return y, total.exp(), [part * 2 for part in parts]

    check(f, torch.randn(3))
    assert recorder.fallbacks == ["!double", "!python"]  # lists among results have no name in the IR


def test_mutating_custom_ops(recorder):
    def f(x):
        y = x * 2
        bump(y, 3.0)
        bump(x, 1.0)
        bump(y[0], 2.0)
        return y * x

    check(f, torch.randn(3, 2))
    assert recorder.fallbacks


def test_cond(recorder):
    def f(x, flag):
        return torch.cond(flag.sum() > 0, lambda x: x.sin() + 1, lambda x: x.cos() * 2, (x.exp(),)) * 3

    compiled, counter = counted(f)
    for flag in (1.0, -1.0):
        check(f, torch.randn(3), torch.tensor([flag]), runs=1, compiled=compiled)
    assert counter.frame_count == 1
    assert recorder.fallbacks == ["!cond"]


@pytest.mark.parametrize("grad", [False, True])
def test_calls_with_effects(grad, recorder):
    """`torch.linalg.inv` checks its result by a call that may raise, and so has to happen."""
    model = nn.Linear(3, 3)
    compiled = compile_rtx(lambda x: torch.linalg.inv(model(x)))
    with torch.set_grad_enabled(grad):
        check(lambda x: torch.linalg.inv(model(x)), torch.randn(3, 3), compiled=compiled)
        with pytest.raises(RuntimeError, match="singular"):
            compiled(torch.zeros(3, 3))
    assert recorder.fallbacks == []


OPERATIONS = {
    "conjugated": lambda x: (torch.complex(x, x).conj().imag, torch.complex(x, x).mH @ torch.complex(x, x)),
    "fft": lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2, n=4),
    "sort": lambda x: (x.sort(), x.topk(2), x.argsort(0), x.cummax(0)),
    "linalg": lambda x: (torch.linalg.svdvals(x), torch.linalg.qr(x).R.abs(), torch.det(x[:3, :3])),
    "scatter": lambda x: (x.scatter(0, x.argsort(0), 1.0), x.index_add(0, torch.tensor([0, 1]), x[:2])),
    "index": lambda x: (x[torch.tensor([0, 2])], x[:, None, ..., -1], x[[0, 1]], x.masked_fill(x > 0, -1)),
    "roll": lambda x: (x.roll(1, 0), x.tile(2, 2), x.repeat_interleave(2, 0), torch.tril(x), x.rot90(), x.flip(0)),
    "pieces": lambda x: (x.chunk(3, 0), x.tensor_split(2), x.split([1, 3], 1), x.unbind(0), x.unfold(0, 2, 1)),
    "promotion": lambda x: (x + torch.arange(4), x.double() + x, x.int() % 2, 1 / x, 2**x, x // 2, x.view(torch.int32)),
    "losses": lambda x: (F.cross_entropy(x, torch.tensor([0, 1, 2, 3])), F.mse_loss(x, x * 2)),
    "vmap": lambda x: torch.func.vmap(torch.func.grad(lambda y: y.sin().sum()))(x),
    "scan": lambda x: torch._higher_order_ops.scan(lambda c, y: (c + y, c * y), torch.zeros(4), x),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    """Operators of all sorts, most of them with several results, indices or another dtype."""
    check(OPERATIONS[name], torch.randn(4, 4))


MODULES = {
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), [(2, 5, 8)] * 3),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), [(2, 5, 8)]),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), [(2, 4)]),
    "conv_transpose": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ConvTranspose2d(4, 3, 2)), [(1, 3, 9, 9)]),
    "conv1d_same": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding="same"), nn.BatchNorm1d(4)), [(2, 3, 9)]),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.InstanceNorm3d(2)), [(1, 1, 4, 4, 4)]),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    build, shapes = MODULES[name]
    model = build().eval()
    with torch.no_grad():
        check(model, *map(torch.randn, shapes), compiled=compile_rtx(model))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x.new_ones(int(x.shape[0] * 1.7)), x * 2),
        lambda x: x.new_zeros(int(x.shape[0] ** 0.5)) + 1,
        lambda x: x[: abs(x.shape[0] - 20) // 2] * 2,
        lambda x: (x.new_ones(math.ceil(x.shape[0] / 3)).exp(), x.sum()),
    ],
    ids=["factor", "root", "abs", "ceil"],
)
def test_sizes_that_dims_cannot_express_are_computed(function, recorder):
    compiled = compile_rtx(function, dynamic=True)
    for size in (10, 7, 13):
        check(function, torch.randn(size, 2), runs=1, compiled=compiled)
    assert recorder.fallbacks == []


# Numbers ------------------------------------------------------------------------------------------------------------


def test_integers_that_dynamo_makes_symbols_may_be_negative(recorder):
    def f(x, n):
        return x[n] * 2 + n, x.roll(n % 3), x + n // 2, torch.arange(n, 9)

    compiled = compile_rtx(f)
    for n in (2, 3, -7, -2, 5):  # the first is a constant, the second makes a symbol, the third another graph
        check(f, torch.arange(7.0), n, runs=1, compiled=compiled)
    assert len(recorder) <= 3


def test_numbers_of_every_kind_as_arguments(recorder):
    def f(x, number, flag):
        return (x * number if flag else x - number), x.clamp(max=number)

    compiled = compile_rtx(f)
    for number in (1.5, -2.25, 0.0, 3, -3):
        check(f, torch.randn(3), number, number > 0, runs=1, compiled=compiled)
    assert recorder.fallbacks == []


def test_more_numbers_from_the_data_than_pytorch_has_names_for():
    """Their names in PyTorch are `u0` to `u16`, two of which are dtypes."""

    def f(x):
        total = 0
        for n in x.tolist():
            torch._check(n >= 0)
            total = total + n
        return x.new_ones(total)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        check(f, torch.arange(17), runs=1)


ARITHMETIC = {
    "floats": lambda x, n, m: (x * n**-0.5, x / math.sqrt(n), x * (1 / n), x + n * 0.1 - m % 2.5, x.double() * n**0.3),
    "chains": lambda x, n, m: (x * (n / m) * math.log2(n), x.long() + n * 0.3, x * float(n), x * min(n, 2.5)),
    "roundings": lambda x, n, m: (
        x * round(n / 3, 2),
        x.new_ones(round(n / 3)),
        x * math.trunc(n * 0.7),
        x * abs(n - 8),
    ),
    "choices": lambda x, n, m: (x * torch.sym_ite(n > 2 * m, n, m), x * torch.sym_max(n, m)),
    "results": lambda x, n, m: (x + 1, n / 2, n + 1, int(n**0.5), n > m),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_on_sizes_is_that_of_python(name, recorder):
    def f(x):
        return ARITHMETIC[name](x, *x.shape)

    compiled = compile_rtx(f, dynamic=True)
    for shape in ((5, 8), (9, 3), (17, 2)):
        x = torch.randn(shape)
        same(compiled(x), f(x), rtol=0, atol=0)
    assert recorder.fallbacks == []


# Operators outside of ATen's core ------------------------------------------------------------------------------------

OTHERS = {
    "prims": lambda x: (
        torch.ops.prims.sum(x, [0]),
        torch.ops.prims.div(x, x + 9),
        torch.ops.prims.iota(4, start=1, step=2, dtype=torch.int64, device="cpu", requires_grad=False),
        torch.ops.prims.convert_element_type(x, torch.float64),
    ),
    "foreach": lambda x: (
        *torch._foreach_add([x, x[0]], [x, x[1]], alpha=2),
        *torch._foreach_addcdiv([x, x[0]], [x, x[1]], [x + 9, x[2] + 9], [0.5, 2.0]),
        *torch._foreach_maximum([x, x[0]], 0.5),
        *torch._foreach_norm([x, x[0]], 1),
    ),
    "resized": lambda x: (aten.resize(x, [2, 3]), aten.resize(x.T, [3, 2]), aten.resize_as(x, x[0])),
    "scattered by strides": lambda x: (
        *(
            aten.as_strided_scatter(x.view(16), x[:, :, None], [4, 4, 1], strides, 0)
            for strides in ([4, 1, 9], [1, 4, 9])
        ),
        aten.as_strided_scatter(x.view(16), x[:2, :2], [2, 2], [5, 1], 3),  # a part
        aten.copy(x.double(), x[0]),
        aten.copy(x.T, x),
    ),
    "scalar first": lambda x: (5 & x.long(), torch.bitwise_left_shift(2, x.long().abs()), torch.isin(1.0, x)),
    "polynomials": lambda x: (
        torch.special.hermite_polynomial_h(x, 2) + torch.special.legendre_polynomial_p(0.5, x.abs())
    ),
    "repeated": lambda x: x.repeat_interleave(torch.tensor([1, 0, 2, 1]), 0, output_size=4),
}


@pytest.mark.parametrize("name", OTHERS)
def test_operators_that_are_replaced_or_rare_run_in_the_engine(name, recorder):
    with torch.no_grad():
        check(OTHERS[name], torch.randn(4, 4), runs=1)
    assert recorder.fallbacks == []


@pytest.mark.parametrize("foreach", [False, True])
def test_a_compiled_optimizer_step(foreach, recorder):
    torch.manual_seed(0)
    models = [nn.Linear(3, 3), nn.Linear(3, 3)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(2, 3)
    for model, compiles in zip(models, (False, True), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), 0.1, foreach=foreach)
        step = compile_rtx(optimizer.step, fullgraph=False) if compiles else optimizer.step
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            step()
    same(dict(models[1].named_parameters()), dict(models[0].named_parameters()))
    assert recorder.fallbacks == []
