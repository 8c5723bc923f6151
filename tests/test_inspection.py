"""What `inspect` says of the layers of an engine."""

from __future__ import annotations

from pathlib import Path

import torch

import torch_rtx
from tests.lowering.test_prologues import Int4
from tests.lowering.test_prologues import compiled as prologue
from tests.lowering.test_scaled_products import Dynamic, compiled


def test_dtypes_of_layers(tmp_path: Path) -> None:
    torch_rtx.save(compiled(Dynamic()), tmp_path / "a.rtx")
    found = torch_rtx.inspect(tmp_path / "a.rtx")
    assert [str(layer).rpartition(": ")[2] for layer in found.layers] == ["f8e4m3fn x f8e4m3fn -> f16"] * 2
    assert {layer.op for layer in found.layers} == {"aten._scaled_mm.default"}
    assert "layers: 2\n  tests/lowering/test_scaled_products.py:" in str(found)
    torch_rtx.save(prologue(torch.nn.Sequential(Int4(), torch.nn.Linear(64, 8).half())), tmp_path / "b.rtx")
    assert [str(layer) for layer in torch_rtx.inspect(tmp_path / "b.rtx").layers] == [
        "0: f16 x f16 from i32 -> f16",
        "1: f16 x f16 -> f16",
    ]
    model = torch.nn.Conv2d(3, 4, 3)
    torch_rtx.save(torch_rtx.compile(model, (torch.randn(1, 3, 8, 8),)), tmp_path / "c.rtx")
    (layer,) = torch_rtx.inspect(tmp_path / "c.rtx").layers
    assert (layer.operands, layer.result) == (("f32", "f32"), "f32")
