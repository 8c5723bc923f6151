"""Optimization profiles: inputs by their shapes, what of it the engine keeps, and what its calls may be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.exc import UserError, UserErrorType
from torch.export import Dim
from typer.testing import CliRunner

import torch_rtx
from tests.helpers.ahead import Function, through_file
from tests.helpers.caching import Keys, Traffic
from tests.helpers.compiled import same
from torch_rtx import CaptureError, Input, InputError, InvalidIR
from torch_rtx.cli.app import app
from torch_rtx.ir import Graph, Sym, TensorType, Value, typical_size
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.profiles import Range, check_profiles, shapes
from torch_rtx.runtime.check import check_inputs
from torch_rtx.targets import arch_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class Net(nn.Module):
    """A layer over a batch of sequences, with a mask over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.linear(x).softmax(1) * mask[:, None, None]


def net(folder: Path, x: Input, mask: Input) -> tuple[nn.Module, list[torch_rtx.CompiledModule]]:
    """`Net`, its engine in this process and from a file."""
    model = Net()
    here = torch_rtx.compile(model, (x, mask))
    return model, [here, through_file(here, folder, weights=model)]


def sym(module: torch_rtx.CompiledModule, name: str, axis: int = 0) -> Sym:
    """The symbol of an axis of an input."""
    (type_,) = (value.type for value in module.engine.graph.inputs if value.name == name)
    assert isinstance(type_, TensorType)
    found = type_.shape[axis]
    assert isinstance(found, Sym)
    return found


# ---- what is built ---------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_one_profile(tmp_path: Path) -> None:
    """Right at the ends of the ranges, at the opt shape and between; nothing outside of them."""
    batch = {0: "batch"}
    x = Input(min_shape=(1, 2, 8), opt_shape=(4, 16, 8), max_shape=(8, 32, 8), shared_dims=batch)
    mask = Input(min_shape=(1,), opt_shape=(4,), max_shape=(8,), dtype=torch.int64, shared_dims=batch)
    model, modules = net(tmp_path, x, mask)
    for module in modules:
        for rows, columns in ((1, 2), (4, 16), (8, 32), (3, 7), (1, 32), (8, 2)):
            args = torch.randn(rows, columns, 8), torch.randint(0, 2, (rows,))
            same(module(*args), model(*args), atol=1e-5, rtol=1e-4)
        for rows, columns, axis, span in ((9, 4, 0, "1..8"), (4, 1, 1, "2..32")):
            name, size = ("batch", sym(module, "x", 1).name)[axis], (rows, columns)[axis]
            message = f"dimension {axis} of input 'x' is {size}, outside its range {name} = {span}"
            with pytest.raises(InputError, match=re.escape(message)):
                module(torch.randn(rows, columns, 8), torch.ones(rows, dtype=torch.int64))
        with pytest.raises(InputError, match="dimension 0 of input 'mask' is 3, but dimension 0 of input 'x' is 4 and"):
            module(torch.randn(4, 4, 8), torch.ones(3, dtype=torch.int64))
        expected = {"x": (Range(1, 4, 8), Range(2, 16, 32), 8), "mask": (Range(1, 4, 8),)}
        assert module.profiles == (expected,)
        assert (sym(module, "x").typical, sym(module, "x", 1).typical) == (4, 16)
        assert sym(module, "x") == sym(module, "mask")


def test_several_profiles(tmp_path: Path) -> None:
    """A call is inside of one profile as a whole."""
    shared = {0: "batch"}
    x = Input(profiles=[((1, 64, 8), (1, 64, 8), (2, 128, 8)), ((8, 2, 8), (16, 4, 8), (32, 8, 8))], shared_dims=shared)
    mask = Input(profiles=[((1,), (1,), (2,)), ((8,), (16,), (32,))], shared_dims=shared)
    model, modules = net(tmp_path, x, mask)
    for module in modules:
        for rows, columns in ((1, 64), (2, 128), (2, 99), (8, 2), (32, 8), (16, 4)):
            args = torch.randn(rows, columns, 8), torch.rand(rows)
            same(module(*args), model(*args), atol=1e-5, rtol=1e-4)
        message = "dimension 0 of input 'x' is 5, outside its range batch = 1..2 or 8..32"
        with pytest.raises(InputError, match=re.escape(message)):
            module(torch.randn(5, 4, 8), torch.rand(5))
        message = (
            "dimension 0 of input 'x' is 2, dimension 1 of input 'x' is 4: no profile holds these together\n"
            "  profile 0: dimension 0 of input 'x' 1..2, dimension 1 of input 'x' 64..128\n"
            "  profile 1: dimension 0 of input 'x' 8..32, dimension 1 of input 'x' 2..8"
        )
        for _ in range(2):  # what was refused is not remembered as checked
            with pytest.raises(InputError) as caught:
                module(torch.randn(2, 4, 8), torch.rand(2))
            assert str(caught.value).replace("of input 'mask'", "of input 'x'") == message
        first, second = module.profiles
        assert first["x"] == (Range(1, 1, 2), Range(64, 64, 128), 8)
        assert second == {"x": (Range(8, 16, 32), Range(2, 4, 8), 8), "mask": (Range(8, 16, 32),)}
        assert sym(module, "x") == Sym(sym(module, "x").name, 1, 32, typical=1)  # of all profiles, and of the first


def test_axes_without_a_name_are_free(tmp_path: Path) -> None:
    x = Input(min_shape=(1, 1), opt_shape=(4, 4), max_shape=(9, 9))
    model = Function(lambda x, y: (x * 2, y + 1))
    module = through_file(torch_rtx.compile(model, (x, x)), tmp_path)
    for a, b, c, d in ((1, 1, 1, 1), (4, 4, 4, 4), (2, 9, 1, 3), (9, 2, 5, 7)):
        args = torch.randn(a, b), torch.randn(c, d)
        same(module(*args), model(*args))


def test_nested_inputs_and_keywords(tmp_path: Path) -> None:
    """Beside plain arguments, in any order of keywords, under the names that they were given."""

    class Model(nn.Module):
        def forward(self, batch, scale, *, y, z=None, w=None):
            return {"out": batch["x"] * scale + y, "ids": batch["ids"][0] + 1, "z": z[0] * 2, "w": w}

    n = {0: "n"}
    x = Input(min_shape=(2, 3), opt_shape=(4, 3), max_shape=(6, 3), shared_dims=n, name="image")
    ids = Input(min_shape=(1,), opt_shape=(2,), max_shape=(7,), dtype=torch.int32)
    y = Input(min_shape=(2, 1), opt_shape=(4, 1), max_shape=(6, 1), shared_dims=n, dtype=torch.float64)
    args, kwargs = ({"x": x, "ids": [ids]}, 3), {"z": [Input((2, 2), dtype=torch.float16)], "y": y, "w": torch.ones(2)}
    model = Model()
    module = through_file(torch_rtx.compile(model, args, kwargs), tmp_path)
    assert module.engine.manifest.inputs == ("image", "batch_ids_0", "z_0", "y", "w")
    for size, count in ((2, 1), (4, 2), (6, 7)):
        batch = {"x": torch.randn(size, 3), "ids": [torch.arange(count, dtype=torch.int32)]}
        given = {"z": [torch.ones(2, 2).half()], "y": torch.randn(size, 1).double(), "w": torch.ones(2)}
        same(module(batch, 3, **given), model(batch, 3, **given))
    given["y"] = torch.randn(3, 1).double()
    with pytest.raises(InputError, match="dimension 0 of input 'y' is 3, but dimension 0 of input 'image' is 6"):
        module(batch, 3, **given)
    assert module.profiles[0]["batch_ids_0"] == (Range(1, 2, 7),)


def test_indices() -> None:
    """Integer inputs are traced with values that are valid indices; a size may be 0."""
    model = nn.Embedding(4, 3)
    ids = Input(min_shape=(0,), opt_shape=(1,), max_shape=(5,), dtype=torch.int64)
    module = torch_rtx.compile(model, (ids,))
    for size in range(6):
        given = torch.randint(0, 4, (size,))
        same(module(given), model(given))
    with pytest.raises(InputError, match="outside its range"):
        module(torch.zeros(6, dtype=torch.int64))


def test_static_inputs() -> None:
    """A shape alone is an example without data, also beside dynamic_shapes."""
    model = Net()
    for shapes_of_x in ({"shape": (2, 3, 8)}, dict.fromkeys(("min_shape", "opt_shape", "max_shape"), (2, 3, 8))):
        module = torch_rtx.compile(model, (Input(**shapes_of_x), torch.ones(2)))
        assert module.profiles == ()
        assert module.engine.manifest.profiles == ()
        args = torch.randn(2, 3, 8), torch.ones(2)
        same(module(*args), model(*args), atol=1e-5, rtol=1e-4)
        with pytest.raises(InputError, match="dimension 1 of input 'x' is 4, the engine was built for 3"):
            module(torch.randn(2, 4, 8), torch.ones(2))
    n = Dim("n", min=1, max=9)
    both = (Input((2, 3, 8)), Input((2,)))
    module = torch_rtx.compile(model, both, dynamic_shapes={"x": {0: n}, "mask": {0: n}})
    assert module.profiles == ({"x": (Range(1, None, 9), 3, 8), "mask": (Range(1, None, 9),)},)


def test_profiles_of_dims() -> None:
    """Of torch.export.Dim, with sizes that are expressions and no upper bound."""
    n = Dim("n", min=2, max=8)
    model = Function(lambda x, y: x + y[1:])
    module = torch_rtx.compile(model, (torch.ones(5), torch.ones(6)), dynamic_shapes={"args": ({0: n}, {0: n + 1})})
    assert module.profiles == ({"args_0": (Range(2, None, 8),), "args_1": (Range(3, None, 9),)},)
    free = torch_rtx.compile(nn.ReLU(), (torch.ones(5),), dynamic_shapes={"input": {0: Dim("m")}})
    assert free.profiles == ({"input": (Range(0, None, None),)},)


def test_another_device() -> None:
    """For CUDA without a GPU; the shapes take no memory."""
    x = Input(min_shape=(1, 1 << 20), opt_shape=(1 << 16, 1 << 20), max_shape=(1 << 17, 1 << 20), dtype=torch.bfloat16)
    built = torch_rtx.CompilationSettings(device="cuda")
    module = torch_rtx.compile(nn.ReLU(), (x,), settings=built)
    assert sym(module, "input") == Sym(sym(module, "input").name, 1, 1 << 17, typical=1 << 16)
    assert torch_rtx.compile(nn.ReLU(), (Input((2,), device="cuda"),), settings=built).engine.manifest.device == "cuda"
    with pytest.raises(InputError, match="input 'input' is on cpu, and the engine is for cuda"):
        torch_rtx.compile(nn.ReLU(), (Input((2,), device="cpu"),), settings=built)


def test_mark_dynamic(recorder: Any, fresh_dynamo: None) -> None:
    """Under torch.compile the range that was asked for is that of the symbol."""
    x = torch.randn(4, 3)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
    torch.compile(nn.ReLU(), backend="rtx")(x)
    (found,) = recorder.sessions[0].graph.syms.values()
    assert found == Sym(found.name, 2, 64)


# ---- typical sizes ---------------------------------------------------------------------------------------------------

PRODUCT = """graph import {{
  dim s = 1, 65536, 1{typical}
  input x: f16[s, 4096]
  input w: f16[4096, 4096]
  y: f16[s, 4096] = op aten.linear.default(input=x, weight=w)
  return [y]
}}
"""


def test_kernels_are_chosen_for_typical_sizes() -> None:
    few, many, unknown = (parse(PRODUCT.format(typical=text)) for text in (", 16", ", 16384", ""))
    sources = [generate(graph, "k", arch_of(89), 0) for graph in (few, many, unknown)]
    assert all(sources)
    assert sources[0] != sources[1]
    assert str(parse(str(few))) == str(few)
    assert few.syms["s"].typical == 16


def test_typical_size() -> None:
    dim = parse(PRODUCT.format(typical=", 16")).inputs[0].type.shape[0]  # type: ignore[union-attr]
    assert (typical_size(dim, 1024), typical_size(7, 1024)) == (16, 7)
    assert [typical_size(Sym("s", *ends), 1024) for ends in ((0, None), (0, 8), (2000, 4000))] == [1024, 8, 2000]


# ---- the key ---------------------------------------------------------------------------------------------------------


def test_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal for equal ranges and opt shapes, other for others; later profiles build nothing of their own."""
    keys = Keys(monkeypatch)

    def key(*profiles: Any) -> str:
        keys.found.clear()
        torch_rtx.compile(nn.ReLU(), (Input(profiles=profiles),))
        return str(keys.found[0].digest)

    first = key(((1,), (4,), (8,)))
    assert first == key(((1,), (4,), (8,)))
    assert first == key(((1,), (4,), (6,)), ((3,), (7,), (8,)))
    others = [key(((1,), (5,), (8,))), key(((2,), (4,), (8,))), key(((1,), (4,), (9,)))]
    assert len({first, *others}) == 4


def test_cached_engines_have_their_own_profiles(caplog: pytest.LogCaptureFixture) -> None:
    """The program comes from the cache, names and profiles from the call of compile."""
    traffic = Traffic(caplog)
    one = torch_rtx.compile(nn.ReLU(), (Input(profiles=[((1,), (4,), (8,))]),))
    two = torch_rtx.compile(nn.ReLU(), (Input(profiles=[((1,), (4,), (4,)), ((6,), (7,), (8,))], name="y"),))
    assert traffic.counts == (1, 1)
    assert one.profiles == ({"input": (Range(1, 4, 8),)},)
    assert [profile["y"] for profile in two.profiles] == [(Range(1, 4, 4),), (Range(6, 7, 8),)]
    one(torch.ones(5))
    with pytest.raises(InputError, match=r"dimension 0 of input 'y' is 5, outside its range \w+ = 1..4 or 6..8"):
        two(torch.ones(5))


# ---- in a file -------------------------------------------------------------------------------------------------------


def test_inspect(tmp_path: Path) -> None:
    x = Input(profiles=[((1, 3), (2, 3), (4, 3)), ((8, 3), (8, 3), (16, 3))])
    torch_rtx.save(torch_rtx.compile(nn.ReLU(), (x,)), tmp_path / "m.rtx")
    seen = torch_rtx.inspect(tmp_path / "m.rtx")
    assert "profile 0: input [1..4 (opt 2), 3]\nprofile 1: input [8..16 (opt 8), 3]\n" in str(seen)
    assert CliRunner().invoke(app, ["inspect", str(tmp_path / "m.rtx")]).stdout == f"{seen}\n"
    found = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "m.rtx"), "--json"]).stdout)
    assert found["profiles"] == [{"input": [[1, 2, 4], 3]}, {"input": [[8, 8, 16], 3]}]


S = Sym("s", 2, 9)
ONE = Graph("fused", (Value("x", TensorType("f32", (S, 4), (4, 1))),))


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({}, "profile 0 is of nothing, the inputs have ['s']"),
        ({"t": Range(2, 3, 4)}, "profile 0 is of t, the inputs have ['s']"),
        ({"s": Range(1, 3, 4)}, "profile 0 has s = 1..4 (opt 3), the inputs have 2..9"),
        ({"s": Range(2, 3, 10)}, "profile 0 has s = 2..10 (opt 3)"),
        ({"s": Range(2, 3, None)}, "profile 0 has s = 2..inf (opt 3)"),
        ({"s": Range(3, 2, 4)}, "profile 0 has s = 3..4 (opt 2)"),
        ({"s": Range(4, None, 3)}, "profile 0 has s = 4..3"),
    ],
)
def test_profiles_that_do_not_fit_a_graph(profile: dict[str, Range], message: str) -> None:
    check_profiles(ONE, [{"s": Range(2, None, 9)}])
    with pytest.raises(InvalidIR, match=re.escape(message)):
        check_profiles(ONE, [profile])


# ---- what is refused -------------------------------------------------------------------------------------------------

A, B = ((1, 8), (2, 8), (4, 8)), ((8, 8), (8, 8), (16, 8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "an Input has no shape\n  give a shape, or min_shape, opt_shape and max_shape, or profiles"),
        ({"shape": (2,), "max_shape": (4,)}, "an Input has shape=(2,), max_shape=(4,)\n  give a shape, or"),
        ({"shape": (2,), "profiles": [A]}, "an Input has shape=(2,), profiles=[((1, 8), (2, 8), (4, 8))]\n"),
        (
            {"min_shape": (1,), "max_shape": (4,)},
            "profile 0 of an Input has opt_shape=None, which is not a tuple of sizes",
        ),
        ({"shape": (2, -1)}, "profile 0 of an Input has min_shape=(2, -1), which is not a tuple of sizes"),
        ({"shape": (2, True)}, "has min_shape=(2, True), which is not a tuple of sizes"),
        ({"shape": 4}, "has min_shape=4, which is not a tuple of sizes"),
        ({"shape": (1 << 31,)}, "has min_shape=(2147483648,), which is not a tuple of sizes"),
        ({"profiles": [A, ((8, 8), (4, 8), (16, 8))]}, "profile 1 of an Input has on axis 0 min 8, opt 4, max 16"),
        ({"profiles": [A, ((8,), (8, 8), (16, 8))]}, "profile 1 of an Input has 1, 2, 2 axes"),
        ({"profiles": [A, ((8,), (8,), (16,))]}, "the profiles of an Input have 2, 1 axes"),
        ({"profiles": [A, ((8, 8), (16, 8))]}, "profile 1 of an Input must be (min_shape, opt_shape, max_shape), not"),
        ({"profiles": []}, "the profiles of an Input must be a list of at least one, not []"),
        ({"shape": (2,), "dtype": None, "name": "x"}, "the dtype of input 'x' must be a torch.dtype, not None"),
        ({"shape": (2,), "name": "x y"}, "'x y' is not a valid name of an input"),
        ({"shape": (2,), "shared_dims": {1: "n"}, "name": "x"}, "shared_dims of input 'x' names axis 1 of 1"),
        (
            {"shape": (2,), "shared_dims": {0: "a b"}},
            "names axis 0 'a b', which is not a valid name",
        ),
    ],
)
def test_an_input_that_contradicts_itself(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Input(**fields)


@pytest.mark.parametrize(
    ("inputs", "dynamic_shapes", "message"),
    [
        (
            (Input(profiles=[A]), Input(profiles=[A, B])),
            None,
            "inputs have different numbers of profiles: dimension 0 of input 'x' has 1, dimension 0 of input 'y' has 2",
        ),
        (
            (Input(profiles=[A], shared_dims={0: "n"}), Input(profiles=[B], shared_dims={0: "n"})),
            None,
            "dimension 0 of input 'x' and dimension 0 of input 'y' are both 'n', and have the ranges 1..4 (opt 2) and "
            "8..16 (opt 8)",
        ),
        (
            (Input(profiles=[A], shared_dims={0: "n"}), Input((2, 8), shared_dims={0: "n"})),
            None,
            "are both 'n', and have the ranges 1..4 (opt 2) and 2..2 (opt 2)",
        ),
        (
            (Input(profiles=[((2,), (2,), (2,))] * 2), Input((2,))),
            None,
            "there are 2 profiles, but no size varies",
        ),
        (
            (Input(profiles=[A, B], shared_dims={0: "n"}), Input(profiles=[B, A], shared_dims={0: "n"})),
            None,
            "and have the ranges 1..4 (opt 2), 8..16 (opt 8) and 8..16 (opt 8), 1..4 (opt 2)",
        ),
        ((Input((2,), name="y"), Input((2,))), None, "two inputs have the name 'y'"),
        (
            (Input(min_shape=(0,), opt_shape=(1,), max_shape=(1,)), Input((2,))),
            None,
            "dimension 0 of input 'x' has the range 0..1, which can't be captured\n  let its max be 2 or more",
        ),
        (
            (Input(profiles=[A]), Input((2,))),
            {"x": {0: Dim("n")}, "y": None},
            "dynamic_shapes is given, and dimension 0 of input 'x' has its own range",
        ),
    ],
)
def test_inputs_that_contradict_each_other(inputs: Any, dynamic_shapes: Any, message: str) -> None:
    class Model(nn.Module):
        def forward(self, x, y):
            return x * 2, y * 2

    with pytest.raises(InputError, match=re.escape(message)):
        torch_rtx.compile(Model(), inputs, dynamic_shapes=dynamic_shapes)


def test_text() -> None:
    """What `print` shows."""
    assert str(Input(profiles=[A, B], dtype=torch.int8)) == (
        "Input([1..4 (opt 2), 8..8 (opt 8)], [8..16 (opt 8), 8..8 (opt 8)], torch.int8)"
    )


def test_an_exported_program_has_its_inputs() -> None:
    program = torch.export.export(nn.ReLU(), (torch.ones(3),))
    with pytest.raises(CaptureError, match="an ExportedProgram is already traced"):
        torch_rtx.compile(program, (Input((3,)),))


def free(*shapes: tuple[int, ...], low: int = 1, high: int = 64) -> tuple[Input, ...]:
    """Inputs that are free in their first axis, with these opt shapes."""
    return tuple(Input(min_shape=(low, *s[1:]), opt_shape=s, max_shape=(high, *s[1:])) for s in shapes)


@pytest.mark.parametrize(
    ("function", "inputs", "message", "hint"),
    [
        (
            lambda x: x.view(4, -1),
            free((4, 3)),
            "dimension 0 of input '#0' can only be 4, not 1..64",
            "declare the size 4 alone",
        ),
        (
            lambda x, y: x + y,
            free((4, 3), (4, 3)),
            "dimension 0 of input '#1' always equals dimension 0 of input '#0'",
            "give both one name in shared_dims",
        ),
        (
            lambda x, y: x + y[1:],
            free((4,), (5,)),
            "dimension 0 of input '#1' is always (dimension 0 of input '#0') + 1",
            "declare this by torch.export.Dim in dynamic_shapes",
        ),
        (
            lambda x: x * 2 if x.shape[0] > 5 else x,
            free((16,)),
            "dimension 0 of input '#0' can only be 6..64, not 1..64",
            "declare that range",
        ),
        (
            lambda x: x * 2 if x.shape[0] < 32 else x,
            free((16,)),
            "dimension 0 of input '#0' can only be 1..31, not 1..64",
            "declare that range",
        ),
        (
            lambda x: x.view(-1, 8),
            free((16,), low=8),
            "(L['args'][0].size()[0] % 8) == 0",
            "declare sizes that the model takes, by torch.export.Dim in dynamic_shapes",
        ),
    ],
)
def test_a_model_that_does_not_take_all_sizes(function: Any, inputs: Any, message: str, hint: str) -> None:
    with pytest.raises(CaptureError, match="the model does not take all sizes of its inputs: ") as caught:
        torch_rtx.compile(Function(function), inputs)
    assert message in caught.value.message
    assert caught.value.hint == hint


def test_other_errors_of_a_capture() -> None:
    def refused(x: torch.Tensor) -> torch.Tensor:
        raise UserError(UserErrorType.ANTI_PATTERN, "not like this")

    with pytest.raises(CaptureError, match="UserError: not like this"):
        torch_rtx.compile(Function(refused), free((4,)))
    with pytest.raises(CaptureError, match="decides something in Python by the values of a tensor"):
        torch_rtx.compile(Function(lambda x: x * 2 if x.sum() > 0 else x), free((4,)))


# ---- against an oracle -----------------------------------------------------------------------------------------------

AXES = 3
ranges = st.lists(st.integers(0, 9), min_size=3, max_size=3).map(sorted)
profile_sets = st.lists(st.lists(ranges, min_size=AXES, max_size=AXES), min_size=1, max_size=4)


@settings(max_examples=300)
@given(profile_sets, st.lists(st.integers(0, 9), min_size=AXES, max_size=AXES))
def test_inside_of_some_profile(drawn: list[list[list[int]]], sizes: list[int]) -> None:
    """A call is taken just where all of its sizes are in the ranges of one profile."""
    syms = [Sym(f"s{i}", min(p[i][0] for p in drawn), max(p[i][2] for p in drawn)) for i in range(AXES)]
    types = TensorType("f32", (syms[0], syms[1]), (syms[1], 1)), TensorType("f32", (syms[2],), (1,))
    graph = Graph("fused", (Value("x", types[0]), Value("y", types[1])))
    profiles = [{sym.name: Range(*found) for sym, found in zip(syms, profile, strict=True)} for profile in drawn]
    check_profiles(graph, profiles)
    inputs = [torch.empty(sizes[0], sizes[1]), torch.empty(sizes[2])]
    inside = any(all(low <= n <= high for n, (low, _, high) in zip(sizes, p, strict=True)) for p in drawn)
    if inside:
        check_inputs(graph, inputs, CPU, profiles)
    else:
        with pytest.raises(InputError, match=r"of input '[xy]' is \d"):
            check_inputs(graph, inputs, CPU, profiles)
    assert [shapes(graph, profile)["y"] for profile in profiles] == [(Range(*profile[2]),) for profile in drawn]
