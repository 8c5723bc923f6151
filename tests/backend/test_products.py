"""What an engine keeps of the products of its weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torch_rtx
from torch_rtx.backend.products import products_of


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.plain = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        for name in ("right", "turned", "twice", "both", "left", "added", "rows", "unturned", "table"):
            setattr(self, name, nn.Parameter(torch.randn(4, 4)))
        self.bias, self.late, self.shared = (nn.Parameter(torch.randn(4)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        product = x @ self.right
        return (
            self.layer(x),
            self.plain(x),
            self.late + product.reshape(2, 2, 4),
            torch.addmm(self.bias, x, self.turned.t()),
            x @ self.twice.transpose(0, 1).permute(1, 0),
            x @ self.both + x @ self.both.t(),
            self.left @ x,
            x + self.added,
            x @ self.unturned.permute(0, 1),
            (x @ self.rows) * 2 + self.shared,
            nn.functional.embedding(torch.tensor([0]), self.table),
        )


def test_products() -> None:
    found = products_of(torch.export.export(Products(), (torch.randn(4, 4),)))
    assert {name: tuple(fact.values()) for name, fact in found.items()} == {
        "layer.weight": (1, "layer.bias", "layer"),
        "plain.weight": (1, None, "plain"),
        "right": (0, "late", ""),
        "turned": (1, "bias", ""),
        "twice": (0, None, ""),
        "unturned": (0, None, ""),
        "rows": (0, None, ""),
    }


@pytest.mark.parametrize("onnx", [False, True])
def test_engines_have_them(onnx: bool) -> None:
    model, args = nn.Linear(4, 2), (torch.randn(3, 4),)
    if onnx:
        pytest.importorskip("onnx_ir")
        from tests.onnx.models import linear

        model, args = torch_rtx.from_onnx(linear()), (torch.randn(2, 3, 4),)
    name, axis = ("layer.weight", 0) if onnx else ("weight", 1)
    manifest = torch_rtx.compile(model, args).engine.manifest
    bias, module = (None, None) if onnx else ("bias", "")
    assert manifest.products == {name: {"axis": axis, "bias": bias, "module": module}}
    assert (manifest.onnx is not None) is onnx
