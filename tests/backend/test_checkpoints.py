"""Checkpoints of quantized models whose packing is plain arithmetic of PyTorch: GPTQ and AWQ."""

import itertools

import pytest
import torch
from torch import nn

import torch_rtx


def ints(*shape):
    made = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(1))
    return made.to(torch.int32)


def scales(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)).half() / 16 + 0.01


class Gptq(nn.Module):
    """A linear layer of a GPTQ checkpoint: eight 4-bit codes per int32, along the inputs in `qweight` and along the
    outputs in `qzeros`, which lack 1; `g_idx` has the group of each input."""

    def __init__(self, inputs, outputs, group, ordered):
        super().__init__()
        groups = inputs // group
        self.register_buffer("qweight", ints(inputs // 8, outputs))
        self.register_buffer("qzeros", ints(groups, outputs // 8))
        self.register_buffer("scales", scales(groups, outputs))
        index = torch.arange(inputs) // group
        self.register_buffer("g_idx", index if ordered else index.flip(0))
        self.register_buffer("shifts", torch.arange(0, 32, 4, dtype=torch.int32))

    def forward(self, x):
        codes = ((self.qweight[:, None] >> self.shifts[:, None]) & 15).flatten(0, 1)
        zeros = ((self.qzeros[..., None] >> self.shifts) & 15).flatten(1) + 1
        return x @ ((codes - zeros[self.g_idx]) * self.scales[self.g_idx].to(x.dtype))

    def by_hand(self):
        """The weight, code by code."""
        wide = torch.empty(len(self.g_idx), self.scales.shape[1])
        for i, j in itertools.product(*map(range, wide.shape)):
            group = self.g_idx[i]
            code = (int(self.qweight[i // 8, j]) >> 4 * (i % 8)) & 15
            zero = ((int(self.qzeros[group, j // 8]) >> 4 * (j % 8)) & 15) + 1
            wide[i, j] = (code - zero) * float(self.scales[group, j])
        return wide


class Awq(nn.Module):
    """A linear layer of an AWQ checkpoint: eight codes per int32 along the outputs, in the order 0 2 4 6 1 3 5 7."""

    PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the eight outputs

    def __init__(self, inputs, outputs, group):
        super().__init__()
        self.group = group
        self.register_buffer("qweight", ints(inputs, outputs // 8))
        self.register_buffer("qzeros", ints(inputs // group, outputs // 8))
        self.register_buffer("scales", scales(inputs // group, outputs))

    def unpacked(self, packed):
        shifts = torch.tensor([4 * place for place in self.PLACES], dtype=torch.int32, device=packed.device)
        return ((packed[..., None] >> shifts) & 15).flatten(1)

    def forward(self, x):
        zeros, steps = self.unpacked(self.qzeros)[:, None], self.scales[:, None].to(x.dtype)
        codes = self.unpacked(self.qweight).unflatten(0, (-1, self.group))
        return x @ ((codes - zeros) * steps).flatten(0, 1)

    def by_hand(self):
        wide = torch.empty(len(self.qweight), self.scales.shape[1])
        for i, j in itertools.product(*map(range, wide.shape)):
            shift, group = 4 * self.PLACES[j % 8], i // self.group
            code, zero = (
                (int(packed[row, j // 8]) >> shift) & 15 for packed, row in ((self.qweight, i), (self.qzeros, group))
            )
            wide[i, j] = (code - zero) * float(self.scales[group, j])
        return wide


@pytest.mark.parametrize("device", [None, "cuda"])
@pytest.mark.parametrize("layer", [Gptq(32, 24, 16, True), Gptq(32, 24, 16, False), Awq(24, 16, 8)])
def test_checkpoints_of_gptq_and_awq(layer, device):
    x = torch.linspace(-1, 1, 3 * len(layer.by_hand())).reshape(3, -1)
    module = torch_rtx.compile(layer, (x,), settings=torch_rtx.CompilationSettings(device=device))
    torch.testing.assert_close(module(x), x @ layer.by_hand())
    types = {parameter.name: parameter.type.dtype for parameter in module.engine.graph.parameters}
    assert types["qweight"] == types["qzeros"] == "i32"
    assert [node.op for node in module.engine.graph.nodes if node.kind == "fallback"] == []
