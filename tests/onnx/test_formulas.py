"""Formulas in the place of tensors that exporters compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("onnx_ir")

import onnx
from hypothesis import given
from hypothesis import strategies as st

from tests.onnx.models import graph, model, node, value
from torch_rtx.onnx.formulas import formula
from torch_rtx.onnx.module import from_onnx
from torch_rtx.onnx.plan import FOLDED, KIND, SIGNATURE

INF = float("inf")


@given(st.integers(1, 5), st.integers(1, 5), st.integers(-6, 6), st.sampled_from([(1, 0), (0.0, -INF), (-1.5, 2.0)]))
def test_triangles(rows: int, columns: int, diagonal: int, numbers: tuple[float, float]) -> None:
    """Each has a formula, and it is exact."""
    dtype = torch.bool if numbers == (1, 0) else torch.float32
    inner, outer = (torch.tensor(number).to(dtype) for number in numbers)
    tensor = torch.where(torch.ones(2, rows, columns, dtype=torch.bool).tril(diagonal), inner, outer)
    found = formula(tensor)
    assert found is not None
    assert torch.equal(found.tensor(tensor), tensor)


@given(st.lists(st.integers(-1, 1), min_size=2, max_size=12), st.sampled_from([(-1,), (2, -1), (-1, 2), (1, -1, 1)]))
def test_is_exact_or_none(numbers: list[int], shape: tuple[int, ...]) -> None:
    for dtype in (torch.int64, torch.int32, torch.bool, torch.float32, torch.float16):
        tensor = torch.tensor(numbers[: len(numbers) // 2 * 2]).reshape(shape).to(dtype)
        found = formula(tensor)
        assert found is None or torch.equal(found.tensor(tensor), tensor)


@pytest.mark.parametrize(
    ("tensor", "known"),
    [
        (torch.arange(5).reshape(1, 5, 1) * 2 - 1, True),
        (torch.zeros(3, 2), True),
        (torch.arange(6).reshape(2, 3, 1), True),
        (torch.tensor([[0, 1, 2], [3, 4, 6]]), False),
        (torch.stack(torch.meshgrid(torch.arange(2) + 3, torch.arange(4) * 2, indexing="ij"), -1), True),
        (torch.tensor([[[0, 5]], [[1, 5]], [[2, 5]], [[3, 5]]]), True),
        (torch.tensor([[[0, 5]], [[1, 5]], [[2, 5]], [[3, 6]]]), False),
        (torch.tensor([[1, 7, 8]]), False),
        (torch.tensor([0.0, -0.0]), False),
        (torch.tensor([0, 1, 3]), False),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), False),
        (torch.zeros(0), False),
        (torch.tensor([2.5]), False),
    ],
)
def test_formulas(tensor: torch.Tensor, known: bool) -> None:
    found = formula(tensor)
    assert (found is not None) == known
    assert found is None or torch.equal(found.tensor(tensor), tensor)


def test_what_an_exporter_made_is_part_of_the_program() -> None:
    """Numbers, masks and positions that no weight is in; what is computed from a weight stays one."""
    weights = {
        "weight": np.full((2, 2), 3, np.float32),
        "scale": np.float32(0.5),
        "folded": np.float32(2),
        "mask": np.array([[0, -INF], [0, 0]], np.float32),
        "table": np.array([[1, 2], [4, 3]], np.float32),
        "ones": np.ones(2, np.float32),
    }
    nodes = [
        node("MatMul", "x weight", "a"),
        node("Mul", "a scale", "b"),
        node("Mul", "b folded", "c"),
        node("Add", "c mask", "d"),
        node("Add", "d table", "e"),
        node("Mul", "e ones", "f"),
        node("Constant", "", "places", value=onnx.numpy_helper.from_array(np.arange(2)[:, None])),
        node("Cast", "places", "g", to=onnx.TensorProto.FLOAT),
        node("Add", "f g", "y"),
    ]
    made = model(graph(nodes, [value("x", [2, 2])], [value("y", [2, 2])], weights))
    assert set(from_onnx(made).state_dict()) == {*weights}

    def mark(name: str, key: str, text: str) -> None:
        info = next((info for info in made.graph.value_info if info.name == name), None) or made.graph.value_info.add()
        info.name = name
        info.metadata_props.add(key=key, value=text)

    mark("weight", KIND, "PARAMETER")
    mark("folded", FOLDED, "['val_1', 'layer.scale']")
    mark("scale", FOLDED, "['val_1']")
    made.graph.metadata_props.add(key=SIGNATURE, value="p_scale: PARAMETER target='layer.scale'")
    module = from_onnx(made)
    assert set(module.state_dict()) == {"weight", "folded", "table"}
    x = torch.ones(2, 2)
    wanted = torch.tensor([[7.0, -INF], [11.0, 10.0]])
    assert torch.equal(module(x), wanted)
    program = torch.export.export(module, (x,))
    assert torch.equal(program.module()(x), wanted)
    assert torch.equal(module.half()(x.half()).float(), wanted)


def test_exporters_own_names_are_enough() -> None:
    """Tools that change a file drop the marks of a module's tensors."""
    names = {"val_1": 2.0, "val_2": 3.0, "val_3": 5.0, "scale": 7.0}
    nodes = [node("Mul", f"x{n} {name}", f"x{n + 1}") for n, name in enumerate(names)]
    made = model(graph(nodes, [value("x0", [2])], [value("x4")], {k: np.float32(v) for k, v in names.items()}))
    assert set(from_onnx(made).state_dict()) == {*names}
    for name, text in (("val_1", "['val_0']"), ("val_3", "['layer.scale', 'val_0']")):
        made.graph.value_info.add(name=name).metadata_props.add(key=FOLDED, value=text)
    module = from_onnx(made)
    assert set(module.state_dict()) == {"val_3", "scale"}
    assert module(torch.ones(2)).tolist() == [210, 210]


def test_a_model_whose_weights_are_constants() -> None:
    """Without initializers, a constant of one number is a weight, which a refit may change."""
    ones = onnx.numpy_helper.from_array(np.ones(2, np.float32))
    nodes = [node("Constant", "", "gamma", value=ones), node("Mul", "x gamma", "y")]
    module = from_onnx(model(graph(nodes, [value("x", [2])], [value("y", [2])])))
    assert set(module.state_dict()) == {"gamma"}
