"""Mixtures of experts and products with packed weights, of com.microsoft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.ops.microsoft import MS, matmul_nbits, unpack
from torch_rtx.onnx.registry import op

# ---- products with packed weights ------------------------------------------------------------------------------------

# What the codes of 4 bits of bitsandbytes stand for.
FP4 = [0.0, 0.005208333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25]
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


@op("MatMulBnb4", domain=MS)
def matmul_bnb4(
    a: Tensor,
    b: Tensor,
    absmax: Tensor,
    *,
    K: int,
    N: int,
    block_size: int,
    quant_type: int,
    training_mode: int = 0,
    transB: int = 1,
) -> Tensor:
    """a (..., K) by weights (N, K) of bitsandbytes: codes of 4 bits, the first in the higher ones."""
    if quant_type not in (0, 1):
        raise OnnxError(f"quant_type {quant_type} is neither 0 (FP4) nor 1 (NF4)")
    codes = torch.stack([b.reshape(-1) >> 4, b.reshape(-1) & 15], -1).reshape(-1)[: N * K].long()
    table = torch.tensor(NF4 if quant_type else [*FP4, *(-value for value in FP4)], dtype=a.dtype, device=a.device)
    weights = table[codes] * absmax.to(a.dtype).repeat_interleave(block_size)[: N * K]
    return F.linear(a, weights.reshape(N, K)) if transB else a @ weights.reshape(N, K)


def _normalized(a: Tensor, skip: Tensor | None, scale: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """(Skip)SimplifiedLayerNormalization where there is a scale, and the sum."""
    total = a if skip is None else a + skip
    return total if scale is None else F.rms_norm(total, scale.shape, scale, epsilon), total


@op("MatMulNBitsQkv", domain=MS)
def matmul_nbits_qkv(
    a: Tensor,
    skip: Tensor | None,
    norm_scale: Tensor,
    q: Tensor,
    q_scales: Tensor,
    q_bias: Tensor | None,
    k: Tensor,
    k_scales: Tensor,
    k_bias: Tensor | None,
    v: Tensor,
    v_scales: Tensor,
    v_bias: Tensor | None = None,
    *,
    K: int,
    Nkv: int,
    Nq: int,
    accuracy_level: int = 0,
    bits: int = 4,
    block_size: int,
    epsilon: float = 1e-6,
    outputs: int = 3,
) -> tuple[Tensor, ...]:
    """Normalization, and three products with packed weights; the sum of a and skip."""
    x, total = _normalized(a, skip, norm_scale, epsilon)
    packed = [(q, q_scales, q_bias, Nq), (k, k_scales, k_bias, Nkv), (v, v_scales, v_bias, Nkv)]
    found = [
        matmul_nbits(x, weight, scales, None, None, bias, K=K, N=count, bits=bits, block_size=block_size)
        for weight, scales, bias, count in packed
    ]
    return (*found, total)[:outputs]


@op("MatMulNBitsMlp", domain=MS)
def matmul_nbits_mlp(
    a: Tensor,
    skip: Tensor | None,
    norm_scale: Tensor | None,
    gate: Tensor,
    gate_scales: Tensor,
    gate_bias: Tensor | None,
    up: Tensor,
    up_scales: Tensor,
    up_bias: Tensor | None = None,
    *,
    K: int,
    N: int,
    accuracy_level: int = 0,
    activation: str,
    bits: int = 4,
    block_size: int,
    epsilon: float = 1e-5,
    outputs: int = 1,
) -> tuple[Tensor, ...]:
    """Normalization, if there is a scale, and the activation of one product with packed weights by another."""
    if activation != "silu":
        raise OnnxError(f"activation {activation!r} is not supported", hint="'silu' is.")
    x, total = _normalized(a, skip, norm_scale, epsilon)
    sizes: dict[str, int] = {"K": K, "N": N, "bits": bits, "block_size": block_size}
    left = matmul_nbits(x, gate, gate_scales, None, None, gate_bias, **sizes)
    return (F.silu(left) * matmul_nbits(x, up, up_scales, None, None, up_bias, **sizes), total)[:outputs]


# ---- experts ---------------------------------------------------------------------------------------------------------


@dataclass
class Experts:
    """How experts are chosen and what they compute: attributes of MoE."""

    activation_alpha: float = 1.0
    activation_beta: float = 0.0
    activation_type: str = "relu"
    k: int = 1
    normalize_routing_weights: int = 0
    swiglu_fusion: int = 0
    swiglu_limit: float | None = None
    swiglu_limit_after_activation: int = 0
    use_sparse_mixer: int = 0

    def __post_init__(self) -> None:
        if self.use_sparse_mixer or self.swiglu_limit_after_activation:
            raise OnnxError("use_sparse_mixer and swiglu_limit_after_activation are not supported")

    def mixing(self, router: Tensor, weights: Tensor | None) -> Tensor:
        """How much of each expert each token gets, (tokens, experts)."""
        best = router.float().topk(self.k, -1)
        if weights is not None:
            chosen = weights.float().gather(1, best.indices)
            chosen = chosen / chosen.sum(-1, True) if self.normalize_routing_weights else chosen
        elif self.normalize_routing_weights:
            chosen = torch.softmax(best.values, -1)
        else:
            chosen = torch.softmax(router.float(), -1).gather(1, best.indices)
        return torch.zeros_like(router, dtype=torch.float32).scatter(1, best.indices, chosen).to(router.dtype)

    def activated(self, x: Tensor, linear: Tensor | None) -> Tensor:
        """The function between the products, of the first and, unless it is fused, the third."""
        gated = self.activation_type in ("swiglu", "geglu")
        if gated and linear is None:
            if self.swiglu_fusion not in (1, 2):
                raise OnnxError(f"{self.activation_type} lacks a third weight or swiglu_fusion")
            x, linear = x.unflatten(-1, (-1, 2)).unbind(-1) if self.swiglu_fusion == 1 else x.chunk(2, -1)
        if self.activation_type == "swiglu" and linear is not None:
            if self.swiglu_limit is not None:
                x, linear = x.clamp(max=self.swiglu_limit), linear.clamp(-self.swiglu_limit, self.swiglu_limit)
            return x * torch.sigmoid(self.activation_alpha * x) * (linear + self.activation_beta)
        if self.activation_type == "geglu" and linear is not None:
            return F.gelu(x, approximate="tanh") * linear
        functions: dict[str, Any] = {
            "relu": F.relu,
            "gelu": lambda x: F.gelu(x, approximate="tanh"),
            "silu": F.silu,
            "identity": lambda x: x,
        }
        functions["relu2"] = lambda x: F.relu(x).square()
        if self.activation_type not in functions:
            raise OnnxError(f"activation_type {self.activation_type!r} is not known")
        active = functions[self.activation_type](x)
        return active if linear is None else active * linear

    def compute(
        self, x: Tensor, router: Tensor, mixed_by: Tensor | None, layers: Sequence[tuple[Tensor, Tensor | None] | None]
    ) -> Tensor:
        """x (..., H); layers: the weights (experts, out, in) and biases (experts, out) of three products.

        All experts compute all tokens, which keeps sizes free of data.
        """
        tokens = x.reshape(-1, x.shape[-1])
        first, second, third = (None if layer is None else _product(layer) for layer in layers)
        assert first is not None
        assert second is not None
        inner = self.activated(first(tokens.unsqueeze(0)), None if third is None else third(tokens.unsqueeze(0)))
        every = second(inner)  # (experts, tokens, H)
        return torch.einsum("te,eth->th", self.mixing(router, mixed_by), every).reshape(x.shape)


def _product(layer: tuple[Tensor, Tensor | None]) -> Any:
    weight, bias = layer
    return lambda x: x @ weight.mT if bias is None else x @ weight.mT + bias.unsqueeze(1)


@op("MoE", domain=MS)
def moe(
    x: Tensor,
    router_probs: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    fc2_bias: Tensor | None = None,
    fc3: Tensor | None = None,
    fc3_bias: Tensor | None = None,
    **attributes: Any,
) -> Tensor:
    """x (..., H), router_probs (tokens, experts), weights (experts, out, in) -> (..., H)."""
    third = None if fc3 is None else (fc3, fc3_bias)
    return Experts(**attributes).compute(x, router_probs, None, [(fc1, fc1_bias), (fc2, fc2_bias), third])


@op("QMoE", domain=MS)
def qmoe(
    x: Tensor,
    router_probs: Tensor,
    fc1: Tensor,
    fc1_scales: Tensor | None,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    fc2_scales: Tensor | None,
    fc2_bias: Tensor | None = None,
    fc3: Tensor | None = None,
    fc3_scales: Tensor | None = None,
    fc3_bias: Tensor | None = None,
    fc1_zero: Tensor | None = None,
    fc2_zero: Tensor | None = None,
    fc3_zero: Tensor | None = None,
    router_weights: Tensor | None = None,
    *others: Tensor | None,
    accuracy_level: int = 0,
    block_size: int = 0,
    expert_weight_bits: int = 4,
    quant_type: str = "int",
    weights_prepacked: int = -1,
    **attributes: Any,
) -> Tensor:
    """MoE with weights (experts, out, in * bits / 8) of packed integers, and scales (experts, out) or of blocks."""
    known = {field.name for field in fields(Experts)}
    refused = [name for name in attributes if name not in known]
    if quant_type != "int" or weights_prepacked == 1 or refused or any(x is not None for x in others):
        raise OnnxError("QMoE of this layout is not supported", hint="quant_type 'int' with weights as they are is")
    layers = [
        None if fc is None or scales is None else (_unpacked(fc, scales, zero, expert_weight_bits, block_size), bias)
        for fc, scales, zero, bias in (
            (fc1, fc1_scales, fc1_zero, fc1_bias),
            (fc2, fc2_scales, fc2_zero, fc2_bias),
            (fc3, fc3_scales, fc3_zero, fc3_bias),
        )
    ]
    return Experts(**attributes).compute(x, router_probs, router_weights, layers)


def _unpacked(packed: Tensor, scales: Tensor, zero: Tensor | None, bits: int, block_size: int) -> Tensor:
    """Weights (experts, out, in)."""
    codes = unpack(packed, bits).to(scales.dtype)
    scales = scales.unsqueeze(-1) if scales.dim() == 2 else scales
    middle: Any = 1 << bits - 1
    if zero is not None:
        middle = (
            unpack(zero, bits).reshape(codes.shape[0], -1)[:, : codes.shape[1]]
            if zero.dim() == 2
            else unpack(zero, bits)
        )
        middle = middle.unsqueeze(-1) if middle.dim() == 2 else middle[..., : scales.shape[-1]]
        middle = middle.to(scales.dtype).unsqueeze(-1)
    blocks = codes.unflatten(-1, (scales.shape[-1], -1))
    return ((blocks - middle) * scales.unsqueeze(-1)).flatten(-2)
