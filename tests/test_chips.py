"""GPUs as the cost model sees them: data sheets, names, what was measured."""

from __future__ import annotations

import json
import pickle
from math import inf, isfinite

import pytest

from tests.paths import ROOT
from torch_rtx.chips import FIGURES, REQUIRED, chip_named, typical_chip
from torch_rtx.targets import ARCHES

# By name: TFLOP/s of f16 products that are summed in f32, of int8, and GB/s, as data sheets give them.
SHEETS = {
    "RTX 2060": (26, 103, 336),
    "RTX 3050": (18, 73, 224),
    "RTX 3090": (71, 285, 936),
    "RTX A6000": (155, 310, 768),
    "A100": (312, 624, 1555),
    "RTX 4060": (30, 121, 272),
    "RTX 4090": (165, 661, 1008),
    "L40S": (366, 733, 864),
    "RTX 5090": (210, 838, 1792),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", SHEETS)
def test_rates_are_those_of_data_sheets(name: str) -> None:
    chip, (half, int8, memory) = chip_named(name), SHEETS[name]
    assert chip is not None
    assert (chip.rate("bf16"), chip.rate("i8")) == (pytest.approx(half, rel=0.02), pytest.approx(int8, rel=0.02))
    assert chip.rate("tf32") == chip.tensor / 2
    assert chip.rate("f32") == chip.rate("f64") == chip.plain
    assert 0.8 * memory < chip.memory < 0.95 * memory


@pytest.mark.quick
def test_the_h200_is_as_it_was_fitted() -> None:
    chip = typical_chip(90)
    assert (chip.processors, round(chip.tensor), round(chip.plain), chip.memory) == (132, 865, 60, 4200)
    assert (chip.clock, chip.cache, chip.overlap, chip.launch) == (1.6, inf, 1.0, 1.5)


@pytest.mark.quick
def test_the_h200_reaches_what_was_recorded() -> None:
    """Copies and products of libraries, as each run of the benchmarks measures them."""
    chip = typical_chip(90)
    files = [ROOT / f"benchmarks/results/h200_{name}.json" for name in ("latency_zoo", "train")]
    recorded = [one for file in files for one in json.loads(file.read_text())["environments"].values()]
    rates = [environment["rates"] for environment in recorded if environment.get("rates")]
    assert len(rates) > 10
    for rate in rates:
        assert rate["bytes_per_s"] / 1e9 == pytest.approx(chip.memory, rel=0.04)
        for product in rate["flops_per_s"].values():
            assert product / 1e12 == pytest.approx(chip.library * chip.tensor, rel=0.05)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx4070tisuper"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx pro 6000"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),  # the chip of another one
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A10G", None),
        ("a GPU", None),
        ("", None),
    ],
)
def test_names(name: str, like: str | None) -> None:
    assert chip_named(name) == (None if like is None else chip_named(like))
    assert like is None or chip_named(name) is not None


@pytest.mark.quick
def test_a_name_of_another_sm_version_is_not_that_gpu() -> None:
    assert chip_named("RTX 4090", 89) == typical_chip(89) == ARCHES[89].chip
    assert chip_named("RTX 4090", 90) is None


@pytest.mark.quick
@pytest.mark.parametrize("sm", ARCHES)
def test_a_part_of_a_chip_has_a_part_of_its_rates(sm: int) -> None:
    chip = typical_chip(sm)
    half = chip.scaled(chip.processors // 2, chip.memory / 0.875 / 4, 10 * chip.clock)
    assert half.memory == pytest.approx(chip.memory / 4)
    for dtype in ("f16", "i8", "f32"):
        assert half.rate(dtype) / half.processors == pytest.approx(chip.rate(dtype) / chip.processors)
    assert chip.scaled(chip.processors, 100, chip.clock / 2).tensor == pytest.approx(chip.tensor / 2)  # of laptops


FOUND = {
    "memory": 250.0,
    "l2": 1500.0,
    "clock": 2.4,
    "node": 1.0,
    "launch": 2.0,
    "f16": 30.0,
    "bf16": 29.0,
    "f32": 13.0,
    "i8": 110.0,
}


@pytest.mark.quick
def test_what_was_measured_counts() -> None:
    chip = typical_chip(89).measured(FOUND)
    assert (chip.tensor, chip.memory, chip.plain) == (30.0, 250.0, 13.0)
    assert (chip.rate("bf16"), chip.rate("i8")) == (pytest.approx(29.0), pytest.approx(110.0))
    assert chip.rate("f8e4m3fn") == 2 * chip.tensor  # has no figure
    assert chip.launch == pytest.approx(1.44)
    assert pickle.loads(pickle.dumps(chip)) == chip  # for the process that compiles
    hopper = typical_chip(90).measured(FOUND)
    assert not isfinite(hopper.cache)
    assert hopper.tensor > 30.0  # libraries do not reach all of it
    assert FOUND.keys() >= set(REQUIRED)
    assert FOUND.keys() <= FIGURES.keys()
