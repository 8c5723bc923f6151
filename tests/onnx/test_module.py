"""`from_onnx`: names, inputs, sizes on the host, functions; eagerly, exported, compiled, trained."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import Dim

pytest.importorskip("onnx_ir")

import onnx
import onnx_ir
from onnx import TensorProto, helper

import torch_rtx
from tests.onnx.models import graph, linear, model, node, one, value
from torch_rtx.errors import InputError
from torch_rtx.onnx import registry
from torch_rtx.onnx.module import from_onnx

X = torch.arange(24.0).reshape(2, 3, 4)


def reference(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x.reshape(len(x), -1) @ module.state_dict()["layer.weight"]


@pytest.mark.parametrize("kind", ["path", "proto", "ir"])
def test_sources(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(linear(), path)
    module = from_onnx({"path": path, "proto": linear(), "ir": onnx_ir.load(path)}[kind])
    assert torch.equal(module(X), reference(module, X))
    assert not module.training


# ---- names -----------------------------------------------------------------------------------------------------------


def test_state_dict_has_the_names_of_the_model() -> None:
    module = from_onnx(linear())
    assert list(module.state_dict()) == ["layer.weight"]
    assert [name for name, _ in module.named_parameters()] == ["layer.weight"]
    module.load_state_dict({"layer.weight": torch.ones(12, 2)})
    assert torch.equal(module(X), X.reshape(2, 12) @ torch.ones(12, 2))


@pytest.mark.parametrize(
    "names",
    [
        ["a", "a.b"],
        ["a.b", "a"],
        [".a", "a..b", "a.", "."],
        ["half", "x.forward", "type", "training"],
        ["_weights", "_runner", "_runner.a", "inputs", "file", "self", "graph", "graph.a", "code"],
        ['a"b', "a\\b.c", "\n", "a\r", "\0", "x" * 300, "self.a", "a.graph"],
        ["onnx::Conv_1", "/layer/weight", "a b", "ü"],
    ],
)
def test_odd_names(names: list[str]) -> None:
    """Each tensor is in the state dict, by its name or by one that `onnx_names` explains; `export` finds it."""
    weights = {name: np.full(2, number, np.float32) for number, name in enumerate(names, 1)}
    sums = [node("Add", f"s{number} w{number}", f"s{number + 1}") for number in range(len(names))]
    for number, name in enumerate(names):
        sums[number].input[1] = name
    made = graph(sums, [value("s0", [2])], [value(f"s{len(names)}", [2])], weights)
    module = from_onnx(model(made))
    found = {module.onnx_names.get(name, name): tensor for name, tensor in module.state_dict().items()}
    assert {name: tensor[0].item() for name, tensor in found.items()} == {n: w[0] for n, w in weights.items()}
    total = sum(range(len(names) + 1))
    assert module(torch.zeros(2)).tolist() == [total, total]
    assert torch.export.export(module, (torch.zeros(2),)).module()(torch.zeros(2)).tolist() == [total, total]
    module.load_state_dict(module.state_dict())


def test_what_is_a_parameter() -> None:
    """Floats are parameters, other weights buffers; numbers of Constant nodes and of shapes belong to the program."""
    nodes = [
        node("Constant", "", "half", value_float=0.5),
        node("Constant", "", "row", value_floats=[1.0, 2.0]),
        node("Mul", "x half", "a"),
        node("Mul", "a row", "b"),
        node("Add", "b bias", "c"),
        node("Gather", "table index", "d"),
        node("Cast", "d", "e", to=TensorProto.FLOAT),
        node("Add", "c e", "f"),
        node("Reshape", "f shape", "y"),
    ]
    weights = {
        "bias": np.float32(1),
        "table": np.arange(6, dtype=np.int8).reshape(3, 2),
        "index": np.arange(2),
        "shape": np.array([4]),
    }
    module = from_onnx(model(graph(nodes, [value("x", [2, 2])], [value("y", [4])], weights)))
    assert {name for name, _ in module.named_parameters()} == {"bias", "row"}
    assert set(module.state_dict()) == {"bias", "row", "table", "index"}
    assert module(torch.ones(2, 2)).tolist() == [1.5, 3.0, 3.5, 5.0]


def test_state_is_not_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    """What operators read only as state is a buffer. A parameter that is both gets no gradient from it."""
    monkeypatch.setattr(registry, "OPERATORS", {**registry.OPERATORS})

    @registry.op("Centred", domain="mine", state=("mean",))
    def centred(x: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        assert not mean.requires_grad
        return (x - mean) * scale

    calls = [
        helper.make_node("Centred", ["x", mean, "scale"], [y], domain="mine") for mean, y in (("m", "a"), ("n", "y"))
    ]
    calls[1].input[0] = "b"
    nodes = [calls[0], node("Add", "a n", "b"), calls[1]]
    weights = {name: np.full(2, number, np.float32) for name, number in {"m": 1, "n": 2, "scale": 3}.items()}
    whole = model(graph(nodes, [value("x", [2])], [value("y")], weights))
    whole.opset_import.append(helper.make_opsetid("mine", 1))
    module = from_onnx(whole)
    assert {name for name, _ in module.named_parameters()} == {"n", "scale"}
    assert set(module.state_dict()) == {"m", "n", "scale"}
    module(torch.zeros(2)).sum().backward()
    assert module.get_parameter("n").grad.tolist() == [3, 3]


# ---- inputs and outputs ----------------------------------------------------------------------------------------------


def test_arguments() -> None:
    made = graph(
        [node("Add", "input.1 2nd", "y")],
        [value("input.1", [2]), value("2nd", ["n"])],
        [value("y")],
        {"2nd": np.ones(2, np.float32)},
    )
    module = from_onnx(model(made))
    assert str(inspect.signature(module.forward)) == "(input_1, _2nd=None)"
    assert module(torch.ones(2)).tolist() == [2, 2]
    assert module(input_1=torch.ones(2), _2nd=torch.zeros(2)).tolist() == [1, 1]
    for args, kwargs, message in (
        ((), {}, "the input 'input.1' is missing"),
        ((X, X, X), {}, "2 inputs"),
        ((torch.ones(2),), {"other": X}, "no input 'other'"),
        ((torch.ones(3),), {}, "size 3 on axis 0, not 2"),
        ((torch.ones(2, 2),), {}, "2 axes, not 1"),
        ((torch.ones(2, dtype=torch.int32),), {}, "dtype torch.int32, not torch.float32"),
        ((np.ones(2),), {}, "'input.1' is a tensor, not of type ndarray"),
        ((None,), {}, "'input.1' is a tensor, not of type NoneType"),
    ):
        with pytest.raises(InputError, match=message):
            module(*args, **kwargs)


def test_sequences_as_inputs() -> None:
    given = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [2])
    whole = model(graph([node("ConcatFromSequence", "s", "y", axis=0)], [given], [value("y")]))
    module = from_onnx(whole)
    assert module([torch.ones(2), torch.zeros(2)]).tolist() == [1, 1, 0, 0]
    for wrong in (torch.ones(2), (torch.ones(2),)):
        with pytest.raises(InputError, match="'s' is a list of tensors, not of type"):
            module(wrong)
    with pytest.raises(InputError, match="input 's'"):
        torch_rtx.compile(whole)


def test_other_dtypes() -> None:
    """Inputs have the dtype that the module was cast to."""
    module = from_onnx(linear()).half()
    assert module(X.half()).dtype == torch.float16
    with pytest.raises(InputError, match=r"dtype torch.float32, not torch.float16"):
        module(X)
    compiled = torch_rtx.compile(module, dynamic_shapes={"batch": 2})
    torch.testing.assert_close(compiled(X.half()), module(X.half()))


def test_casts_to_float32_follow_the_module() -> None:
    """As weights do, also below If; not those of sizes, which half precision could not hold."""
    then = graph([node("Cast", "c", "t", to=TensorProto.FLOAT)], [], [value("t")])
    nodes = [
        node("Shape", "x", "shape"),
        node("Cast", "shape", "sizes", to=TensorProto.FLOAT),
        node("Cast", "sizes", "whole", to=TensorProto.INT64),
        node("ConstantOfShape", "whole", "zeros", value=onnx.numpy_helper.from_array(np.zeros(1, np.float32))),
        node("Cast", "x", "a", to=TensorProto.FLOAT),
        node("Mul", "a weight", "b"),
        node("Add", "b zeros", "c"),
        node("If", "condition", "y", then_branch=then, else_branch=then),
        node("Cast", "y", "z", to=TensorProto.DOUBLE),
    ]
    weights = {"weight": np.ones(1, np.float32), "condition": np.array(True)}
    inputs, outputs = [value("x", [4099], TensorProto.INT64)], [value("y"), value("z")]
    module = from_onnx(model(graph(nodes, inputs, outputs, weights)))
    x = torch.ones(4099, dtype=torch.int64)
    for dtype in (torch.float32, torch.float16, torch.float32):
        module = module.to(dtype)
        y, z = copy.deepcopy(module)(x)
        assert (y.dtype, z.dtype) == (dtype, torch.float64)
        assert y.shape == (4099,)


def test_floats_of_the_host_follow_the_module() -> None:
    """Beside tensors of its dtype, as a mask of sizes does that is added to scores."""
    nodes = [
        node("Shape", "x", "shape"),
        node("Cast", "shape", "sizes", to=TensorProto.FLOAT),
        node("Add", "x sizes", "sum"),
        node("MatMul", "sum weight", "y"),
    ]
    made = graph(nodes, [value("x", [3, 2])], [value("y")], {"weight": np.eye(2, dtype=np.float32)})
    for dtype in (torch.float16, torch.float64):
        module = from_onnx(model(made)).to(dtype)
        found = module(torch.zeros(3, 2, dtype=dtype))
        torch.testing.assert_close(found, torch.tensor([[3, 2]] * 3, dtype=dtype))


@pytest.mark.parametrize("op", ["Expand", "Gather"])
def test_weights_that_computed_sizes_move_are_weights(op: str) -> None:
    """They are no part of the program, however small: training and refits change them."""
    nodes = [node("Shape", "x", "shape"), node(op, "weight shape", "moved"), node("Add", "x moved", "y")]
    weight = np.arange(1, 3 if op == "Expand" else 5, dtype=np.float32)
    module = from_onnx(model(graph(nodes, [value("x", [3, 2])], [value("y")], {"weight": weight})))
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert not module(torch.zeros(3, 2)).equal(torch.zeros(3, 2))
    module.get_parameter("weight").data.zero_()
    assert module(torch.zeros(3, 2)).equal(torch.zeros(3, 2))


def test_outputs() -> None:
    made = graph([node("Identity", "x", "y")], [value("x", [2])], [value("y"), value("x")])
    module = from_onnx(model(made))
    found = module(torch.ones(2))
    assert isinstance(found, tuple)
    assert module.output_names == ("y", "x")


def test_copies() -> None:
    module = from_onnx(linear())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(X), module(X))
        with torch.no_grad():
            other.get_parameter("layer.weight").zero_()
        assert not other(X).any()
        assert module(X).any()


def test_training() -> None:
    module = from_onnx(linear())
    module(X).sum().backward()
    assert torch.equal(module.get_parameter("layer.weight").grad, X.reshape(2, 12).sum(0)[:, None].expand(12, 2))


# ---- capture ---------------------------------------------------------------------------------------------------------


def test_sizes_are_symbols_of_a_capture() -> None:
    module = from_onnx(linear())
    program = torch.export.export(module, (X,), dynamic_shapes=({0: Dim("batch")},))
    called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert called == ["aten.sym_size.int", "aten.reshape.default", "aten.matmul.default"]
    assert torch.equal(program.module()(torch.cat([X, X])), reference(module, torch.cat([X, X])))


def test_torch_compile() -> None:
    module = from_onnx(linear())
    compiled = torch.compile(module, backend="rtx", dynamic=True, fullgraph=True)
    for x in (X, torch.cat([X, X])):
        torch.testing.assert_close(compiled(x), reference(module, x))
    with torch.no_grad():
        module.get_parameter("layer.weight").mul_(2)
    torch.testing.assert_close(compiled(X), reference(module, X))


def test_torch_compile_of_sizes_of_data() -> None:
    """A size that data decides may be inside of the model alone."""
    nodes = [node("NonZero", "x", "places"), node("Cast", "places", "f", to=1), node("ReduceSum", "f", "y", keepdims=0)]
    module = from_onnx(model(graph(nodes, [value("x", [4])], [value("y")])))
    compiled = torch.compile(module, backend="rtx", fullgraph=True)
    for x in (torch.tensor([1.0, 0, 2, 3]), torch.zeros(4)):
        assert compiled(x) == module(x)


# ---- functions -------------------------------------------------------------------------------------------------------


def test_functions_are_called_by_value() -> None:
    """A function is in the place of each of its calls, with their attributes and optional inputs, and its own opset."""
    made = graph(
        [
            helper.make_node("Scaled", ["x"], ["a"], domain="mine", factor=3.0),
            helper.make_node("Scaled", ["a", "x"], ["y"], domain="mine"),
        ],
        [value("x", [2])],
        [value("y")],
    )
    factor = helper.make_node("Constant", [], ["f"])
    factor.attribute.append(
        onnx.AttributeProto(name="value_float", ref_attr_name="factor", type=onnx.AttributeProto.FLOAT)
    )
    product = helper.make_node("Mul", ["v", "f"], ["p"])
    bounded = helper.make_node("Clip", ["p", "low"], ["r"])
    default = helper.make_attribute("factor", 2.0)
    function = helper.make_function(
        "mine", "Scaled", ["v", "low"], ["r"], [factor, product, bounded],
        [helper.make_opsetid("", 13)], attribute_protos=[default],
    )  # fmt: skip
    whole = model(made, functions=[function])
    whole.opset_import.append(helper.make_opsetid("mine", 1))
    module = from_onnx(whole)
    assert module(torch.tensor([1.0, -1.0])).tolist() == [6.0, -1.0]


def test_operators_that_onnx_defines_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_rtx.onnx.registry import OPERATORS

    monkeypatch.delitem(OPERATORS, ("", "HardSwish"), raising=False)
    x = torch.linspace(-4, 4, 9)
    torch.testing.assert_close(from_onnx(one("HardSwish", {"x": x.numpy()}))(), torch.nn.functional.hardswish(x))


# ---- ahead of time ---------------------------------------------------------------------------------------------------


def test_compile_takes_a_path(tmp_path: Path) -> None:
    """Sizes have the model's names, and weights refit by theirs."""
    path = tmp_path / "model.onnx"
    onnx.save(linear(), path)
    compiled = torch_rtx.compile(path, dynamic_shapes={"batch": (1, 2, 8)})
    module = from_onnx(path)
    torch.testing.assert_close(compiled(X), reference(module, X))
    with pytest.raises(InputError, match="batch"):
        compiled(torch.ones(9, 3, 4))
    compiled.refit({"layer.weight": torch.ones(12, 2)})
    torch.testing.assert_close(compiled(X), X.reshape(2, 12) @ torch.ones(12, 2))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (None, "leaves the sizes batch open"),
        ({"batch": 2, "other": 3}, "no size 'other'"),
        ({"batch": "2"}, "size 'batch' is '2'"),
        ([2], "sizes by their names"),
    ],
)
def test_sizes_that_compile_refuses(sizes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        torch_rtx.compile(linear(), dynamic_shapes=sizes)


def test_memory_is_freed_at_once() -> None:
    """A module is in no cycle, so that its weights do not stay until the next garbage collection."""
    from_onnx(linear())  # the first one imports Dynamo, and errors in there keep frames
    module = from_onnx(linear())
    seen = weakref.ref(module)
    gc.disable()
    try:
        del module
        assert seen() is None
    finally:
        gc.enable()


def test_equal_numbers_are_one() -> None:
    constants = [node("Constant", "", f"c{n}", value_float=number) for n, number in enumerate([2.0, 3.0, 2.0])]
    constants.append(node("Constant", "", "c3", value_int=2))
    nodes = [node("Mul", "x c0", "a"), node("Add", "a c1", "b"), node("Mul", "b c2", "c"), node("Pow", "c c3", "y")]
    module = from_onnx(model(graph([*constants, *nodes], [value("x", [2])], [value("y", [2])])))
    assert module(torch.tensor([0.0, 1.0])).tolist() == [36.0, 100.0]
    assert sorted(tensor.item() for tensor in module.buffers()) == [2, 2.0, 3.0]
