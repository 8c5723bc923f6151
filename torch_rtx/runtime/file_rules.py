"""What PyTorch leaves unchecked in calls of `optable.FILE_OPS`.

Without these rules a call could read or write outside of its tensors, or allocate without bounds. Types of results are
rules of `file_check`. An operator whose rule would have to look at the contents of tensors is not in `FILE_OPS`.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torch_rtx import aten

Given = Mapping[str, Any]  # the arguments by name: meta tensors, numbers, lists
Used = Sequence[bool]
MAX_EMPTY = 2**20  # a size of a tensor without elements, for which memory is needed nevertheless
SMALL = 2**31  # PyTorch's kernels compute windows, offsets and strides in 32 bits
# Enumerations that PyTorch's schemas call an int, by the name of the argument.
ENUMERATIONS: Mapping[str, tuple[int | None, ...]] = {
    **dict.fromkeys(("reduction", "normalization", "interpolation_mode", "padding_mode"), (0, 1, 2)),
    "compute_mode": (None, 0, 1, 2),
}
POSITIVE = ("kernel_size", "dilation", "groups", "group", "num_layers", "downscale_factor", "upscale_factor")
NATURAL = ("padding", "output_padding", "row", "col", "num_samples", "num_classes", "min_length", "bins", "steps")


def broken_rule(op: str, given: Given, used: Used) -> str | None:
    """The rule that the call `op(given)` breaks, as a sentence; None if there is none.

    Args:
        used: for each result, whether the graph reads it.
    """
    for name, value in given.items():
        numbers = [one for one in (value if isinstance(value, list) else (value,)) if type(one) is int]
        if name in ENUMERATIONS and value not in ENUMERATIONS[name]:
            return f"{name} is {value}, not one of {', '.join(map(str, ENUMERATIONS[name]))}"
        if name in POSITIVE and not all(1 <= number < SMALL for number in numbers):
            return f"{name} is {value}, not from 1 to 2**31 - 1"
        if name in NATURAL and not all(0 <= number < SMALL for number in numbers):
            return f"{name} is {value}, not from 0 to 2**31 - 1"
    name, _, overload = op.removeprefix("aten.").partition(".")
    rule = RULES.get(name, RULES.get(f"{name}.{overload}"))
    return None if rule is None else rule(given, used)


def _batch_norm(given: Given, used: Used) -> str | None:
    """Parameters are indexed by channel. In evaluation the CPU returns no statistics, though the type says so."""
    if not given.get("training", False) and any(used[1:3]):
        return "its statistics are read"
    return _channels(given)


def _channels(given: Given) -> str | None:
    channels = given["input"].shape[1:2]
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = given.get(name)
        if tensor is not None and tensor.shape != channels:
            return f"{name} has the shape {list(tensor.shape)}, not {list(channels)}"
    return None


def _group_norm(given: Given, used: Used) -> str | None:
    shape, sizes = given["input"].shape, (given["N"], given["C"], given["HxW"])
    if len(shape) < 2 or shape[:2] != sizes[:2] or math.prod(shape) != math.prod(sizes):
        return f"N, C and HxW are {sizes}, and the input has the shape {list(shape)}"
    return _channels(given)


def _weight_norm(given: Given, used: Used) -> str | None:
    shape, dim = given["v"].shape, given.get("dim", 0)
    if not math.prod(shape) or dim not in range(0, len(shape), max(len(shape) - 1, 1)):
        return f"dim is {dim} of the shape {list(shape)}: neither the first nor the last, or one is empty"
    if not (given["v"].is_contiguous() and given["g"].is_contiguous()):
        return "v or g is not contiguous"
    norms = [size if axis == dim else 1 for axis, size in enumerate(shape)]
    return None if list(given["g"].shape) == norms else f"g has the shape {list(given['g'].shape)}, not {norms}"


def _attention(given: Given, used: Used) -> str | None:
    query, key, value = given["query"].shape, given["key"].shape, given["value"].shape
    if min(map(len, (query, key, value))) < 2 or key[-1] != query[-1] or value[:-1] != key[:-1]:
        return f"query, key and value have the shapes {list(query)}, {list(key)} and {list(value)}"
    mask = given.get("attn_mask", given.get("attn_bias"))
    wide = (*query[:-1], key[-2])
    if mask is None or (mask.dim() <= len(wide) and _broadcasts(mask.shape, wide)):
        return None
    return f"the mask has the shape {list(mask.shape)}, which does not broadcast to {list(wide)}"


def _fused_attention(given: Given, used: Used) -> str | None:
    """Kernels index keys and values by the batch and the head of a query, and divide by sizes."""
    query, key, value = given["query"], given["key"], given["value"]
    if not (query.dim() == key.dim() == value.dim() == 4 and query.numel() and key.numel() and value.numel()):
        return "a tensor is empty, or has not 4 dimensions"
    if query.shape[0] != key.shape[0] or query.shape[1] % key.shape[1]:
        return f"query and key have the shapes {list(query.shape)} and {list(key.shape)}"
    return _attention(given, used)


def _broadcasts(shape: tuple[int, ...], wide: tuple[int, ...]) -> bool:
    return all(size in (1, other) for size, other in zip(reversed(shape), reversed(wide), strict=False))


def _fft(given: Given, used: Used) -> str | None:
    tensor, dims = given["self"], given["dim"]
    rank = tensor.dim()
    if not dims or not all(-rank <= dim < rank for dim in dims) or len({dim % rank for dim in dims}) != len(dims):
        return f"dim is {dims} and the tensor has {rank} dimensions"
    if tensor.is_complex() == ("onesided" in given) or not (tensor.is_complex() or tensor.is_floating_point()):
        return f"the tensor is {tensor.dtype}"
    size = given.get("last_dim_size")
    if size is not None and (size < 1 or tensor.shape[dims[-1]] != size // 2 + 1):
        return f"last_dim_size is {size} for {tensor.shape[dims[-1]]} frequencies"
    return None


def _upsample(given: Given, used: Used) -> str | None:
    """A scale must be about the ratio of the sizes. Tables of positions are made for a tensor without elements, too."""
    tensor = given.get("self", given.get("input"))
    scales = [given.get(name) for name in ("scales_d", "scales_h", "scales_w", "scales")]
    sizes, factors = list(tensor.shape[2:]), given.get("scale_factors")
    if factors is not None and not all(0 < scale < SMALL for scale in factors):
        return "a scale is not positive"
    wanted = given["output_size"] or [size * scale for size, scale in zip(sizes, factors or (), strict=False)]
    if not tensor.numel() and max(wanted, default=0) > MAX_EMPTY:
        return f"the tensor is empty, and its new sizes are {wanted}"
    for scale, before, after in zip(
        reversed([one for one in scales if one is not None]),
        reversed(sizes),
        reversed(given["output_size"] or ()),
        strict=False,
    ):
        if not abs(before * scale - after) <= 1:
            return f"a scale is {scale}, and the sizes are {before} and {after}"
    return None


def _pieces(given: Given, used: Used) -> str | None:
    """The type of a call that returns a list must not be a list of a length that the graph does not take."""
    shape, dim, size = given["self"].shape, given.get("dim", 0), given.get("split_size", 1)
    if not -len(shape) <= dim < len(shape):
        return f"dim is {dim} and the tensor has {len(shape)} dimensions"
    found = -(-shape[dim] // size) if size > 0 else 0
    return None if max(found, 1) == len(used) else f"it has {found} results, of which the graph takes {len(used)}"


def _strided(given: Given, used: Used) -> str | None:
    """A view by sizes and strides stays inside of the tensor. A call may return a tensor with other gaps than the file
    says, but never one of fewer elements; what is expanded has less memory than elements."""
    tensor = given["self"]
    length = min(tensor.numel(), aten.extent(tensor.shape, tensor.stride()))
    reach = aten.extent(given["size"], given["stride"]) if len(given["size"]) == len(given["stride"]) else 0
    return None if reach <= length else f"it reaches {reach} elements far in memory of {length}"


def _recurrent(given: Given, used: Used) -> str | None:
    """Parameters and states of LSTMs and GRUs must have the sizes of the layers. Projections are not known here."""
    tensor, states = given["input"], _states(given)
    directions, gates = 1 + given["bidirectional"], 4 if isinstance(given["hx"], list) else 3
    count = given["num_layers"] * directions
    if tensor.dim() != 3 or len(given["params"]) != count * (2 + 2 * given["has_biases"]):
        return f"{len(given['params'])} parameters for {count} layers, and an input of {tensor.dim()} dimensions"
    batch, width, size = tensor.shape[0 if given["batch_first"] else 1], tensor.shape[2], states[0].shape[-1:].numel()
    wanted: list[tuple[int, ...]] = []
    for number in range(count):
        columns = width if number < directions else directions * size
        wanted += [(gates * size, columns), (gates * size, size)]
        wanted += [(gates * size,)] * (2 * given["has_biases"])
    if [tuple(one.shape) for one in given["params"]] != wanted:
        return f"parameters of other shapes than {count} layers of {size} have"
    fits = [tuple(state.shape) for state in states] == [(count, batch, size)] * (2 if gates == 4 else 1)
    return None if fits else f"states of other shapes than {[count, batch, size]}"


def _states(given: Given) -> list[torch.Tensor]:
    return given["hx"] if isinstance(given["hx"], list) else [given["hx"]]


def _one_dtype(given: Given, used: Used) -> str | None:
    """The result has the dtype of the first tensor, though its type has that of both."""
    dtypes = {value.dtype for value in given.values() if isinstance(value, torch.Tensor)}
    return None if len(dtypes) < 2 else "its tensors have different dtypes"


def _loss(given: Given, used: Used) -> str | None:
    """Losses of elements broadcast in part, and leave the rest of the result as it was."""
    shape, target = given["self"].shape, given["target"].shape
    return None if shape == target else f"the target has the shape {list(target)}, not {list(shape)}"


def _planar(given: Given, used: Used) -> str | None:
    return None if given["self"].dim() == 2 else f"the tensor has {given['self'].dim()} dimensions, not 2"


RULES: Mapping[str, Callable[[Given, Used], str | None]] = {
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional"), _batch_norm
    ),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "cudnn_batch_norm"), _batch_norm),
    "_batch_norm_with_update_functional": lambda given, used: _channels(given),
    "native_group_norm": _group_norm,
    "_weight_norm_interface": _weight_norm,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention"), _fused_attention),
    "_scaled_dot_product_efficient_attention": _fused_attention,
    "_scaled_dot_product_flash_attention_for_cpu": _fused_attention,
    **dict.fromkeys(("_fft_c2c", "_fft_c2r", "_fft_r2c"), _fft),
    **dict.fromkeys(("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"), _upsample),
    **dict.fromkeys(("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"), _upsample),
    **dict.fromkeys(("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"), _upsample),
    **dict.fromkeys(("upsample_bicubic2d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa"), _upsample),
    **dict.fromkeys(("unbind", "unbind_copy", "split", "unsafe_split"), _pieces),
    **dict.fromkeys(("lstm", "gru"), _recurrent),
    "as_strided": _strided,
    "_pdist_forward": _planar,
    "normal.Tensor_Tensor": _one_dtype,
    **dict.fromkeys(("binary_cross_entropy", "mse_loss", "smooth_l1_loss"), _loss),
    "huber_loss": lambda given, used: _one_dtype(given, used) or _loss(given, used),
}


def recurrent_results(given: Given) -> list[torch.Tensor]:
    """The results of LSTMs and GRUs: running these step by step on meta tensors would take as long as on others."""
    states = _states(given)
    width = states[0].shape[-1] * (1 + given["bidirectional"])
    return [given["input"].new_empty((*given["input"].shape[:-1], width)), *states]


def positions(given: Given) -> list[torch.Tensor]:
    """The result of `nonzero`."""
    return [torch.empty((ANY, given["self"].dim()), dtype=torch.int64, device="meta")]


def different(given: Given) -> list[torch.Tensor]:
    """The results of `_unique2` and `unique_dim`, of which those that nobody asks for are empty, as on a GPU."""
    shape, places = [ANY], given["self"].shape
    if "dim" in given:
        axis = given["dim"] % given["self"].dim()
        shape, places = [*places[:axis], ANY, *places[axis + 1 :]], places[axis : axis + 1]
    sizes = places if given.get("return_inverse") else [0], [ANY] if given.get("return_counts") else [0]
    return [given["self"].new_empty(shape), *(torch.empty(size, dtype=torch.int64, device="meta") for size in sizes)]


def elements(given: Given) -> list[torch.Tensor]:
    """The result of an index by tensors, of which a mask stands for the positions in it, one for each dimension."""
    found = torch.empty(ANY, dtype=torch.int64, device="meta")
    masks = (torch.bool, torch.uint8)
    indices = [[found] * one.dim() if one is not None and one.dtype in masks else [one] for one in given["indices"]]
    return [torch.ops.aten.index.Tensor(given["self"], [one for some in indices for one in some])]


def number(given: Given) -> list[Any]:
    """A number of the kind that a tensor has."""
    dtype = given["self"].dtype
    return [None if dtype.is_complex else 1.0 if dtype.is_floating_point else dtype == torch.bool or 1]


def reshaped(given: Given) -> list[torch.Tensor]:
    """The result of a view that may have to copy."""
    return [torch.ops.aten.reshape.default(given["self"], given["size"])]


ANY = 2**40 + secrets.randbelow(2**40)  # a size that data decides; no file can know it
INFERRED: Mapping[str, Callable[[Given], list[Any]]] = {
    "aten._assert_scalar.default": lambda given: [],  # of a sample it says nothing
    "aten._local_scalar_dense.default": number,
    "aten.lstm.input": recurrent_results,
    "aten.gru.input": recurrent_results,
    "aten.nonzero.default": positions,
    **dict.fromkeys(("aten._unique2.default", "aten.unique_dim.default"), different),
    "aten.index.Tensor": elements,
    # As generated code calls them, see `runtime.code.RELAXED`.
    **dict.fromkeys(("aten.view.default", "aten._unsafe_view.default"), reshaped),
}
