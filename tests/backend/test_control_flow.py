"""Control flow of PyTorch: in compiled functions and their gradients, and in engines and their files."""

import io

import pytest
import torch
from functorch.experimental.control_flow import map as each_row
from torch import nn
from torch._higher_order_ops import associative_scan, scan, while_loop

import torch_rtx
from tests.helpers.compiled import compile_rtx, same
from torch_rtx.control import check, written
from torch_rtx.errors import InvalidIR
from torch_rtx.irparse import parse

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
W = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) / 2


def condition(x, w):
    return torch.cond(x.sum() > 0, lambda x: (x @ w).sin(), lambda x: x.cos() + 1, (x,))


def nested(x, w):
    def inner(x):
        return torch.cond(x[0, 0] > 0.5, lambda y: y + torch.tensor([1.0, 2.0, 3.0, 4.0]), lambda y: y * 2, (x,))

    return torch.cond(x.sum() > 0, lambda x: (inner(x @ w), x.clone()), lambda x: (x.cos(), x + 1), (x,))


def counted(x, w):
    """The number of passes is a size."""
    return while_loop(lambda i, x: i < x.shape[0], lambda i, x: (i + 1, x @ w + i), (torch.tensor(0), x))[1]


def decided(x, w):
    """Data decides the number of passes, which is 0 for small x."""
    return while_loop(lambda x: x.abs().sum() > 0.5, lambda x: (x @ w * 0.3,), (x,))[0]


def scanned(x, w):
    return scan(lambda c, row: (c @ w + row, c * row), torch.zeros(4), x)


def mapped(x, w):
    return each_row(lambda row, w: row.sin() @ w, x, w)


@torch.compiler.nested_compile_region
def region(x, w):
    return (x @ w).relu()


def regions(x, w):
    return region(region(x, w) * 2, w)


INPUTS = [torch.rand(4, 4), -torch.rand(4, 4), torch.rand(4, 4) / 100]


DYNAMIC = [condition, counted, scanned]


@pytest.mark.parametrize("function", [*DYNAMIC, nested, decided, mapped, regions])
def test_compiled(function, recorder):
    dynamic = function in DYNAMIC
    compiled = compile_rtx(function, dynamic=dynamic)
    for x in (*INPUTS, *([torch.rand(7, 4)] if dynamic else [])):
        same(compiled(x, W), function(x, W))
    assert recorder.ops
    assert "!python" not in recorder.ops


def total(result):
    return sum(part.sum() for part in result) if isinstance(result, tuple) else result.sum()


@pytest.mark.parametrize("function", [condition, counted, scanned, regions])
def test_gradients(function, recorder):
    """`counted` against the same passes in Python: eager `while_loop` has no gradient."""
    for x in INPUTS[:2]:
        given = [x.clone().requires_grad_(), W.clone().requires_grad_()]
        expected = [x.clone().requires_grad_(), W.clone().requires_grad_()]
        total(compile_rtx(function)(*given)).backward()
        if function is counted:
            result = expected[0]
            for number in range(4):
                result = result @ expected[1] + number
        else:
            result = function(*expected)
        total(result).backward()
        for one, other in zip(given, expected, strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    assert "!python" not in recorder.ops


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.w, self.function = nn.Parameter(W.clone()), function

    def forward(self, x):
        return self.function(x, self.w)


@pytest.mark.parametrize("function", [condition, counted, scanned, regions])
def test_engines(function):
    """Saved without weights, loaded and refitted; for any number of rows."""
    model, other = Model(function), Model(function)
    other.w.data *= 0.7
    rows = torch.export.Dim("rows", min=2, max=16)
    module = torch_rtx.compile(model, (INPUTS[0],), dynamic_shapes=({0: rows},), strip_weights=True)
    torch_rtx.save(module, file := io.BytesIO())
    trusted = ["torch_rtx.while_loop"] if function is counted else []
    if trusted:
        with pytest.raises(InvalidIR, match="while_loop is not on the allow-list"):
            torch_rtx.load(io.BytesIO(file.getvalue()))
    loaded = torch_rtx.load(io.BytesIO(file.getvalue()), trusted_ops=trusted)
    loaded.refit(other.state_dict())
    with torch.no_grad():
        for x in (*INPUTS, torch.rand(7, 4), -torch.rand(7, 4)):
            same(module(x), model(x))
            same(loaded(x), other(x))


def test_sizes_decide_a_condition():
    """A predicate on sizes is a number of the host."""

    class Sized(nn.Module):
        def forward(self, x):
            return torch.cond(x.shape[0] > 3, lambda x: x.sin(), lambda x: x.cos(), (x,))

    module = torch_rtx.compile(Sized(), (INPUTS[0],), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=16)},))
    for rows in (3, 4):
        x = torch.rand(rows, 4)
        same(module(x), Sized()(x))


def test_a_loop_writes_to_its_cache(recorder):
    """Not to the caller's, whether there is a pass or none; what reads the old contents keeps them."""

    def fill(cache, x, wanted):
        def once(i, x, cache):
            filled = cache.index_copy(0, i.reshape(1), x.reshape(1, -1))
            return i + 1, filled.sum(0) / 8, filled

        return while_loop(lambda i, x, cache: i < wanted, once, (torch.zeros((), dtype=torch.int64), x, cache))

    def shift(cache, x, wanted):
        def once(i, x, cache):
            return i + 1, x + cache[0], cache.index_copy(0, i.reshape(1), x.reshape(1, -1))

        return while_loop(lambda i, x, cache: i < wanted, once, (torch.zeros((), dtype=torch.int64), x, cache))

    for function in (fill, shift):
        compiled = compile_rtx(function)
        for wanted in (3, 0):
            cache, x, limit = torch.rand(64, 512), torch.rand(512), torch.tensor(wanted)
            kept = cache.clone()
            same(compiled(cache, x, limit), function(cache, x, limit))
            assert torch.equal(cache, kept)
    loops = [node for session in recorder.sessions for node in session.graph.nodes if node.body is not None]
    assert [written(node) for node in loops] == [[3], []]


def test_a_custom_operator_in_a_branch():
    """Called by its name, like any other: a file with it loads where it is trusted."""

    @torch.library.custom_op("torch_rtx_flow::halve", mutates_args=())
    def halve(x: torch.Tensor) -> torch.Tensor:
        return x / 2

    halve.register_fake(torch.empty_like)

    class Halving(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, halve, lambda x: x + 1, (x,))

    module = torch_rtx.compile(Halving(), (INPUTS[0],))
    torch_rtx.save(module, file := io.BytesIO())
    with pytest.raises(InvalidIR, match=r"halve\.default is not on the allow-list"):
        torch_rtx.load(io.BytesIO(file.getvalue()))
    loaded = torch_rtx.load(io.BytesIO(file.getvalue()), trusted_ops=["torch_rtx_flow.halve.default"])
    for x in INPUTS[:2]:
        same(module(x), Halving()(x))
        same(loaded(x), Halving()(x))


def test_an_operator_that_writes_to_its_arguments(recorder):
    """It gets copies, also of what is read afterwards."""

    @torch.library.custom_op("torch_rtx_flow::bump", mutates_args=("x", "z"))
    def bump(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, by: float) -> torch.Tensor:
        x.add_(by)
        z.mul_(2)
        return x * y

    bump.register_fake(lambda x, y, z, by: torch.empty_like(x))

    class Bumping(nn.Module):
        def forward(self, x):
            a, b = x * 2, x + 1
            before = a.sin()
            first = bump(a, x, b, 3.0)
            bump(b, x, a, 1.0)
            return first, a, b, before

    compiled = compile_rtx(Bumping())
    module = torch_rtx.compile(Bumping(), (INPUTS[0],))
    torch_rtx.save(module, file := io.BytesIO())
    with pytest.raises(InvalidIR, match=r"bump\.default is not on the allow-list"):
        torch_rtx.load(io.BytesIO(file.getvalue()))
    loaded = torch_rtx.load(io.BytesIO(file.getvalue()), trusted_ops=["torch_rtx_flow.bump.default"])
    for x in INPUTS[:2]:
        for one in (compiled, module, loaded):
            same(one(x), Bumping()(x))
    assert recorder.fallbacks == ["!functional", "!functional"]


def test_associative_scans():
    """Of elements, which captures for a GPU keep: a sum is a scan of PyTorch, a recurrence is written out."""

    class Scans(nn.Module):
        def forward(self, a, b, mode="pointwise"):
            pair = associative_scan(lambda p, q: (p[0] * q[0], p[1] * q[0] + q[1]), (a, b), 0, combine_mode=mode)
            return *pair, associative_scan(lambda p, q: p + q, b, 1, reverse=True, combine_mode=mode)

    inputs = torch.rand(5, 4), torch.rand(5, 4)
    module = torch_rtx.compile(Scans(), inputs, device="cuda")
    names = {node.op for node in module.engine.graph.nodes}
    assert "python" not in names
    for one, other in zip(module(*inputs), Scans()(*inputs, "generic"), strict=True):
        torch.testing.assert_close(one, other)


def test_a_state_of_numbers_stays_in_pytorch(recorder):
    def f(x):
        return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x.sin()), (0, x))[1]

    same(compile_rtx(f)(INPUTS[0]), f(INPUTS[0]))
    assert "!python" in recorder.ops


LOOP = """\
graph fused {
  input p: bool[()]
  input x: f32[2]
  q: bool[()], y: f32[2] = fallback torch_rtx.while_loop(state=[p, x], operands=[]) graph fused {
    input a: bool[()]
    input b: f32[2]
    c: f32[2] = extern aten.relu.default(self=b)
    d: bool[()] = extern aten.logical_not.default(self=a)
    return [d, c]
  }
  return [y]
}
"""
BRANCH = """t: f32[2] = fallback torch_rtx.call(operands=[a]) graph fused {
      input b: f32[2]
      c: f32[2] = extern aten.relu.default(self=b)
      return [c]
    }
    """
COND = f"""\
graph fused {{
  input p: bool[()]
  input x: f32[2]
  y: f32[2] = fallback torch_rtx.cond(pred=p, operands=[x]) graph import {{
    input a: f32[2]
    {BRANCH}{BRANCH.replace("t: f32", "e: f32").rstrip()}
    return [t, e]
  }}
  return [y]
}}
"""
SCAN = LOOP.replace("while_loop(state=[p, x], operands=[])", "scan(state=[p], rows=[x], operands=[])")
SCAN = SCAN.replace("b: f32[2]", "b: f32[()]").replace("c: f32[2]", "c: f32[()]")
BROKEN = {
    "only to state that it returns": LOOP.replace(
        "c: f32[2] = extern aten.relu.default(self=b)",
        "c: f32[2] = extern aten.relu.default(self=b)\n    extern aten.copy_.default(self=b, src=c)",
    ),
    "does not have the types": LOOP.replace("return [d, c]", "return [c, d]"),
    "begins with a truth value": LOOP.replace("state=[p, x]", "state=[x, p]"),
    "the types of its operands": LOOP.replace("operands=[]", "operands=[x]"),
    "must be two calls": COND.replace(BRANCH, "").replace("[t, e]", "[e]"),
    "must have a truth value": COND.replace("p: bool[()]", "p: f32[()]"),
    "name all of its results": LOOP.replace("q: bool[()]", "_"),
    "no branch of a condition": COND.replace("cond(pred=p, operands", "call(operands"),
    "must have rows": SCAN.replace("rows=[x]", "rows=[]"),
    "all tensors as many": SCAN.replace("y: f32[2]", "y: f32[3]"),
    "without dimensions": SCAN.replace("rows=[x]", "rows=[p]").replace("y: f32[2]", "y: f32[()]"),
}


@pytest.mark.parametrize("text", [LOOP, COND, SCAN])
def test_a_text_reads_back(text):
    check(parse(text).nodes[0])
    assert str(parse(text)) == text


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_rule(problem):
    with pytest.raises(InvalidIR, match=problem):
        check(parse(BROKEN[problem]).nodes[0])
