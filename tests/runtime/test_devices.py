"""No hidden device: what asks CUDA for a stream, a property or a wait says of which GPU."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import torch_rtx
from torch_rtx.runtime.watch import captures

HOME = Path(torch_rtx.__file__).parent
# Of `torch.cuda`: they mean the current device where they are not told another one.
OF_A_DEVICE = frozenset(
    ("Stream", "current_stream", "default_stream", "get_device_capability", "get_device_name", "get_device_properties")
) | {"mem_get_info", "memory_allocated", "memory_reserved", "synchronize"}
# Where a user names none: "cuda" is the current one, as everywhere in PyTorch.
RESOLVE = {("runtime/module.py", "current_device"), ("backend/compiler.py", "current_device")}


def hidden(source: str) -> Iterator[str]:
    """The functions of `torch.cuda` that are called without a device."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        given = bool(node.args or node.keywords)
        if owner in ("torch.cuda", "self._cuda") and (name == "current_device" or (name in OF_A_DEVICE and not given)):
            yield name


def test_hidden_devices() -> None:
    assert [*hidden("torch.cuda.synchronize(); torch.cuda.synchronize(0)")] == ["synchronize"]
    assert [*hidden("torch.cuda.Stream(); self._cuda.current_stream(self._device)")] == ["Stream"]
    found = {
        (path.relative_to(HOME).as_posix(), name) for path in HOME.rglob("*.py") for name in hidden(path.read_text())
    }
    assert found == RESOLVE


def test_captures_of_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls on the second GPU are captured where that one captures, whichever is the current one."""
    current = [0]

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.index, self.before = device.index, 0

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_: object) -> None:
            current[0] = self.before

    capturing = {0}
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] in capturing)
    assert not captures(torch.device("cuda:1"))
    capturing.add(1)
    assert captures(torch.device("cuda:1"))
    assert current == [0]
