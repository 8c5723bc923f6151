"""Linear models and support vector machines of ai.onnx.ml, and how classifiers turn scores into classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.ops.features import ML, no_strings
from torch_rtx.onnx.registry import op

TRANSFORMS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")


def transformed(scores: Tensor, how: str) -> Tensor:
    """Scores (N, classes) as a classifier gives them."""
    if how == "NONE":
        return scores
    if how == "SOFTMAX":
        return torch.softmax(scores, -1)
    if how == "LOGISTIC":
        return torch.sigmoid(scores)
    if how == "SOFTMAX_ZERO":  # where zeros stay zeros
        top = scores.amax(-1, True)
        parts = torch.where(scores.abs() > 1e-7, torch.exp(scores - top), scores * torch.exp(-top))
        return parts / parts.sum(-1, True)
    if how == "PROBIT":
        return math.sqrt(2) * torch.erfinv(2 * scores - 1)
    raise OnnxError(f"post_transform {how!r} is none of {', '.join(TRANSFORMS)}")


def labelled(scores: Tensor, labels: Sequence[int], how: str, positive: bool = False) -> tuple[Tensor, Tensor]:
    """The class of the highest score, and all scores in float32. One score is that of the second of two classes: a
    probability if `positive`, else the negative of the other's."""
    names = torch.tensor(labels, dtype=torch.int64, device=scores.device)
    if scores.shape[1] > 1 or len(labels) == 1:
        return names[scores.argmax(1)], transformed(scores, how).float()
    second = scores[:, 0] > (0.5 if positive else 0)
    label = torch.where(second, names[1], names[0])
    if how == "LOGISTIC":
        return label, torch.sigmoid(torch.cat([-scores, scores], 1)).float()
    scores = transformed(scores, how) if how == "PROBIT" else scores
    return label, torch.cat([1 - scores if positive and how != "PROBIT" else -scores, scores], 1).float()


@op("LinearRegressor", domain=ML)
def linear_regressor(
    x: Tensor,
    *,
    coefficients: Sequence[float],
    intercepts: Sequence[float] = (),
    post_transform: str = "NONE",
    targets: int = 1,
) -> Tensor:
    """x (N, features) -> (N, targets) in float32."""
    return transformed(_linear(x, coefficients, intercepts, targets), post_transform)


def _linear(x: Tensor, coefficients: Sequence[float], intercepts: Sequence[float], rows: int) -> Tensor:
    weight = torch.tensor(coefficients, device=x.device).reshape(rows, -1)
    bias = torch.tensor(intercepts, device=x.device) if intercepts else None
    return torch.nn.functional.linear(x.reshape(-1, x.shape[-1]).float(), weight, bias)


@op("LinearClassifier", domain=ML)
def linear_classifier(
    x: Tensor,
    *,
    classlabels_ints: Sequence[int] = (),
    classlabels_strings: Sequence[str] = (),
    coefficients: Sequence[float],
    intercepts: Sequence[float] = (),
    multi_class: int = 0,
    post_transform: str = "NONE",
) -> tuple[Tensor, Tensor]:
    """x (N, features) -> the class of the highest score (N), and the scores (N, classes) in float32."""
    no_strings(classlabels_strings=classlabels_strings)
    scores = _linear(x, coefficients, intercepts, len(intercepts) or len(coefficients) // x.shape[-1])
    if scores.shape[1] == 1 and len(classlabels_ints) == 2:
        second = transformed(scores, post_transform if post_transform in ("LOGISTIC", "PROBIT") else "NONE")
        names = torch.tensor(classlabels_ints, device=x.device)
        return names[(scores[:, 0] > 0).long()], torch.cat([1 - second, second], 1)
    return labelled(scores, classlabels_ints, post_transform)


# ---- support vector machines -----------------------------------------------------------------------------------------


def _kernel(x: Tensor, vectors: Tensor, kind: str, parameters: Sequence[float]) -> Tensor:
    """x (N, features), vectors (V, features) -> (N, V); parameters are gamma, coef0 and degree."""
    gamma, zero, degree = parameters or (0.0, 0.0, 0.0)
    if kind == "RBF":
        return torch.exp(-gamma * (x.unsqueeze(1) - vectors).square().sum(-1))
    product = x @ vectors.t()
    if kind == "LINEAR":
        return product
    if kind == "POLY":
        return (gamma * product + zero) ** degree
    if kind == "SIGMOID":
        return torch.tanh(gamma * product + zero)
    raise OnnxError(f"kernel_type {kind!r} is none of LINEAR, POLY, RBF, SIGMOID")


@op("SVMRegressor", domain=ML)
def svm_regressor(
    x: Tensor,
    *,
    coefficients: Sequence[float],
    kernel_params: Sequence[float] = (),
    kernel_type: str = "LINEAR",
    n_supports: int = 0,
    one_class: int = 0,
    post_transform: str = "NONE",
    rho: Sequence[float],
    support_vectors: Sequence[float] = (),
) -> Tensor:
    """x (N, features) -> (N, 1) in float32; of one class, 1 for what is in it and -1 for what is not."""
    x = x.float()
    weight = torch.tensor(coefficients, device=x.device)
    if n_supports:
        vectors = torch.tensor(support_vectors, device=x.device).reshape(n_supports, -1)
        scores = _kernel(x, vectors, kernel_type, kernel_params) @ weight + rho[0]
    else:
        scores = _kernel(x, weight.unsqueeze(0), kernel_type, kernel_params)[:, 0] + rho[0]
    if one_class:
        return torch.where(scores > 0, 1.0, -1.0).unsqueeze(1)
    return transformed(scores.unsqueeze(1), post_transform)


@op("SVMClassifier", domain=ML)
def svm_classifier(
    x: Tensor,
    *,
    classlabels_ints: Sequence[int] = (),
    classlabels_strings: Sequence[str] = (),
    coefficients: Sequence[float],
    kernel_params: Sequence[float] = (),
    kernel_type: str = "LINEAR",
    post_transform: str = "NONE",
    prob_a: Sequence[float] = (),
    prob_b: Sequence[float] = (),
    rho: Sequence[float],
    support_vectors: Sequence[float] = (),
    vectors_per_class: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """x (N, features) -> the class (N), and its scores or probabilities (N, classes or pairs of them) in float32."""
    no_strings(classlabels_strings=classlabels_strings)
    x, classes = x.float(), len(vectors_per_class)
    if not classes:  # one hyperplane for each class
        weight = torch.tensor(coefficients, device=x.device).reshape(len(classlabels_ints), -1)
        return labelled(
            _kernel(x, weight, kernel_type, kernel_params) + rho[0], classlabels_ints, post_transform, False
        )
    vectors = torch.tensor(support_vectors, device=x.device).reshape(sum(vectors_per_class), -1)
    kernel = _kernel(x, vectors, kernel_type, kernel_params)
    weight = torch.tensor(coefficients, device=x.device).reshape(classes - 1, -1)
    ends = [sum(vectors_per_class[:number]) for number in range(classes + 1)]
    part = [slice(begin, end) for begin, end in zip(ends, ends[1:], strict=False)]
    pairs = [(i, j) for i in range(classes) for j in range(i + 1, classes)]
    values = torch.stack(
        [
            kernel[:, part[i]] @ weight[j - 1, part[i]] + kernel[:, part[j]] @ weight[i, part[j]] + rho[number]
            for number, (i, j) in enumerate(pairs)
        ],
        1,
    )
    names = torch.tensor(classlabels_ints, device=x.device)
    votes = torch.zeros(x.shape[0], classes, device=x.device)
    for number, (i, j) in enumerate(pairs):
        wins = (values[:, number] > 0).float()
        votes[:, i] += wins
        votes[:, j] += 1 - wins
    label = names[votes.argmax(1)]
    if prob_a:
        slope, shift = torch.tensor(prob_a, device=x.device), torch.tensor(prob_b, device=x.device)
        found = _coupled(torch.sigmoid(-(values * slope + shift)).clamp(1e-7, 1 - 1e-7), pairs, classes)
        return label, transformed(found, post_transform)
    both = torch.cat([-values, values], 1) if classes == 2 else values
    return label, transformed(both, post_transform)


def _coupled(first: Tensor, pairs: Sequence[tuple[int, int]], classes: int) -> Tensor:
    """Probabilities (N, classes) that fit best those of the first of each pair (N, pairs), by Wu, Lin and Weng (2004).

    They are p with sum 1 for which all rows of Q p are equal; libsvm stops when these differ by 0.005 / classes.
    """
    r = torch.zeros(first.shape[0], classes, classes, dtype=torch.float64, device=first.device)
    for number, (i, j) in enumerate(pairs):
        r[:, i, j], r[:, j, i] = first[:, number].double(), 1 - first[:, number].double()
    q = torch.diag_embed(r.square().sum(1)) - r.mT * r
    ones = torch.ones_like(q[:, :, :1])
    system = torch.cat([torch.cat([q, -ones], 2), torch.cat([ones.mT, torch.zeros_like(ones[:, :1])], 2)], 1)
    right = torch.cat([torch.zeros_like(ones), ones[:, :1]], 1)
    return torch.linalg.solve(system, right)[:, :classes, 0].float()
