"""Where the checkout is, and what tests of several folders keep in it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
ENGINES = ROOT / "tests" / "engines"
