"""Operators of ai.onnx.ml that prepare features, and counts of n-grams. Those of strings are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.registry import op

ML = "ai.onnx.ml"


def no_strings(**given: Any) -> None:
    """Raises OnnxError if attributes hold strings that would be data of tensors."""
    for name, value in given.items():
        if value:
            raise OnnxError(f"attribute {name!r} holds strings, and there are no tensors of strings")


@op("ArrayFeatureExtractor", domain=ML)
def array_feature_extractor(x: Tensor, places: Tensor) -> Tensor:
    """What `places` select of the last axis; x of one axis counts as a row."""
    return (x.unsqueeze(0) if x.dim() == 1 else x).index_select(-1, places.reshape(-1))


@op("Binarizer", domain=ML)
def binarizer(x: Tensor, *, threshold: float = 0.0) -> Tensor:
    """1 where x is above the threshold, else 0."""
    return (x > threshold).to(x.dtype)


@op("FeatureVectorizer", domain=ML)
def feature_vectorizer(*features: Tensor, inputdimensions: Sequence[int] = ()) -> Tensor:
    """All features (N, ...) side by side, (N, sum) in float32; each cut to its size, or filled with zeros."""
    rows = [x.reshape(1, -1) if x.dim() < 2 else x.flatten(1) for x in features]
    sizes = inputdimensions or [row.shape[1] for row in rows]
    cut = [row[:, :size].float() for row, size in zip(rows, sizes, strict=True)]
    return torch.cat(
        [torch.nn.functional.pad(row, (0, size - row.shape[1])) for row, size in zip(cut, sizes, strict=True)], 1
    )


@op("Imputer", domain=ML)
def imputer(
    x: Tensor,
    *,
    imputed_value_floats: Sequence[float] = (),
    imputed_value_int64s: Sequence[int] = (),
    replaced_value_float: float = 0.0,
    replaced_value_int64: int = 0,
) -> Tensor:
    """x with other values, one for all or one for each feature, in place of one that may be NaN."""
    real = x.is_floating_point()
    values = torch.tensor(imputed_value_floats if real else imputed_value_int64s, dtype=x.dtype, device=x.device)
    old = replaced_value_float if real else replaced_value_int64
    return torch.where(torch.isnan(x) if old != old else x == old, values, x)


@op("LabelEncoder", domain=ML, since=2)
def label_encoder(
    x: Tensor,
    *,
    default_float: float = -0.0,
    default_int64: int = -1,
    default_string: str = "_Unused",
    default_tensor: Tensor | None = None,
    keys_floats: Sequence[float] = (),
    keys_int64s: Sequence[int] = (),
    keys_strings: Sequence[str] = (),
    keys_tensor: Tensor | None = None,
    values_floats: Sequence[float] = (),
    values_int64s: Sequence[int] = (),
    values_strings: Sequence[str] = (),
    values_tensor: Tensor | None = None,
) -> Tensor:
    """The value of each element's key, of which the last of equal ones counts."""
    no_strings(keys_strings=keys_strings, values_strings=values_strings)
    if keys_tensor is None:
        keys_tensor = torch.tensor([*keys_floats, *keys_int64s], dtype=x.dtype, device=x.device)
    if values_tensor is None:
        dtype = torch.float32 if values_floats else torch.int64
        values_tensor = torch.tensor([*values_floats, *values_int64s], dtype=dtype, device=x.device)
    if default_tensor is None:
        missing = default_float if values_tensor.is_floating_point() else default_int64
        default_tensor = torch.full((), missing, dtype=values_tensor.dtype, device=x.device)
    keys, order = keys_tensor.reshape(-1).flip(0).sort(stable=True)
    values, default = values_tensor.reshape(-1).flip(0)[order], default_tensor.reshape(())
    ordered = keys.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf) if x.is_floating_point() else keys
    at = torch.searchsorted(ordered, x.contiguous()).clamp(max=keys.numel() - 1)
    found = torch.where(keys[at] == x, values[at], default)
    if x.is_floating_point():
        nan = torch.isnan(keys)
        found = torch.where(torch.isnan(x), torch.where(nan[-1], values[nan.int().argmax()], default), found)
    return found


@op("Normalizer", domain=ML)
def normalizer(x: Tensor, *, norm: str = "MAX") -> Tensor:
    """Rows by their largest element, the sum of absolute values, or the root of the sum of squares; or as they are."""
    x = x if x.dtype == torch.float64 else x.float()
    norms = {
        "MAX": lambda: x.amax(-1, True),
        "L1": lambda: x.abs().sum(-1, True),
        "L2": lambda: x.norm(dim=-1, keepdim=True),
    }
    if norm not in norms:
        raise OnnxError(f"norm {norm!r} is none of {', '.join(norms)}")
    size = norms[norm]()
    return (x / torch.where(size == 0, 1, size)).float()


@op("OneHotEncoder", domain=ML)
def one_hot_encoder(
    x: Tensor, *, cats_int64s: Sequence[int] = (), cats_strings: Sequence[str] = (), zeros: int = 1
) -> Tensor:
    """A new last axis that is 1 at the element's category; without `zeros`, there must be one."""
    no_strings(cats_strings=cats_strings)
    found = x.to(torch.int64).unsqueeze(-1) == torch.tensor(cats_int64s, device=x.device)
    if not zeros:
        torch._check(bool(found.any(-1).all()), lambda: "OneHotEncoder: an element is in no category")
    return found.float()


@op("Scaler", domain=ML)
def scaler(x: Tensor, *, offset: Sequence[float] = (), scale: Sequence[float] = ()) -> Tensor:
    """(x - offset) * scale, each one number for all or one for each feature."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    low = torch.tensor(offset or [0.0], dtype=dtype, device=x.device)
    factor = torch.tensor(scale or [1.0], dtype=dtype, device=x.device)
    return ((x.to(dtype) - low) * factor).float()


@op("TfIdfVectorizer")
def tf_idf_vectorizer(
    x: Tensor,
    *,
    max_gram_length: int,
    max_skip_count: int,
    min_gram_length: int,
    mode: str,
    ngram_counts: Sequence[int],
    ngram_indexes: Sequence[int],
    pool_int64s: Sequence[int] = (),
    pool_strings: Sequence[str] = (),
    weights: Sequence[float] = (),
) -> Tensor:
    """How often x (N, C) or (C) has each n-gram of a pool, with 0 to `max_skip_count` elements between its parts."""
    no_strings(pool_strings=pool_strings)
    if mode not in ("TF", "IDF", "TFIDF"):
        raise OnnxError(f"mode {mode!r} is none of TF, IDF, TFIDF")
    rows = x.reshape(-1, x.shape[-1]).to(torch.int64)
    ends = [*ngram_counts[1:], len(pool_int64s)]
    counts = []
    for length, (begin, end) in enumerate(zip(ngram_counts, ends, strict=True), 1):
        grams = torch.tensor(pool_int64s[begin:end], dtype=torch.int64, device=x.device).reshape(-1, length)
        count = rows.new_zeros(rows.shape[0], grams.shape[0])
        steps = range(1, 2 + max_skip_count * (length > 1)) if min_gram_length <= length <= max_gram_length else ()
        for step in steps:
            span = step * (length - 1)
            if rows.shape[1] > span:
                parts = [rows[:, step * part : rows.shape[1] - span + step * part] for part in range(length)]
                hits = [part[..., None] == grams[:, place] for place, part in enumerate(parts)]
                count = count + torch.stack(hits).all(0).sum(1)
        counts.append(count)
    found = torch.cat(counts, 1).float()
    if mode == "IDF":
        found = found.clamp(max=1)
    if mode != "TF" and weights:
        found = found * torch.tensor(weights, device=x.device)
    places = torch.tensor(ngram_indexes, device=x.device)
    y = found.new_zeros(rows.shape[0], max(ngram_indexes) + 1).index_add(1, places, found)
    return y.reshape(*x.shape[:-1], y.shape[1])
