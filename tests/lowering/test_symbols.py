"""PyTorch's sizes as dims of the IR."""

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.functions import FloorToInt, ToFloat, TruncToInt

import torch_rtx
from torch_rtx.errors import Unsupported
from torch_rtx.ir import INT64_MIN, Graph, ScalarType, Sym, TensorType, Value, evaluate, is_name, verify
from torch_rtx.irparse import parse
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.symbols import Symbols, compared, convert

N = sympy.Symbol("n", integer=True, nonnegative=True)


def test_scaled_sizes_are_computed_in_integers():
    for scale in (2.0, 0.5, 1.5, 0.375):
        dim = convert(TruncToInt(scale * ToFloat(N)), lambda _: Sym("n"))
        assert [evaluate(dim, {"n": n}) for n in range(50)] == [int(scale * n) for n in range(50)]


def test_a_number_that_may_be_negative_is_truncated():
    leaves = {ToFloat(N).args[0]: Sym("n", -9)}
    taken = convert(TruncToInt(1.5 * ToFloat(N)), lambda leaf: leaves.get(leaf, Sym("whole")))
    rounded = convert(FloorToInt(1.5 * ToFloat(N)), lambda leaf: leaves.get(leaf, Sym("whole")))
    assert taken == Sym("whole")
    assert evaluate(rounded, {"n": -5}) == -8


def test_scales_that_floating_point_rounds_are_no_dims():
    expr = TruncToInt(1.7 * ToFloat(N))
    asked: list[sympy.Expr] = []
    assert convert(expr, lambda leaf: asked.append(leaf) or Sym("d0")) == Sym("d0")
    assert asked == [expr]  # as a whole, not its symbol
    env = ShapeEnv()
    symbol = env.create_symbol(10, ConstantSource("n"), DimDynamic.DYNAMIC)
    size = env.create_symintnode(expr.xreplace({N: symbol}), hint=17)
    with pytest.raises(Unsupported, match="1.7"):
        Symbols(torch.device("cpu")).dim(size)
    assert Symbols(torch.device("cpu")).dim(size, opaque=True) == Sym("d0")


def test_symbols_get_names_and_ranges_that_the_ir_takes():
    """PyTorch's ninth number that the data decides is `u8`, which is a dtype; integers may be negative."""
    env, symbols = ShapeEnv(), Symbols(torch.device("cpu"))
    found = [symbols.dim(env.create_unbacked_symint()) for _ in range(40)]
    assert len({sym.name for sym in found}) == 40
    assert all(is_name(sym.name) for sym in found)
    assert {sym.min for sym in found} == {INT64_MIN}
    negative = env.create_symbol(-7, ConstantSource("n"), DimDynamic.DYNAMIC, None, None)
    size = env.create_symintnode(negative, hint=-7)
    env.constrain_symbol_range(negative, -9, -1)
    value = Value("v", ScalarType("int", symbols.dim(size)))
    graph = Graph("import", (value,), outputs=(value,))
    verify(graph)
    assert parse(str(graph)) == graph
    (sym,) = graph.syms.values()
    assert (sym.min, sym.max) == (-9, -1)
    found, *_ = Inference()("aten.add.Tensor", (("self", Value("x", TensorType("i64", (2,), (1,)))), ("other", sym)))
    assert str(found) == "i64[2]"


def test_conditions_on_sizes_are_dims():
    m = sympy.Symbol("m", integer=True)
    for condition in (m <= N, m < N, m + 1 >= N, 2 * m > N, sympy.Eq(N, m), sympy.Ne(N, m)):
        for expr in (condition, sympy.Or(condition, m > 3), sympy.And(condition, N > 2)):
            dim = compared(expr, lambda part: Sym(str(part)))
            for n in range(5):
                for k in range(-2, 5):
                    assert evaluate(dim, {"n": n, "m": k}) == int(bool(expr.subs({N: n, m: k}))), (expr, n, k)
    assert (compared(sympy.true, str), compared(sympy.false, str)) == (1, 0)
    with pytest.raises(Unsupported, match="condition"):
        compared(sympy.Xor(N > 1, m > 1), lambda part: Sym(str(part)))


def test_interpolation_of_a_symbolic_size_runs_in_the_engine():
    x = torch.randn(1, 3, 9, 11)

    def up(x):
        return F.interpolate(x, scale_factor=1.5, mode="bilinear")

    options = {"require_full_compilation": True}
    compiled = torch.compile(up, backend="rtx", dynamic=True, fullgraph=True, options=options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), up(x))


class Between(torch.nn.Module):
    """Rows between two places that are floats: only the number of them is a size, neither of its ends is."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(ends[1].item(), ends[0].item(), self.step, dtype=torch.long)
        return x[rows] * 2


@pytest.mark.parametrize("step", [-1, -2])
def test_a_size_that_tells_no_function_in_it(step: int) -> None:
    model, x = Between(step), torch.randn(8, 4)
    made = torch_rtx.compile(model, (x, torch.tensor([2.0, 5.0])))
    for ends in ([2.0, 5.0], [1.0, 6.0], [4.0, 4.0]):
        torch.testing.assert_close(made(x, torch.tensor(ends)), model(x, torch.tensor(ends)))
