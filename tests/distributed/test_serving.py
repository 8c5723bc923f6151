"""An engine of two ranks behind the server of Ray Serve, as `examples/distributed/serve_ray.py` deploys it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray[serve]")
def test_answers_over_http(tmp_path: Path) -> None:
    """The ranks are processes of Ray, each with its part of the weights; their answers are those of the whole model."""
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples/distributed/serve_ray.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    errors = [float(error) for error in re.findall(r"2 ranks, error (\S+)", done.stdout)]
    assert len(errors) == 3, done.stdout + done.stderr
    assert max(errors) < 1e-5
