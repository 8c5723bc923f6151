"""Platforms: the operating systems that an engine may be bound to. A leaf: neither torch nor Triton."""

from __future__ import annotations

import sys

ANY = "any"
WINDOWS = "windows"
PLATFORMS = (ANY, "linux", WINDOWS)


def here() -> str:
    """The platform of this process: `linux`, `windows`, or what Python calls another one."""
    return WINDOWS if sys.platform == "win32" else sys.platform


def runs_here(platform: str) -> bool:
    """Whether an engine for `platform` may run in this process."""
    return platform in (ANY, here())
