"""Convolutions that write to memory of the caller, as cuDNN can, but no call of PyTorch's that chooses the library.

A training step saves the results of most convolutions. In the arena their memory is free for others after their last
use, and in that of a forward's CUDA graph for what the backward computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_rtx.ir import Node, TensorType

CONVOLUTION = "aten.convolution.default"
RANKS = (4, 5)  # of images that cuDNN takes as they are


def writes_anywhere(node: Node) -> bool:
    """Whether cuDNN computes this call on a GPU, unless the program forbids it: images in half precision, without
    groups. Of float32 the program may choose the precision in several ways."""
    if node.op != CONVOLUTION or node.arg("transposed") or node.arg("groups") != 1 or not node.inputs:
        return False
    type_ = node.inputs[0].type
    return isinstance(type_, TensorType) and type_.dtype in ("f16", "bf16") and len(type_.shape) in RANKS


def convolve(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    *,
    out: torch.Tensor,
) -> None:
    """`aten.convolution`, written to `out`; by way of a copy where the library is not cuDNN."""
    given = input, weight, bias, stride, padding, dilation, transposed, output_padding, groups
    if torch._C._select_conv_backend(*given) != torch._C._ConvBackend.Cudnn:  # type: ignore[attr-defined]
        out.copy_(torch.ops.aten.convolution(*given))
        return
    cudnn = torch.backends.cudnn
    choice = cudnn.benchmark, cudnn.deterministic or torch.are_deterministic_algorithms_enabled(), True
    torch.ops.aten.cudnn_convolution.out(input, weight, padding, stride, dilation, groups, *choice, out=out)
    if bias is not None:
        out.add_(bias.view(-1, *[1] * (out.dim() - 2)))
