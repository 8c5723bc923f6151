"""Tables, errors by layer, and choices under a budget."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_rtx
from tests.quantization.test_model import IDS, loop, model, of
from torch_rtx.errors import QuantizationError
from torch_rtx.quantization import PRESETS, Sensitivity, auto_quantize, print_summary, quantize, sensitivity, summary

AUTO = ["int4_weight_only", "int8", None]


def test_summary(capsys: pytest.CaptureFixture[str]) -> None:
    ours = quantize(model(), {"*": "int8", "down": "nvfp4", "words": "int8_weight_only"}, loop)
    print_summary(ours)
    printed = capsys.readouterr().out
    assert printed == summary(ours) + "\n"
    rows = {line.split()[0]: line.split() for line in printed.splitlines()}
    amax = f"{ours.up.input_amax:.3g}"
    assert rows["up"][1:6] == ["linear", "int8/channel", "int8/tensor", "smooth", "8"]
    assert rows["up"][-3:] == [amax, f"{128 * 256 * 4:,}", f"{128 * 256 + 4 * 256:,}"]
    assert rows["down"][-1] == f"{128 * 256 // 2 + 128 * 256 // 16 + 4:,}"
    tied, up, down = 24 * 128, 128 * 256, 128 * 256  # the tied weight counts once
    after = tied + 4 * 24 + up + 4 * 256 + down // 2 + down // 16 + 4
    assert printed.splitlines()[-1].startswith(
        f"4 layers: {4 * (tied + up + down):,} bytes of weights become {after:,}"
    )
    with pytest.raises(QuantizationError, match="no layer of the model is quantized"):
        summary(model())


def test_sensitivity() -> None:
    """Each layer's error is that of a model in which it alone is quantized, and the model stays float."""
    m = model()
    report = sensitivity(m, "int8", loop)
    assert of(m) == {}
    assert [row.name for row in report.rows] == [row.name for row in sorted(report.rows, key=lambda r: r.sqnr)]
    (row,) = (row for row in report.rows if row.name == "up")
    x = m.words(IDS)
    wanted = m.up(x)
    y = quantize(model(), {"up": "int8"}, loop).up(x)
    assert row.relative_error == pytest.approx(float((y - wanted).norm() / wanted.norm()), rel=1e-4)
    assert 10 ** (-row.sqnr / 20) == pytest.approx(row.relative_error)
    lines = report.table().splitlines()
    assert len(lines) == 2 + len(report.rows)
    assert f"{row.relative_error:.4f}" in next(line for line in lines if line.startswith("up"))
    assert str(report) == report.table()


def test_sensitivity_names_what_no_data_reached() -> None:
    m = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    with pytest.raises(QuantizationError, match="no data reached layers:\n  two"):
        sensitivity(m, "int8_dynamic", lambda m: m["one"](torch.randn(2, 4)))


def test_sensitivity_needs_finite_data() -> None:
    m = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(QuantizationError, match="outputs of layers have NaN or infinity:\n  0\n  1"):
        sensitivity(m, "int8_weight_only", lambda m: m(torch.full((2, 4), torch.nan)))


def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = sensitivity(model(), "int8_dynamic", loop)
    report.plot(tmp_path / "errors.svg")
    assert "<svg" in (tmp_path / "errors.svg").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(torch_rtx.IntegrationError, match="needs matplotlib"):
        Sensitivity(report.rows).plot(tmp_path / "errors.png")


def bits(m: nn.Module, chosen: dict[str, object]) -> float:
    layers = {name: m.get_submodule(name) for name in chosen}
    total = sum(layer.weight.numel() for layer in layers.values())
    widths = {name: 32 if config is None else config.weight.bits for name, config in chosen.items()}
    return sum(widths[name] * layer.weight.numel() for name, layer in layers.items()) / total


def test_auto_by_bits() -> None:
    errors = []
    for budget in (32, 8, 6.2, 4.25):
        m, chosen = auto_quantize(model(), AUTO, loop, effective_bits=budget)
        assert bits(m, chosen) <= budget
        assert of(m) == {name: str(config) for name, config in chosen.items() if config}
        errors.append(float((m(IDS) - model()(IDS)).norm()))
        again = quantize(model(), chosen, loop)
        assert torch.equal(again(IDS), m(IDS))
    assert errors == sorted(errors)
    assert errors[0] == 0
    with pytest.raises(QuantizationError, match=r"no choice has 4 bits: the candidates have 4\.25"):
        auto_quantize(model(), AUTO, loop, effective_bits=4)


def test_auto_by_error() -> None:
    """The fewest bits within the error; what has none stays float."""
    everything = {p: {row.name: row.relative_error for row in sensitivity(model(), p, loop).rows} for p in AUTO[:2]}
    for limit in (0.0, 0.02, 1.0):
        _, chosen = auto_quantize(model(), AUTO, loop, max_error=limit)
        for name, config in chosen.items():
            wanted = next((PRESETS[p] for p in AUTO[:2] if everything[p][name] <= limit), None)
            assert config == wanted


def test_auto_leaves_out_what_does_not_fit() -> None:
    m = nn.Sequential(nn.Linear(100, 128), nn.Linear(128, 128), nn.Linear(128, 4))
    x = torch.randn(8, 100)
    run = lambda m: m(x)  # noqa: E731
    _, chosen = auto_quantize(m, ["int4_weight_only", "int8_weight_only"], run, max_error=1.0, exclude=["2"])
    assert chosen == {"0": PRESETS["int8_weight_only"], "1": PRESETS["int4_weight_only"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either effective_bits or max_error"),
        ({"effective_bits": 4, "max_error": 1}, "either effective_bits or max_error"),
        ({"candidates": [], "max_error": 1}, "needs candidates"),
        ({"candidates": ["int5"], "max_error": 1}, "no preset 'int5'"),
    ],
)
def test_mistakes(options: dict[str, object], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        auto_quantize(model(), forward_loop=loop, **{"candidates": AUTO, **options})  # type: ignore[arg-type]
