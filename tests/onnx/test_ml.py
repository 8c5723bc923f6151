"""Operators of ai.onnx.ml, against onnxruntime on a CPU and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx_ir")

import torch_rtx
from tests.onnx.cases import cases, compare, value_of
from tests.onnx.runtime import agree, model_of, ours
from torch_rtx.errors import OnnxError
from torch_rtx.onnx.module import from_onnx

RNG = np.random.default_rng(0)
ML = "ai.onnx.ml"
NAN = float("nan")


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def floats(count: int, scale: float = 1.0) -> list[float]:
    return (f32(count) * scale).tolist()


X = f32(5, 4)
X[1, 2], X[3] = 0, -np.abs(X[3])
HOLES = np.where(np.arange(20).reshape(5, 4) % 7 == 3, np.nan, X).astype(np.float32)
WHOLE = RNG.integers(0, 5, (3, 4))
FEATURES: dict[str, tuple[str, list[np.ndarray], dict[str, Any]]] = {
    "extract": ("ArrayFeatureExtractor", [X, np.array([2, 0])], {}),
    "extract of a vector": ("ArrayFeatureExtractor", [X[0], np.array([2, 0])], {}),
    "binarize": ("Binarizer", [X], {"threshold": 0.3}),
    "vectorize": ("FeatureVectorizer", [X, f32(5, 2)], {"inputdimensions": [4, 2]}),
    "impute NaN": ("Imputer", [HOLES], {"imputed_value_floats": floats(4), "replaced_value_float": NAN}),
    "impute a number": ("Imputer", [WHOLE], {"imputed_value_int64s": [7], "replaced_value_int64": 1}),
    "labels": (
        "LabelEncoder", [WHOLE], {"keys_int64s": [3, 1, 4], "values_floats": [0.5, 1.5, 2.5], "default_float": -7.0},
    ),
    "largest": ("Normalizer", [X], {"norm": "MAX"}),
    "sum": ("Normalizer", [np.where(X > 1, 0, X)], {"norm": "L1"}),
    "squares": ("Normalizer", [np.concatenate([X, np.zeros_like(X)])], {"norm": "L2"}),
    "one hot": ("OneHotEncoder", [WHOLE], {"cats_int64s": [3, 1, 4]}),
    "scale": ("Scaler", [X], {"offset": floats(4), "scale": floats(4)}),
    "scale whole numbers": ("Scaler", [WHOLE], {"offset": [1.0], "scale": [0.5]}),
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str) -> None:
    op, arrays, attributes = FEATURES[name]
    agree(op, arrays, domain=ML, **attributes)


def test_label_encoder() -> None:
    """NaN is a key; infinity another; of equal keys the last one counts, which onnxruntime does not keep to."""
    x = np.array([1, 2, NAN, 3, np.inf], np.float32)
    keys = [3.0, NAN, 1.0, np.inf, 1.0]
    (found,) = ours(model_of("LabelEncoder", [x], domain=ML, keys_floats=keys, values_int64s=[5, 6, 7, 8, 9]), [x])
    assert found.tolist() == [9, -1, 6, 5, 8]


@pytest.mark.parametrize("transform", ["NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT"])
def test_linear(transform: str) -> None:
    x, weights = np.abs(f32(5, 4)) / 20, [abs(w) / 5 for w in floats(12)]
    shared = {"domain": ML, "coefficients": weights, "intercepts": [0.1, 0.2, 0.3], "post_transform": transform}
    rtol = 5e-4 if transform == "PROBIT" else 1e-4  # an approximation there
    agree("LinearRegressor", [x], targets=3, rtol=rtol, **shared)
    agree("LinearClassifier", [x], ["label", "scores"], classlabels_ints=[5, 7, 9], rtol=rtol, **shared)
    if transform != "PROBIT":  # onnxruntime leaves a column undefined
        shared |= {"coefficients": floats(4), "intercepts": [0.1]}
        agree("LinearClassifier", [X], ["label", "scores"], classlabels_ints=[5, 7], **shared)


@pytest.mark.parametrize("kernel", ["LINEAR", "POLY", "RBF", "SIGMOID"])
def test_support_vectors(kernel: str) -> None:
    shared: dict[str, Any] = {"domain": ML, "kernel_type": kernel, "kernel_params": [0.3, 0.2, 2.0]}
    agree(
        "SVMRegressor", [X], coefficients=floats(5), support_vectors=floats(20), n_supports=5, rho=[0.1], **shared
    )  # fmt: skip
    for counts in ([2, 3], [2, 3, 2]):
        classes, pairs = len(counts), len(counts) * (len(counts) - 1) // 2
        shared |= {"vectors_per_class": counts, "classlabels_ints": [4, 6, 8][:classes], "rho": floats(pairs)}
        shared |= {"coefficients": floats(sum(counts) * (classes - 1)), "support_vectors": floats(sum(counts) * 4)}
        agree("SVMClassifier", [X], ["label", "scores"], **shared)
        odds = {"prob_a": [-0.5 - abs(a) for a in floats(pairs)], "prob_b": floats(pairs)}
        agree("SVMClassifier", [X], ["label", "scores"], atol=4e-3, **shared, **odds)  # onnxruntime stops early


def grown(trees: int, modes: list[str]) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Attributes of random trees, and the names of their leaves."""
    rows: list[Any] = []

    def grow(tree: int, first: int, depth: int) -> int:
        place = len(rows)
        rows.append(None)
        if depth == 0 or (depth < 3 and RNG.random() < 0.2):
            rows[place] = (tree, place - first, 0, 0.0, "LEAF", 0, 0, 0)
            return place - first
        split, mode = float(np.float32(round(RNG.standard_normal(), 1))), str(RNG.choice(modes))
        yes, no = grow(tree, first, depth - 1), grow(tree, first, depth - 1)
        missing = 0 if mode == "BRANCH_NEQ" else int(RNG.integers(0, 2))
        rows[place] = (tree, place - first, int(RNG.integers(0, 4)), split, mode, yes, no, missing)
        return place - first

    for tree in range(trees):
        grow(tree, len(rows), 3)
    names = ["treeids", "nodeids", "featureids", "values", "modes", "truenodeids", "falsenodeids"]
    names = [f"nodes_{name}" for name in [*names, "missing_value_tracks_true"]]
    leaves = [(row[0], row[1]) for row in rows if row[4] == "LEAF"]
    return {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}, leaves


MODES = ["BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ"]


def votes(kind: str, leaves: list[tuple[int, int]], ids: list[int]) -> dict[str, Any]:
    """The attributes that give each leaf a weight for each of the ids."""
    trees, nodes = zip(*(leaf for leaf in leaves for _ in ids), strict=True)
    return {f"{kind}_treeids": trees, f"{kind}_nodeids": nodes, f"{kind}_ids": ids * len(leaves)}


@pytest.mark.parametrize("modes", [["BRANCH_LEQ"], MODES], ids=["one mode", "all modes"])
@pytest.mark.parametrize("aggregate", ["SUM", "AVERAGE", "MIN", "MAX"])
def test_tree_regressor(aggregate: str, modes: list[str]) -> None:
    nodes, leaves = grown(4, modes)
    for transform in ("NONE", "SOFTMAX", "LOGISTIC"):
        agree(
            "TreeEnsembleRegressor", [np.round(HOLES, 1)], domain=ML, n_targets=2, aggregate_function=aggregate,
            post_transform=transform, base_values=[0.3, 0.4], target_weights=floats(2 * len(leaves)),
            **votes("target", leaves, [0, 1]), **nodes,
        )  # fmt: skip
    few = votes("target", leaves, [0]) | {"target_ids": RNG.integers(0, 3, len(leaves)).tolist()}
    few |= {"n_targets": 3, "aggregate_function": aggregate, "target_weights": floats(len(leaves))}
    agree("TreeEnsembleRegressor", [HOLES], domain=ML, **few, **nodes)


@pytest.mark.parametrize("transform", ["NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO"])
@pytest.mark.parametrize(("classes", "ids"), [(3, [0, 1, 2]), (2, [0]), (2, [1])])
@pytest.mark.parametrize("positive", [False, True])
def test_tree_classifier(classes: int, ids: list[int], positive: bool, transform: str) -> None:
    """Where only one of two classes has weights, the scores of the other follow."""
    nodes, leaves = grown(4, MODES[:4])
    weights = floats(len(ids) * len(leaves), 0.3)
    weights = [abs(weight) for weight in weights] if positive else weights
    for base in ({}, {"base_values": [0.25] * len(ids)}) if ids != [1] else ({},):
        agree(
            "TreeEnsembleClassifier", [HOLES], ["label", "scores"], domain=ML, class_weights=weights,
            classlabels_int64s=[4, 6, 9][:classes], post_transform=transform, **base, **votes("class", leaves, ids),
            **nodes,
        )  # fmt: skip


def test_captured() -> None:
    """Trees are constants of an engine."""
    case = cases()["test_ai_onnx_ml_tree_ensemble_set_membership"]
    module, ((inputs, outputs),) = from_onnx(case.model), case.read()
    args = tuple(map(value_of, inputs))
    compare(torch_rtx.compile(module, args)(*args), value_of(outputs[0]), 1e-6, 1e-6)


@pytest.mark.parametrize(
    ("op", "attributes", "message"),
    [
        ("OneHotEncoder", {"cats_int64s": [1], "zeros": 0}, "in no category"),
        ("OneHotEncoder", {"cats_strings": ["a"]}, "'cats_strings' holds strings"),
        ("Normalizer", {"norm": "L3"}, "norm 'L3' is none of MAX, L1, L2"),
        ("SVMRegressor", {"coefficients": [1.0] * 4, "rho": [0.0], "kernel_type": "X"}, "kernel_type 'X'"),
        ("LinearRegressor", {"coefficients": [1.0] * 4, "post_transform": "X"}, "post_transform 'X'"),
    ],
)
def test_what_is_refused(op: str, attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(OnnxError, match=message):
        ours(model_of(op, [X], domain=ML, **attributes), [X])


def test_trees_that_lead_nowhere() -> None:
    """A branch back, or to a node that there is not, is an error and no endless loop."""
    nodes, leaves = grown(1, MODES)
    inner = nodes["nodes_modes"].index("LEAF") - 1
    for key, place, message in (("nodes_truenodeids", 0, "can't be reached"), ("nodes_falsenodeids", 99, "KeyError")):
        broken = nodes | {key: [place if n == inner else child for n, child in enumerate(nodes[key])]}
        broken |= votes("target", leaves, [0]) | {"target_weights": floats(len(leaves))}
        with pytest.raises(OnnxError, match=message):
            ours(model_of("TreeEnsembleRegressor", [X], domain=ML, **broken), [X])


def test_gradient() -> None:
    """The derivative of a value of the graph, which is computed again from the values that it is taken by; it has one
    itself."""
    for name in ("simple/test_gradient_of_add", "simple/test_gradient_of_add_and_mul"):
        for inputs, outputs in cases()[name].read():
            module, args = from_onnx(cases()[name].model), tuple(map(value_of, inputs))
            with torch.no_grad():
                for found, wanted in zip(module(*args), map(value_of, outputs), strict=True):
                    compare(found, wanted, 1e-6, 0)
    a, b = (torch.tensor(value, requires_grad=True) for value in (2.0, 1.0))
    module(a, b)[1].backward()  # d((a + b) * a) / da = 2a + b
    assert (a.grad, b.grad) == (2, 1)
