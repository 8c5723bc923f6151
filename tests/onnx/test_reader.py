"""Files that are damaged or hostile give typed errors, and nothing outside of the model's folder is read."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx_ir")

import onnx
import onnx_ir
from onnx import ModelProto, TensorProto

from tests.onnx.fuzz import fuzz
from tests.onnx.models import INT64, external, graph, linear, model, node, one, value
from torch_rtx.errors import InputError, OnnxError
from torch_rtx.onnx import wire
from torch_rtx.onnx.module import from_onnx
from torch_rtx.onnx.reader import data

WEIGHT = np.arange(24, dtype="<f4").tobytes()


# ---- damaged models --------------------------------------------------------------------------------------------------


@pytest.fixture(params=[8, 4096])
def least(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How large an initializer is whose data stay in the file."""
    monkeypatch.setattr(wire, "LEAST", request.param)
    return int(request.param)


@pytest.mark.usefixtures("least")
def test_truncated_files(tmp_path: Path) -> None:
    whole = linear().SerializeToString()
    path = tmp_path / "model.onnx"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(OnnxError) as caught:
            from_onnx(path)
        assert caught.value.file == str(path)
    with pytest.raises(FileNotFoundError):
        from_onnx(tmp_path / "none.onnx")


@pytest.mark.usefixtures("least")
def test_damaged_files(tmp_path: Path) -> None:
    """Any byte may be any other: a module that runs or gives a typed error, or an OnnxError."""
    whole = bytearray(linear().SerializeToString())
    path = tmp_path / "model.onnx"
    random = np.random.RandomState(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for place in random.randint(0, len(whole), 3):
            damaged[place] = random.randint(256)
        path.write_bytes(damaged)
        with suppress(OnnxError, InputError):
            from_onnx(path)(torch.ones(2, 3, 4))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("least")
def test_models_with_other_nodes(tmp_path: Path) -> None:
    """Typed errors are all that comes of them."""
    outcomes = fuzz(300, 0, tmp_path / "model.onnx")
    assert outcomes["OnnxError"] > 100
    assert sum(outcomes.values()) == 300


def hostile(kind: str) -> ModelProto:
    """A model that breaks a rule."""
    made = linear()
    nodes, weights = made.graph.node, made.graph.initializer
    if kind == "cycle":
        nodes[0].input[0] = "y"
    elif kind == "twice":
        nodes[4].output[0] = "shape"
    elif kind == "initializers":
        weights.add().CopyFrom(weights[0])
    elif kind == "undefined":
        nodes[4].input[0] = "nothing"
    elif kind == "output":
        made.graph.output[0].name = "nothing"
    elif kind == "operator":
        nodes[5].op_type = "Multiply"
    elif kind == "opset":
        made.opset_import[0].version = 99
    elif kind == "domain":
        nodes[5].domain = "somewhere"
    elif kind == "attribute":
        nodes[3].attribute[0].CopyFrom(onnx.helper.make_attribute("axis", 0.5))
    elif kind == "unknown attribute":
        nodes[4].attribute.append(onnx.helper.make_attribute("speed", 1))
    elif kind == "inputs":
        nodes[5].input.append("rows")
    elif kind == "long":
        weights[0].dims[0] = 13
    elif kind == "huge":
        weights[0].dims[0] = 1 << 60
    elif kind == "negative":
        weights[0].dims[0] = -12
    elif kind == "dtype":
        weights[0].data_type = TensorProto.STRING
    return made


@pytest.mark.parametrize(
    ("kind", "message", "op"),
    [
        ("cycle", "cycle", None),
        ("twice", "two values have the name 'shape'", "Reshape"),
        ("initializers", "two initializers have the name 'layer.weight'", None),
        ("undefined", "no node makes the input 'nothing'", "Reshape"),
        ("output", "no node makes the output 'nothing'", None),
        ("operator", "operator Multiply of version 20 is not supported", "Multiply"),
        ("opset", "version 99", None),
        ("domain", "imports no operators of the domain 'somewhere'", "somewhere.MatMul"),
        ("attribute", "attribute 'axis' is of type FLOAT, not INT", "Concat"),
        ("unknown attribute", "speed", "Reshape"),
        ("inputs", "does not fit the operator", "MatMul"),
        ("long", "'layer.weight' does not fit its shape [13, 2]", None),
        ("huge", "'layer.weight' does not fit its shape", None),
        ("negative", "'layer.weight' has the shape [-12, 2]", None),
        ("dtype", "type STRING", None),
    ],
)
def test_broken_rules(kind: str, message: str, op: str | None, tmp_path: Path) -> None:
    """From a file and from memory."""
    path = tmp_path / "model.onnx"
    path.write_bytes(hostile(kind).SerializeToString())
    for source, file in ((path, str(path)), (hostile(kind), None)):
        with pytest.raises(OnnxError) as caught:
            from_onnx(source)
        assert message in str(caught.value)
        assert (caught.value.file, caught.value.op) == (file, op)
        assert op is None or caught.value.node


def test_functions_that_call_themselves() -> None:
    made = linear()
    made.graph.node[5].domain = "mine"
    made.opset_import.append(onnx.helper.make_opsetid("mine", 1))
    call = onnx.helper.make_node("MatMul", ["a", "b"], ["c"], domain="mine")
    made.functions.append(onnx.helper.make_function("mine", "MatMul", ["a", "b"], ["c"], [call], made.opset_import))
    with pytest.raises(OnnxError, match="calls itself"):
        from_onnx(made)


def test_weights_stay_in_the_file(tmp_path: Path, least: int) -> None:
    """The parser gets the model without them, and they are read as if it had."""
    made = linear()
    large = np.random.RandomState(0).randn(3, 700).astype(np.float32)
    for name in ("first", "last"):
        made.graph.initializer.add().CopyFrom(onnx.numpy_helper.from_array(large, name))
    path = tmp_path / "model.onnx"
    onnx.save(made, path)
    with open(path, "rb") as file:
        structure, places = wire.split(file)
        content = path.read_bytes()
    assert set(places) == ({0, 1, 2, 3} if least == 8 else {2, 3})
    proto = ModelProto.FromString(structure)
    for index, (offset, length) in places.items():
        assert content[offset : offset + length] == made.graph.initializer[index].raw_data
        proto.graph.initializer[index].raw_data = content[offset : offset + length]
    assert proto == made
    assert torch.equal(data(onnx_ir.serde.deserialize_tensor(made.graph.initializer[2])), torch.from_numpy(large))
    os.link(path, tmp_path / "other.onnx")  # as installers do
    wanted = from_onnx(made).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in from_onnx(path).state_dict().items())


# ---- external data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [{}, {"offset": 0}, {"offset": 0, "length": 96}])
def test_external_data(tmp_path: Path, entries: dict[str, int]) -> None:
    (tmp_path / "weights.bin").write_bytes(WEIGHT)
    path = external(tmp_path, **entries)
    for source in (path, onnx_ir.load(path), onnx.load(path)):
        weight = from_onnx(source).state_dict()["layer.weight"]
        assert torch.equal(weight, torch.arange(24.0).reshape(12, 2))


def test_external_data_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(WEIGHT)
    with pytest.raises(OnnxError, match="the folder of the model is not known"):
        from_onnx(onnx.load(external(tmp_path), load_external_data=False))


@pytest.mark.parametrize(
    ("location", "entries", "message"),
    [
        ("none.bin", {}, "can't be opened"),
        ("", {}, "not in a regular file"),
        ("../secret", {}, "outside of the model's folder"),
        ("inner/../../secret", {}, "outside of the model's folder"),
        ("{outside}/secret", {}, "outside of the model's folder"),
        ("symlink", {}, "outside of the model's folder"),
        ("linked/secret", {}, "outside of the model's folder"),
        ("hardlink", {}, "hard links"),
        ("pipe", {}, "not in a regular file"),
        ("short.bin", {}, "ends at byte 96, and the file has 95"),
        ("weights.bin", {"offset": 4}, "ends at byte 100, and the file has 96"),
        ("weights.bin", {"offset": -4}, "can't be read"),
        ("weights.bin", {"length": 92}, "92 bytes"),
    ],
)
def test_hostile_external_data(
    tmp_path: Path, location: str, entries: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, outside = tmp_path / "inside", tmp_path
    inside.mkdir()
    (outside / "secret").write_bytes(WEIGHT)
    (inside / "weights.bin").write_bytes(WEIGHT)
    (inside / "short.bin").write_bytes(WEIGHT[:-1])
    (inside / "symlink").symlink_to(outside / "secret")
    (inside / "linked").symlink_to(outside)
    os.link(outside / "secret", inside / "hardlink")
    os.mkfifo(inside / "pipe")
    path = external(inside, location.format(outside=outside), **entries)
    read: list[int] = []
    monkeypatch.setattr("torch_rtx.onnx.reader._read", lambda *_: read.append(1))
    with pytest.raises(OnnxError, match=message) as caught:
        from_onnx(path)
    assert caught.value.file == path
    assert read == []


def test_links_inside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(WEIGHT)
    (tmp_path / "weights.bin").symlink_to(tmp_path / "data")
    assert from_onnx(external(tmp_path)).state_dict()["layer.weight"][11, 1] == 23


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [TensorProto.INT4, TensorProto.UINT4, TensorProto.INT2, TensorProto.UINT2])
def test_small_integers(dtype: int, tmp_path: Path) -> None:
    """From the model and from external data."""
    bits = 4 if dtype in (TensorProto.INT4, TensorProto.UINT4) else 2
    signed = dtype in (TensorProto.INT4, TensorProto.INT2)
    numbers = [n - (1 << (bits - 1)) * signed for n in range(1 << bits)] + [1]
    tensor = onnx.helper.make_tensor("t", dtype, [len(numbers)], numbers)
    wanted = torch.tensor(numbers, dtype=torch.int8 if signed else torch.uint8)
    kept = onnx_ir.serde.deserialize_tensor(tensor)
    (tmp_path / "data").write_bytes(kept.tobytes())
    shape = onnx_ir.Shape([len(numbers)])
    apart = onnx_ir.ExternalTensor(
        "data", 0, None, onnx_ir.DataType(dtype), shape=shape, name="t", base_dir=str(tmp_path)
    )
    for given in (kept, apart):
        found = data(given)
        assert str(found.dtype) == f"torch.{'' if signed else 'u'}int{bits}"
        assert torch.equal(found.view(wanted.dtype), wanted)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float16", "bool", "complex64", "uint64"]
)
def test_other_types(dtype: str) -> None:
    wanted = torch.tensor([0.0, 1.0, 2.0, 1.0]).to(getattr(torch, dtype))
    raw = wanted.view(torch.uint8).numpy().tobytes()
    number = {"bfloat16": 16, "float8_e4m3fn": 17, "float8_e5m2": 19, "float16": 10, "bool": 9, "complex64": 14}
    tensor = onnx.helper.make_tensor("t", number.get(dtype, 13), [2, 2], raw, raw=True)
    found = data(onnx_ir.serde.deserialize_tensor(tensor))
    assert found.dtype == wanted.dtype
    assert torch.equal(found.view(torch.uint8), wanted.reshape(2, 2).view(torch.uint8))


def test_nodes_in_any_order() -> None:
    made = linear()
    nodes = list(made.graph.node)[::-1]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    x = torch.ones(2, 3, 4)
    assert torch.equal(from_onnx(made)(x), from_onnx(linear())(x))


def test_strings_are_refused() -> None:
    made = model(graph([node("Identity", "x", "y")], [value("x", [1], TensorProto.STRING)], [value("y", [1], INT64)]))
    with pytest.raises(OnnxError, match="STRING"):
        from_onnx(made)


def test_operators_report_their_node() -> None:
    with pytest.raises(OnnxError, match="the_Reshape") as caught:
        from_onnx(one("Reshape", {"x": np.ones(4, np.float32), "shape": np.array([3])}))()
    assert caught.value.op == "Reshape"


@pytest.mark.parametrize("source", [b"", 3, None, linear().graph])
def test_what_is_no_model(source: Any) -> None:
    with pytest.raises(OnnxError, match=r"can't be a \w+\n.*onnx.load_from_string"):
        from_onnx(source)
