"""Ensembles of decision trees, of ai.onnx.ml: all samples go down all trees at once, level by level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.ops.classifiers import TRANSFORMS, labelled, transformed
from torch_rtx.onnx.ops.features import ML, no_strings
from torch_rtx.onnx.registry import op, values_of

MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ", "BRANCH_MEMBER", "LEAF")
LEAF = MODES.index("LEAF")
AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")


@dataclass
class Forest:
    """Trees whose nodes have places in common arrays; a leaf leads to itself.

    Attributes:
        roots: (trees,).
        mode: an index of MODES; feature, split, yes, no, missing: what a node compares, with what, and where it leads
            if that is true, and if it is not; and whether it is true of NaN whatever the comparison says.
        members: for each node with BRANCH_MEMBER, the values that lead to `yes`.
        weights: (nodes, targets), and `voted`, which of them are given.
    """

    roots: np.ndarray
    mode: np.ndarray
    feature: np.ndarray
    split: np.ndarray
    yes: np.ndarray
    no: np.ndarray
    missing: np.ndarray
    weights: np.ndarray
    voted: np.ndarray
    members: dict[int, np.ndarray]

    def __post_init__(self) -> None:
        nodes = np.concatenate([self.roots, self.yes, self.no])
        if (nodes < 0).any() or (nodes >= len(self.mode)).any() or (self.feature < 0).any():
            raise OnnxError("a tree leads to a node, or compares a feature, that there is not")

    def levels(self) -> list[np.ndarray]:
        """The nodes at each distance from the roots.

        Raises:
            OnnxError: a branch leads back.
        """
        found = [np.unique(self.roots)]
        while len(inner := found[-1][self.mode[found[-1]] != LEAF]):
            found.append(np.unique(np.concatenate([self.yes[inner], self.no[inner]])))
            if len(found) > len(self.mode):
                raise OnnxError("a branch of a tree leads back to a node above it")
        return found

    def leaves(self, x: Tensor) -> Tensor:
        """The leaf (N, trees) that each sample of x (N, features) comes to in each tree."""
        place, kinds = self._on(x, self.roots).expand(x.shape[0], -1), [*map(int, np.unique(self.mode))]
        mode, feature, yes, no = (self._on(x, array) for array in (self.mode, self.feature, self.yes, self.no))
        split, missing = self._on(x, self.split).to(x.dtype), self._on(x, self.missing)
        for _ in self.levels()[1:]:
            given, bound, kind = x.gather(1, feature[place]), split[place], mode[place]
            tests = [given <= bound, given < bound, given >= bound, given > bound, given == bound, given != bound]
            goes = torch.zeros_like(place, dtype=torch.bool)
            for number in kinds:
                if number < len(tests):
                    goes = torch.where(kind == number, tests[number], goes)
            for node, values in self.members.items():
                inside = (given.unsqueeze(-1) == self._on(x, values).to(x.dtype)).any(-1)
                goes = torch.where(place == node, inside, goes)
            goes = goes | (missing[place] & torch.isnan(given)) if self.missing.any() else goes
            place = torch.where(goes, yes[place], no[place])
        return place

    def scores(self, x: Tensor, aggregate: str) -> Tensor:
        """What the trees give for x (N, features): (N, targets)."""
        x = x if x.is_floating_point() else x.float()
        place = self.leaves(x)
        given = self._on(x, self.weights)[place]  # (N, trees, targets)
        given = given if self.weights.dtype == np.float64 else given.float()
        if aggregate in ("AVERAGE", "SUM"):
            total = given.sum(1)
            return total / len(self.roots) if aggregate == "AVERAGE" else total
        voted = self._on(x, self.voted)[place]
        worst = torch.inf if aggregate == "MIN" else -torch.inf
        best = torch.where(voted, given, worst)
        best = best.amin(1) if aggregate == "MIN" else best.amax(1)
        return torch.where(voted.any(1), best, 0)

    def _on(self, x: Tensor, array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=x.device)


def _values(stored: Mapping[str, Any], name: str) -> np.ndarray:
    """An attribute that is a list of floats or a tensor."""
    tensor = stored.get(f"{name}_as_tensor")
    return np.asarray(stored.get(name, ()), np.float32) if tensor is None else values_of(tensor)


def _forest(
    nodes: Mapping[str, Any],
    targets: int,
    treeids: Sequence[int],
    nodeids: Sequence[int],
    ids: Sequence[int],
    given: Any,
) -> Forest:
    """The trees of the classic operators, whose nodes have names: the tree and a number in it."""
    names = list(zip(nodes["nodes_treeids"], nodes["nodes_nodeids"], strict=True))
    places = {name: place for place, name in enumerate(names)}
    unknown = {*nodes["nodes_modes"]} - {*MODES} | {*nodes["nodes_modes"]} & {"BRANCH_MEMBER"}
    if unknown or len(places) != len(names):
        raise OnnxError(f"modes {sorted(unknown)} of nodes are not known" if unknown else "two nodes have one name")
    mode = np.array([MODES.index(name) for name in nodes["nodes_modes"]])
    yes, no = (
        np.array([n if mode[n] == LEAF else places[tree, children[n]] for n, (tree, _) in enumerate(names)])
        for children in (nodes["nodes_truenodeids"], nodes["nodes_falsenodeids"])
    )
    root = np.ones(len(names), bool)
    root[[*yes[mode != LEAF], *no[mode != LEAF]]] = False
    if root.sum() != len({*nodes["nodes_treeids"]}):
        raise OnnxError("a tree has no root, or several")
    at = [places[name] for name in zip(treeids, nodeids, strict=True)]
    weights, voted = np.zeros((len(names), targets), given.dtype), np.zeros((len(names), targets), bool)
    np.add.at(weights, (at, list(ids)), given)
    voted[at, list(ids)] = True
    missing = np.array(nodes.get("nodes_missing_value_tracks_true") or [0] * len(names), bool)
    forest = Forest(
        roots=np.flatnonzero(root),
        mode=mode,
        feature=np.where(mode == LEAF, 0, nodes["nodes_featureids"]),
        split=_values(nodes, "nodes_values"),
        yes=yes,
        no=no,
        missing=missing,
        weights=weights,
        voted=voted,
        members={},
    )
    if sum(map(len, forest.levels())) != len(names):
        raise OnnxError("nodes of a tree can't be reached from its root")
    return forest


def _based(scores: Tensor, base: np.ndarray) -> Tensor:
    return scores + torch.tensor(base, device=scores.device).to(scores.dtype) if base.size else scores


@op("TreeEnsembleRegressor", domain=ML)
def tree_ensemble_regressor(
    x: Tensor,
    *,
    aggregate_function: str = "SUM",
    n_targets: int = 1,
    post_transform: str = "NONE",
    target_ids: Sequence[int],
    target_nodeids: Sequence[int],
    target_treeids: Sequence[int],
    stored: Mapping[str, Any],
    **values: Any,
) -> Tensor:
    """x (N, features) -> what the trees give together, (N, targets) in float32."""
    weights = _values(stored, "target_weights")
    forest = _forest(stored, n_targets, target_treeids, target_nodeids, target_ids, weights)
    scores = _based(forest.scores(x, aggregate_function), _values(stored, "base_values"))
    return transformed(scores, post_transform).float()


@op("TreeEnsembleClassifier", domain=ML)
def tree_ensemble_classifier(
    x: Tensor,
    *,
    class_ids: Sequence[int],
    class_nodeids: Sequence[int],
    class_treeids: Sequence[int],
    classlabels_int64s: Sequence[int] = (),
    classlabels_strings: Sequence[str] = (),
    post_transform: str = "NONE",
    stored: Mapping[str, Any],
    **values: Any,
) -> tuple[Tensor, Tensor]:
    """x (N, features) -> the class of the highest score (N), and the scores (N, classes) in float32."""
    no_strings(classlabels_strings=classlabels_strings)
    weights, base = _values(stored, "class_weights"), _values(stored, "base_values")
    classes, voted = len(classlabels_int64s), {*class_ids}
    # The trees score one of two classes alone: what that says of the other is a rule of ONNX Runtime.
    lone = classes == 2 and len(voted) == 1 and base.size < 2
    ids = [0] * len(class_ids) if lone else class_ids
    forest = _forest(stored, 1 if lone else classes, class_treeids, class_nodeids, ids, weights)
    scores = _based(forest.scores(x, "SUM"), base)
    label, found = labelled(scores, classlabels_int64s, post_transform, bool((weights >= 0).all()))
    if lone and voted == {1}:
        found = transformed(torch.cat([torch.zeros_like(scores), scores], 1), post_transform).float()
    return label, found


@op("TreeEnsemble", domain=ML)
def tree_ensemble(
    x: Tensor,
    *,
    aggregate_function: int = 1,
    leaf_targetids: Sequence[int],
    n_targets: int = 1,
    nodes_falseleafs: Sequence[int],
    nodes_falsenodeids: Sequence[int],
    nodes_featureids: Sequence[int],
    nodes_missing_value_tracks_true: Sequence[int] = (),
    nodes_trueleafs: Sequence[int],
    nodes_truenodeids: Sequence[int],
    post_transform: int = 0,
    stored: Mapping[str, Any],
    tree_roots: Sequence[int],
    **tensors: Tensor,
) -> Tensor:
    """x (N, features) -> what the trees give together, (N, targets) of its type. Leaves follow the inner nodes."""
    inner, leaves = len(nodes_featureids), len(leaf_targetids)
    own = np.arange(inner, inner + leaves)
    yes, no = (
        np.concatenate([np.where(leaf, np.add(at, inner), at), own]).astype(np.int64)
        for leaf, at in ((nodes_trueleafs, nodes_truenodeids), (nodes_falseleafs, nodes_falsenodeids))
    )
    given, split, mode = (values_of(stored[name]) for name in ("leaf_weights", "nodes_splits", "nodes_modes"))
    weights, voted = np.zeros((inner + leaves, n_targets), given.dtype), np.zeros((inner + leaves, n_targets), bool)
    weights[own, list(leaf_targetids)], voted[own, list(leaf_targetids)] = given, True
    # The values of each node with BRANCH_MEMBER end with NaN.
    members = values_of(stored["membership_values"]) if "membership_values" in stored else np.zeros(0)
    sets = np.split(members, np.flatnonzero(np.isnan(members)) + 1)
    forest = Forest(
        roots=np.asarray(tree_roots, np.int64),
        mode=np.concatenate([mode.astype(np.int64), np.full(leaves, LEAF)]),
        feature=np.concatenate([np.asarray(nodes_featureids, np.int64), np.zeros(leaves, np.int64)]),
        split=np.concatenate([split, np.zeros(leaves, split.dtype)]),
        yes=yes,
        no=no,
        missing=np.array([*(nodes_missing_value_tracks_true or [0] * inner), *[0] * leaves], bool),
        weights=weights,
        voted=voted,
        members=dict(zip(np.flatnonzero(mode == MODES.index("BRANCH_MEMBER")).tolist(), sets, strict=False)),
    )
    return transformed(forest.scores(x, AGGREGATES[aggregate_function]), TRANSFORMS[post_transform]).to(x.dtype)
