"""Engines outlive releases: the ones in tests/engines load and give what they gave when they were written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import torch_rtx
from tests import write_engines
from tests.paths import ENGINES
from torch_rtx.manifest import FORMAT_VERSION, OLDEST_READABLE


def check(path: Path) -> None:
    """Make the recorded calls of the engine at `path`."""
    weights = path.with_suffix(".weights.safetensors")
    module = torch_rtx.load(path, weights=weights if weights.exists() else None)
    recorded = load_file(path.with_suffix(".calls.safetensors"))
    calls = sorted({key.split("/")[0] for key in recorded})
    assert calls

    def part(call: str, kind: str) -> list[torch.Tensor]:
        found = {int(k.split("/")[2]): t for k, t in recorded.items() if k.startswith(f"{call}/{kind}/")}
        return [found[position] for position in range(len(found))]

    for call in calls:
        given = part(call, "in")
        args = ({"x": given[0], "ids": given[1]}, int(given[2])) if path.stem == "symbolic" else tuple(given)
        results, expected = write_engines.tensors(module(*args)), part(call, "out")
        assert len(results) == len(expected)
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.quick
@pytest.mark.parametrize("path", sorted(ENGINES.rglob("*.rtx")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_old_engine(path: Path, tmp_path: Path) -> None:
    assert path.stat().st_size < 16 << 10
    seen = torch_rtx.inspect(path)
    assert seen.manifest.format_version == int(path.parent.name[1:])
    assert ("sm_120" in seen.kernels) is (path.stem in ("kernel", "split", "sums"))
    assert len(seen.profiles) == {"symbolic": 1, "kernel": 1, "profiles": 2, "onnx": 1}.get(path.stem, 0)
    assert (seen.manifest.onnx is not None) is (path.stem == "onnx")
    check(path)
    # Read and written again by this release.
    torch_rtx.save(torch_rtx.load(path), tmp_path / path.name)
    for beside in path.parent.glob(f"{path.stem}.*.safetensors"):
        shutil.copy(beside, tmp_path)
    check(tmp_path / path.name)


def test_every_case_is_kept() -> None:
    later = {"v1": {"kernel", "profiles", "cache", "split"}, "v2": {"profiles", "cache", "split"}}
    later |= {"v3": {"cache", "split"}, "v4": set(), "v5": set()}
    later = {version: names | {"onnx", "sums"} for version, names in later.items()} | {"v6": set(), "v7": set()}
    assert later.keys() == {f"v{version}" for version in range(OLDEST_READABLE, FORMAT_VERSION + 1)}
    for folder, names in later.items():
        assert {path.stem for path in (ENGINES / folder).glob("*.rtx")} == set(write_engines.CASES) - names


def test_the_engines_of_this_release(tmp_path: Path) -> None:
    write_engines.write(tmp_path)
    for name in write_engines.CASES:
        check(tmp_path / f"{name}.rtx")
