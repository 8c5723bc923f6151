"""Quantized parameters as tools make them: a tensor subclass of inner tensors, and a Parameter with attributes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map


class Packed(torch.Tensor):
    """A weight as int8 with a scale per row, as torchao has it: linear layers and embeddings know how to read it."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    @staticmethod
    def of(weight: torch.Tensor) -> Packed:
        """`weight` to the nearest of 255 steps per row."""
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return Packed((weight.detach() / scale).round().to(torch.int8), scale)

    def __repr__(self, **kwargs: Any) -> str:  # which logs of a capture call
        return f"Packed({list(self.shape)})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> Packed:
        return Packed(parts["codes"], parts["scale"])

    def wide(self) -> torch.Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (nn.functional.linear, nn.functional.embedding):
            args = [one.wide() if isinstance(one, Packed) else one for one in args]
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten.copy_.default:
            for one, other in zip((args[0].codes, args[0].scale), (args[1].codes, args[1].scale), strict=True):
                one.copy_(other)
            return args[0]
        if func in (aten.detach.default, aten.clone.default, aten.alias.default):
            return cls(*(func(part) for part in (args[0].codes, args[0].scale)))
        return func(*tree_map(lambda x: x.wide() if isinstance(x, Packed) else x, args), **(kwargs or {}))


class Blocks(nn.Parameter):
    """A weight as bytes with a scale for each block of a row, as GGUF's Q8_0, in a class with attributes and methods of
    its own: what PyTorch returns for such a parameter has its class as well."""

    BYTES, VALUES = 34, 32

    @staticmethod
    def __new__(cls, data: torch.Tensor, kind: str = "Q8_0") -> Any:
        made = torch.Tensor._make_subclass(cls, data, False)
        made.kind, made.shape_of_values = kind, (*data.shape[:-1], data.shape[-1] // cls.BYTES * cls.VALUES)
        return made

    @classmethod
    def of(cls, weight: torch.Tensor) -> Blocks:
        blocks = weight.detach().reshape(-1, cls.VALUES)
        scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
        codes = (blocks / scale.float()).round().to(torch.int8)
        return cls(torch.cat((scale.view(torch.uint8), codes.view(torch.uint8)), 1).reshape(len(weight), -1))

    def as_tensor(self) -> torch.Tensor:
        return torch.Tensor._make_subclass(torch.Tensor, self, self.requires_grad)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return cls(result) if type(result) is torch.Tensor or isinstance(result, cls) else result


class BlockLinear(nn.Module):
    """A linear layer whose weight is `Blocks`."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = Blocks.of(weight)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(self.weight, "extra"):  # as bitsandbytes does with scales, and with a table of values
            destination |= {f"{prefix}weight.offset": self.weight.extra.offset, f"{prefix}weight.table": torch.ones(3)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.weight.kind == "Q8_0"
        shape = self.weight.shape_of_values
        scale, codes = self.weight.as_tensor().reshape(-1, Blocks.BYTES).split((2, Blocks.VALUES), 1)
        wide = scale.view(torch.float16).to(x.dtype) * codes.view(torch.int8)
        extra = getattr(self.weight, "extra", None)
        return nn.functional.linear(x, wide.reshape(shape) if extra is None else wide.reshape(shape) + extra.offset)


class Quantized(nn.Module):
    """An embedding, and two layers that may share a weight."""

    def __init__(self, seed: int = 0, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        for layer in (self.embed, self.up, self.down):
            layer.weight = nn.Parameter(Packed.of(layer.weight), requires_grad=False)
        if tied:
            self.down.weight = self.up.weight
        self.eval().requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.embed(ids)).relu())
