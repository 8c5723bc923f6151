"""ONNX's element types as PyTorch's."""

from __future__ import annotations

from typing import Any

import torch

from torch_rtx.errors import OnnxError

_torch: Any = torch  # whose annotations lack some types

# By the number in ONNX's TensorProto.DataType. Types of less than a byte have one element per byte here: tensors of
# torch.uint4 and the like, which `x.view(torch.uint8)` or `x.view(torch.int8)` reads.
DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    14: torch.complex64,
    15: torch.complex128,
    16: torch.bfloat16,
    17: torch.float8_e4m3fn,
    18: torch.float8_e4m3fnuz,
    19: torch.float8_e5m2,
    20: torch.float8_e5m2fnuz,
    21: _torch.uint4,
    22: _torch.int4,
    23: torch.float4_e2m1fn_x2,
    24: torch.float8_e8m0fnu,
    25: _torch.uint2,
    26: _torch.int2,
}
PACKED: dict[torch.dtype, int] = {  # bits
    _torch.uint4: 4,
    _torch.int4: 4,
    torch.float4_e2m1fn_x2: 4,
    _torch.uint2: 2,
    _torch.int2: 2,
}
SIGNED: set[torch.dtype] = {_torch.int4, _torch.int2}
_NAMES = {8: "STRING", 27: "FLOAT6E2M3", 28: "FLOAT6E3M2"}


def dtype_of(code: int) -> torch.dtype:
    """The dtype of a number of ONNX's TensorProto.DataType.

    Raises:
        OnnxError: PyTorch has no such type.
    """
    if code not in DTYPES:
        raise OnnxError(f"tensors of type {_NAMES.get(code, code)} are not supported")
    return DTYPES[code]
