"""Weights from ONNX models for engines: found by place, by name or by product, or refused with both lists."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnx_ir")

import onnx
import onnx_ir

import torch_rtx
from tests.onnx.models import graph, model, node, value
from torch_rtx import from_onnx
from torch_rtx.errors import RefitError
from torch_rtx.onnx import weights
from torch_rtx.onnx.weights import program_of, weights_of

X = torch.linspace(-1, 1, 8).reshape(2, 4)
NAMES = ("left", "right", "onnx::MatMul_7", "layer.bias")


def network(seed: int, names: tuple[str, ...] = NAMES) -> onnx.ModelProto:
    """Two products of one shape that are added, a third, a bias, and numbers that belong to the program."""
    draw = np.random.default_rng(seed)
    left, right, last, bias = names
    nodes = [
        node("MatMul", f"x {left}", "a"),
        node("MatMul", f"x {right}", "b"),
        node("Constant", "", "scale", value_float=0.5),
        node("Mul", "b scale", "c"),
        node("Add", "a c", "d"),
        node("Reshape", "d shape", "e"),
        node("MatMul", f"e {last}", "f"),
        node("Add", f"{bias} f", "y"),
    ]
    shapes = {left: (4, 4), right: (4, 4), last: (4, 4), bias: (4,)}
    stored = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    stored |= {"shape": np.array([2, 4])}
    return model(graph(nodes, [value("x", [2, 4])], [value("y", [2, 4])], stored))


def renamed(whole: onnx.ModelProto, names: Mapping[str, str]) -> onnx.ModelProto:
    """The model with other names of initializers, in another order."""
    other = onnx.ModelProto()
    other.CopyFrom(whole)
    for tensor in other.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for one in other.graph.node:
        one.input[:] = [names.get(name, name) for name in one.input]
    backwards = list(other.graph.initializer)[::-1]
    del other.graph.initializer[:]
    other.graph.initializer.extend(backwards)
    return other


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    onnx.save(network(0), folder / "a.onnx")
    with torch.no_grad():
        torch_rtx.save(torch_rtx.compile(folder / "a.onnx"), folder / "a.rtx")
    return folder / "a.rtx"


def wanted_of(module: nn.Module) -> dict[str, Any]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in module.state_dict().items()}


def sources(folder: Path) -> dict[str, Any]:
    """One network in all forms that a model may have."""
    whole = network(1)
    turned = renamed(whole, dict(zip(NAMES, ("onnx::MatMul_7", "left", "val_3", "w"), strict=True)))
    onnx.save(whole, folder / "same.onnx")
    onnx.save(turned, folder / "renamed.onnx")
    apart = renamed(whole, {})  # `save` moves its data
    onnx.save(apart, folder / "external.onnx", save_as_external_data=True, location="data", size_threshold=0)
    typed = network(1)
    for tensor in typed.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.float_data.extend(np.frombuffer(tensor.raw_data, np.float32).tolist())
            tensor.ClearField("raw_data")
    onnx.save(typed, folder / "typed.onnx")
    files = {name: folder / f"{name}.onnx" for name in ("same", "renamed", "external", "typed")}
    loaded = {"proto": turned, "ir": onnx_ir.serde.deserialize_model(turned), "module": from_onnx(turned)}
    return {**files, "text": str(folder / "same.onnx"), **loaded}


def test_every_form_of_a_model(engine: Path, tmp_path: Path) -> None:
    expected = from_onnx(network(1))(X)
    for name, source in sources(tmp_path).items():
        torch.testing.assert_close(torch_rtx.load(engine, weights=source)(X), expected, msg=name)
        module = torch_rtx.load(engine, weights=engine.with_suffix(".onnx"))
        assert not torch.allclose(module(X), expected)
        module.refit(source)
        torch.testing.assert_close(module(X), expected, msg=name)


def test_a_file_with_the_same_frame_is_not_parsed(engine: Path, tmp_path: Path, monkeypatch: Any) -> None:
    files = sources(tmp_path)
    monkeypatch.setattr(weights, "read_module", lambda *_, **__: pytest.fail("parsed"))
    module = torch_rtx.load(engine, weights=files["same"])
    onnx.save(network(2), tmp_path / "same.onnx")  # what was mapped is copied by now
    torch.testing.assert_close(module(X), from_onnx(network(1))(X))
    for name in ("renamed", "external", "typed"):
        with pytest.raises(pytest.fail.Exception, match="parsed"):
            module.refit(files[name])


def test_places_count_more_than_names(engine: Path) -> None:
    """Names that changed their places give the file's results, not those of the names."""
    swapped = network(3, ("right", "left", *NAMES[2:]))
    module = torch_rtx.load(engine, weights=swapped)
    torch.testing.assert_close(module(X), from_onnx(swapped)(X))


@pytest.mark.parametrize("form", ["file", "proto"])
def test_numbers_of_the_program_are_not_refitted(form: str, engine: Path, tmp_path: Path) -> None:
    module = torch_rtx.load(engine, weights=network(1))
    before = module(X)
    other = network(2)
    (constant,) = (one for one in other.graph.node if one.op_type == "Constant")
    constant.attribute[0].f = 0.25
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(RefitError, match="scale: is part of the program") as caught:
        module.refit(other if form == "proto" else tmp_path / "other.onnx")
    assert set(caught.value.mismatched) == {"scale"}
    (shape,) = (tensor for tensor in other.graph.initializer if tensor.name == "shape")
    constant.attribute[0].f, shape.raw_data = 0.5, np.array([-1, 4]).tobytes()
    with pytest.raises(RefitError, match="shape: is part of the program"):
        module.refit(other)
    assert torch.equal(module(X), before)


def test_types_that_differ(engine: Path) -> None:
    wide = network(1)
    for tensor in wide.graph.initializer:
        if tensor.name == "layer.bias":
            tensor.dims[:] = [1, 4]
        elif tensor.name == "left":
            tensor.data_type, tensor.raw_data = onnx.TensorProto.DOUBLE, np.ones((4, 4)).tobytes()
    with pytest.raises(RefitError) as caught:
        torch_rtx.load(engine, weights=wide)
    assert caught.value.mismatched == {
        "left": "expected dtype torch.float32, got torch.float64",
        "layer.bias": "expected shape [4], got [1, 4]",
    }


def of_another_program(seed: int, names: tuple[str, ...] = NAMES) -> onnx.ModelProto:
    whole = network(seed, names)
    whole.graph.node.append(node("Identity", "y", "z"))
    whole.graph.output[0].name = "z"
    return whole


def test_another_program_gives_weights_by_name(engine: Path, caplog: Any) -> None:
    names = (*NAMES[:2], "last", NAMES[3])
    built = program_of(from_onnx(network(0, names)))
    module = from_onnx(of_another_program(1, names))
    found = weights_of(module, wanted_of(module), built, {})
    assert {name: id(tensor) for name, tensor in found.items()}.keys() == set(names)
    assert all(torch.equal(found[name], module.state_dict()[name]) for name in names)
    assert "holds another program" in caplog.text


def test_counted_names_mean_nothing_in_another_program(engine: Path) -> None:
    """`onnx::MatMul_7` is found by the bias of its product; without one, it may be any matrix, and is refused."""
    module = torch_rtx.load(engine)
    other = of_another_program(1)
    module.refit(other)
    torch.testing.assert_close(module(X), from_onnx(other)(X))
    names = ("onnx::MatMul_1", "onnx::MatMul_2", "onnx::MatMul_7", "onnx::Add_9")
    with pytest.raises(RefitError) as caught:
        module.refit(of_another_program(1, names))
    assert caught.value.missing == NAMES
    assert set(caught.value.unexpected) == {"onnx::MatMul_7 (elsewhere)", *names} - {"onnx::MatMul_7"}
    torch.testing.assert_close(module(X), from_onnx(other)(X))


# ---- any program -----------------------------------------------------------------------------------------------------


def drawn(draw: random.Random) -> onnx.ModelProto:
    """A program of random connections, with weights that several nodes share, and branches of an If with weights."""
    made, nodes, stored = ["x"], [], {f"w{n}": np.random.default_rng(n).random((4, 4), np.float32) for n in range(5)}
    for number in range(draw.randint(3, 12)):
        op = draw.choice(["MatMul", "Add", "Mul", "Relu", "Transpose", "If"])
        operands = [draw.choice(made), draw.choice([*made, *stored])][: 1 + (op in ("MatMul", "Add", "Mul"))]
        name = f"v{number}"
        if op == "If":
            branches = [
                graph([node(kind, f"{operands[0]} {inner}", f"{inner}_y")], [], [value(f"{inner}_y", [4, 4])])
                for kind, inner in (("Add", f"t{number}"), ("MatMul", f"e{number}"))
            ]
            for branch, inner in zip(branches, (f"t{number}", f"e{number}"), strict=True):
                array = np.random.default_rng(len(inner) + number).random((4, 4), np.float32)
                branch.initializer.append(onnx.numpy_helper.from_array(array, inner))
            nodes.append(node("ReduceSum", operands[0], f"s{number}", keepdims=0))
            nodes.append(node("Cast", f"s{number}", f"c{number}", to=onnx.TensorProto.BOOL))
            nodes.append(node("If", f"c{number}", name, then_branch=branches[0], else_branch=branches[1]))
        else:
            nodes.append(node(op, " ".join(operands), name))
        made.append(name)
    return model(graph(nodes, [value("x", [4, 4])], [value(made[-1], [4, 4])], stored))


def in_another_order(whole: onnx.ModelProto, draw: random.Random) -> onnx.ModelProto:
    """The model with its nodes in another order and other names of all values, those of subgraphs included."""
    other = onnx.ModelProto()
    other.CopyFrom(whole)
    left, known, nodes = list(other.graph.node), {"x", *(t.name for t in other.graph.initializer)}, []
    while left:
        ready = [one for one in left if _reads(one) <= known]
        nodes.append(left.pop(left.index(draw.choice(ready))))
        known.update(nodes[-1].output)
    del other.graph.node[:]
    other.graph.node.extend(nodes)
    _rename(other.graph, {"x": "x"}, draw)
    return other


def _reads(one: onnx.NodeProto) -> set[str]:
    inner = [branch for attribute in one.attribute if attribute.HasField("g") for branch in [attribute.g]]
    own = {t.name for branch in inner for t in branch.initializer} | {
        n for b in inner for m in b.node for n in m.output
    }
    return (set(one.input) | {name for branch in inner for m in branch.node for name in m.input}) - own


def _rename(whole: onnx.GraphProto, names: dict[str, str], draw: random.Random) -> None:
    for named in (*whole.initializer, *(_Output(one, at) for one in whole.node for at in range(len(one.output)))):
        names[named.name] = named.name = f"n{draw.getrandbits(60)}"
    for one in whole.node:
        one.input[:] = [names[name] for name in one.input]
        for attribute in one.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, names, draw)
    for output in whole.output:
        output.name = names[output.name]


class _Output:
    """An output of a node as something with a name."""

    def __init__(self, one: onnx.NodeProto, at: int) -> None:
        self.__dict__.update(one=one, at=at)

    def __getattr__(self, name: str) -> str:
        return self.one.output[self.at]

    def __setattr__(self, name: str, text: str) -> None:
        self.one.output[self.at] = text


@pytest.mark.parametrize("seed", range(30))
def test_renamed_programs(seed: int) -> None:
    """Whatever the names and the order of nodes: each weight is found, and the results are those of the file."""
    draw = random.Random(seed)
    whole = drawn(draw)
    module, other = from_onnx(whole), from_onnx(in_another_order(whole, draw))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape))
    found = weights_of(other, wanted_of(module), program_of(module), {})
    module.load_state_dict(module.state_dict() | found)
    x = torch.randn(4, 4)
    torch.testing.assert_close(module(x), other(x))


@pytest.mark.parametrize("change", ["op", "attribute", "connection", "output"])
def test_outlines_tell_programs_apart(change: str) -> None:
    nodes = [node("Gemm", "x w", "a", alpha=1.0), node("Sub", "a x", "b"), node("Relu", "b", "y")]
    outputs = [value("y", [4, 4]), value("a", [4, 4])]
    first = model(graph(nodes, [value("x", [4, 4])], outputs, {"w": np.ones((4, 4), np.float32)}))
    if change == "op":
        nodes[2].op_type = "Sigmoid"
    elif change == "attribute":
        nodes[0].attribute[0].f = 2.0
    elif change == "connection":
        nodes[1].input[:] = ["x", "a"]
    second = model(
        graph(
            nodes, [value("x", [4, 4])], outputs[:: -1 if change == "output" else 1], {"w": np.ones((4, 4), np.float32)}
        )
    )
    digests = {from_onnx(one).outline().structure for one in (first, second)}
    assert len(digests) == 2


def test_frames_of_modules_that_changed(tmp_path: Path) -> None:
    """A module whose tensors are no longer as in its file has no frame: another file's bytes are not like them."""
    onnx.save(network(0), tmp_path / "a.onnx")
    assert program_of(from_onnx(tmp_path / "a.onnx"))["frame"] is not None
    assert program_of(from_onnx(tmp_path / "a.onnx").half())["frame"] is None
    assert program_of(from_onnx(network(0)))["frame"] is None


def test_frames_say_nothing_of_other_files(tmp_path: Path) -> None:
    """A number of the program that is in another file is compared like the others."""
    for folder, sizes in (("a", [4, 2]), ("b", [2, 4])):
        nodes = [node("MatMul", "x w", "a"), node("Reshape", "a shape", "y")]
        weights = {"w": np.ones((4, 4), np.float32), "shape": np.array(sizes)}
        whole = model(graph(nodes, [value("x", [2, 4])], [value("y")], weights))
        (shape,) = (tensor for tensor in whole.graph.initializer if tensor.name == "shape")
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "shape").write_bytes(shape.raw_data)
        shape.ClearField("raw_data")
        shape.data_location = onnx.TensorProto.EXTERNAL
        shape.external_data.add(key="location", value="shape")
        onnx.save(whole, tmp_path / folder / "model.onnx")
    built = from_onnx(tmp_path / "a" / "model.onnx")
    program = program_of(built)
    assert program["frame"] is None
    with pytest.raises(RefitError, match="shape: is part of the program"):
        weights_of(tmp_path / "b" / "model.onnx", wanted_of(built), program, {})


def test_constants_of_one_number_are_compared() -> None:
    def scaled(scale: float) -> onnx.ModelProto:
        nodes = [node("Constant", "", "scale", value_floats=[scale] * 4), node("Mul", "x scale", "a")]
        nodes.append(node("MatMul", "a w", "y"))
        return model(graph(nodes, [value("x", [2, 4])], [value("y")], {"w": np.ones((4, 4), np.float32)}))

    built = from_onnx(scaled(1))
    assert "w" in weights_of(scaled(1), wanted_of(built), program_of(built), {})
    with pytest.raises(RefitError, match="scale: is part of the program"):
        weights_of(scaled(3), wanted_of(built), program_of(built), {})


# ---- engines of PyTorch modules --------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Square layers with and without a bias, a product that is no layer, a tied matrix, and a norm by a name that
    modules of `from_onnx` have for something else."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.third, self.free = nn.Linear(4, 4, bias=False), nn.Parameter(torch.randn(4, 4))
        self.file = nn.LayerNorm(4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.file(self.first(self.table(ids)))
        return (self.second(x) * self.third(x).sigmoid() @ self.free) @ self.table.weight.t()


IDS = torch.tensor([[0, 1, 5], [2, 3, 4]])


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, Path]:
    """An engine of a module, a module with other weights, and its ONNX model by PyTorch's exporter."""
    folder, (built, other) = tmp_path_factory.mktemp("layers"), (Layers().eval(), Layers().eval())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_rtx.save(torch_rtx.compile(built, (IDS,)), folder / "module.rtx")
        torch.onnx.export(other, (IDS,), str(folder / "other.onnx"), dynamo=False)
    return folder / "module.rtx", other, folder / "other.onnx"


def test_matrices_that_an_exporter_transposed(layers: tuple[Path, nn.Module, Path]) -> None:
    engine, other, file = layers
    stored = {tensor.name for tensor in onnx.load(file).graph.initializer}
    assert not stored & {"first.weight", "second.weight", "third.weight"}, "the exporter renames them"
    module = torch_rtx.load(engine, weights=file)
    torch.testing.assert_close(module(IDS), other(IDS))


def test_matrices_that_could_be_several(layers: tuple[Path, nn.Module, Path]) -> None:
    """Without the names of modules, layers without a bias can't be told apart: both lists are reported."""
    engine, _, file = layers
    whole = onnx.load(file)
    for one in whole.graph.node:
        one.name = ""
    with pytest.raises(RefitError) as caught:
        torch_rtx.load(engine).refit(whole)
    assert set(caught.value.missing) == {"second.weight", "third.weight"}
    assert len(caught.value.unexpected) == 2
    assert all(name.startswith("onnx::MatMul") for name in caught.value.unexpected)


def test_a_matrix_that_is_transposed_under_its_name(layers: tuple[Path, nn.Module, Path]) -> None:
    engine, other, file = layers
    whole = onnx.load(file)
    products = [one.input[1] for one in whole.graph.node if one.op_type == "MatMul" and "layer" not in one.input[1]]
    names = {products[0]: "first.weight", products[1]: "second.weight"}
    torch.testing.assert_close(torch_rtx.load(engine, weights=renamed(whole, names))(IDS), other(IDS))


TURN: dict[str, Any] = {"perm": [1, 0]}
MULTIPLIED = graph([node("MatMul", "x w", "z")], [], [value("z")])
USES: dict[str, list[Any]] = {
    "Gemm": [node("Gemm", "x w", "y", transB=1)],
    "half of a Gemm": [node("Gemm", "x w", "y", transB=1, alpha=0.5)],
    "left": [node("Transpose", "x", "a", **TURN), node("MatMul", "w a", "b"), node("Transpose", "b", "y", **TURN)],
    "left Gemm": [node("Gemm", "w x", "a", transA=1, transB=1), node("Transpose", "a", "y", **TURN)],
    "Identity": [node("Identity", "w", "a"), node("MatMul", "x a", "y")],
    "Transpose": [node("Identity", "w", "a"), node("Transpose", "a", "b", **TURN), node("MatMul", "x b", "y")],
    "Cast": [node("Cast", "w", "a", to=11), node("CastLike", "a x", "b"), node("MatMul", "x b", "y")],
    "microsoft": [node("FusedMatMul", "x w", "y", domain="com.microsoft", transB=1)],
    "Einsum": [node("Einsum", "x w", "y", equation="ij,kj->ik")],
    "Mul": [node("Mul", "w w", "a"), node("MatMul", "x a", "y")],
    "Gather": [node("Gather", "w one", "a", axis=1), node("Add", "x a", "y")],
    "If": [node("If", "yes", "y", then_branch=MULTIPLIED, else_branch=MULTIPLIED)],
    "Gemm and MatMul": [node("Gemm", "x w", "a", transB=1), node("MatMul", "a w", "y")],
}
SUMMED = {"Gemm": 1, "half of a Gemm": 1, "left": 1, "left Gemm": 0, "Identity": 0, "Transpose": 1, "Cast": 0}
SUMMED |= {"microsoft": 1, "If": 0}


@pytest.mark.parametrize("use", USES)
def test_a_square_matrix_of_a_name(use: str) -> None:
    """It is transposed if the products of both programs differ in the axis that they sum over, and refused if what the
    model does with it tells no axis."""
    stored = {"w": np.arange(4, dtype=np.float32).reshape(2, 2), "one": np.array([1]), "yes": np.array(True)}
    whole = model(graph(USES[use], [value("x", [2, 2])], [value("y")], stored))
    whole.opset_import.add(domain="com.microsoft", version=1)
    wanted, facts = {"w": (torch.float32, (2, 2))}, {"w": {"axis": 1, "bias": None, "module": None}}
    if use not in SUMMED:
        with pytest.raises(RefitError, match="w: is square, and nothing in the model says whether it is transposed"):
            weights_of(whole, wanted, None, facts)
        assert "w" in weights_of(whole, wanted, None, {})
    else:
        found = weights_of(whole, wanted, None, facts)["w"]
        assert found.tolist() == ([[0, 1], [2, 3]] if SUMMED[use] == 1 else [[0, 2], [1, 3]])


def test_a_square_table() -> None:
    """A matrix of which rows are read is as it is stored, whatever the engine multiplies it with, too."""
    weights = {"w": np.arange(4, dtype=np.float32).reshape(2, 2)}
    whole = model(graph([node("Gather", "w x", "y")], [value("x", [2], onnx.TensorProto.INT64)], [value("y")], weights))
    facts = {"w": {"axis": 1, "bias": None, "module": None}}
    assert weights_of(whole, {"w": (torch.float32, (2, 2))}, None, facts)["w"].tolist() == [[0, 1], [2, 3]]


def test_names_of_equal_tensors() -> None:
    """An exporter stores them once, and Identity nodes give them their other names."""
    nodes = [node("Identity", "onnx::Add_1", "a.bias"), node("Identity", "a.bias", "b.bias")]
    nodes += [node("Identity", "a.weight", "b.weight"), node("MatMul", "x a.weight", "a"), node("Add", "a a.bias", "b")]
    nodes += [node("MatMul", "b b.weight", "c"), node("Add", "c b.bias", "y")]
    stored = {"onnx::Add_1": np.zeros(2, np.float32), "a.weight": np.arange(4, dtype=np.float32).reshape(2, 2)}
    whole = model(graph(nodes, [value("x", [2, 2])], [value("y")], stored))
    facts = {name: {"axis": 1, "bias": None, "module": None} for name in ("a.weight", "b.weight")}
    wanted = {"a.bias": (2,), "b.bias": (2,), "a.weight": (2, 2), "b.weight": (2, 2)}
    found = weights_of(whole, {name: (torch.float32, shape) for name, shape in wanted.items()}, None, facts)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == wanted
    assert found["a.weight"].tolist() == found["b.weight"].tolist() == [[0, 2], [1, 3]]


def test_a_tied_matrix_must_be_equal(layers: tuple[Path, nn.Module, Path]) -> None:
    engine, _, file = layers
    whole = onnx.load(file)
    (table,) = (tensor for tensor in whole.graph.initializer if tensor.name == "table.weight")
    table.raw_data = np.zeros((6, 4), np.float32).tobytes()
    with pytest.raises(RefitError, match="unexpected: onnx::MatMul"):
        torch_rtx.load(engine).refit(whole)


def test_weights_that_the_engine_lacks(layers: tuple[Path, nn.Module, Path]) -> None:
    engine, other, file = layers
    whole = onnx.load(file)
    whole.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(4, np.float32), "more.bias"))
    module = torch_rtx.load(engine)
    with pytest.raises(RefitError, match="strict=False") as caught:
        module.refit(whole)
    assert caught.value.unexpected == ("more.bias",)
    module.refit(whole, strict=False)
    torch.testing.assert_close(module(IDS), other(IDS))


def test_a_compiled_onnx_module(fresh_dynamo: Any) -> None:
    """Under torch.compile, too, weights are found by their places."""
    compiled = torch.compile(from_onnx(network(0)), backend="rtx")
    other = renamed(network(1), dict(zip(NAMES, ("a1", "a2", "a3", "a4"), strict=True)))
    with torch.no_grad():
        compiled(X)
        torch_rtx.refit_module_weights(compiled, other)
        torch.testing.assert_close(compiled(X), from_onnx(other)(X))


@pytest.mark.parametrize("bias", ["onnx::Add_9", "bias"])
def test_a_bias_that_exporters_named_tells_nothing(bias: str) -> None:
    """A matrix is not found by a bias, or as one of the model's own, where the names of these come from counting."""
    names = ("first", "second", "onnx::MatMul_7", bias)
    module = from_onnx(network(0, names))
    products = {
        "onnx::MatMul_7": {"axis": 0, "bias": bias, "module": None},
        "first": {"axis": 0, "bias": None, "module": ""},
    }
    other = of_another_program(1, ("first", "second", "onnx::MatMul_8", bias))
    for one in other.graph.node:
        one.name = f"/{one.op_type}"  # in no module
    found = weights_of(other, wanted_of(module), program_of(module), products)
    assert ("onnx::MatMul_7" in found) is (bias == "bias")
