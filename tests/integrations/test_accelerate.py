"""`rtx` in Accelerate's enumeration of backends, and scripts that are run with it."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from enum import Enum
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.paths import ROOT
from torch_rtx.errors import IntegrationError, SettingsError

MODULE = "torch_rtx.integrations.accelerate"


def imported(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The integration, imported anew."""
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    return import_module(MODULE)


class Plugin:
    """As `TorchDynamoPlugin`: looks a name up, and hands it to torch.compile in lower case."""

    backends: Any = None

    def __init__(self, backend: str = "no") -> None:
        self.backend = self.backends(backend.upper())

    def to_kwargs(self) -> dict[str, str]:
        return {"backend": self.backend.value.lower()}


def released(monkeypatch: pytest.MonkeyPatch, **content: Any) -> None:
    """A release of Accelerate whose `utils` has this content."""
    package, utils = ModuleType("accelerate"), ModuleType("accelerate.utils")
    vars(utils).update(content)
    monkeypatch.setitem(sys.modules, "accelerate", package)
    monkeypatch.setitem(sys.modules, "accelerate.utils", utils)


def backends(*names: str) -> Any:
    found = Enum("DynamoBackend", {name: name for name in names}, type=str)  # type: ignore[misc]
    return {"DynamoBackend": found, "TorchDynamoPlugin": type("Plugin", (Plugin,), {"backends": found})}


@pytest.mark.quick
def test_a_member_like_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    content = backends("NO", "INDUCTOR")
    released(monkeypatch, **content)
    module, kinds = imported(monkeypatch), content["DynamoBackend"]
    member = module.register()
    assert member is kinds("RTX") is kinds["RTX"] is kinds.RTX is [*kinds][-1]
    assert (member.name, member.value, member == "RTX", len(kinds)) == ("RTX", "RTX", True, 3)
    assert member is pickle.loads(pickle.dumps(member)) is copy.deepcopy(member)
    assert module.register() is imported(monkeypatch).register() is member
    with pytest.raises(ValueError, match="not a valid DynamoBackend"):
        kinds("RTY")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "accelerate can't be imported"),
        ({}, "accelerate can't be imported: cannot import name 'DynamoBackend'"),
        ({"DynamoBackend": ("NO",), "TorchDynamoPlugin": Plugin}, "takes no further backends"),
        ({**backends("NO"), "TorchDynamoPlugin": type("P", (Plugin,), {"backends": Enum("E", {"NO": "NO"})})}, "takes"),
    ],
    ids=["missing", "no enumeration", "no enum", "another enum"],
)
def test_other_releases(content: dict[str, Any] | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if content is None:
        for name in ("accelerate", "accelerate.utils"):
            monkeypatch.setitem(sys.modules, name, None)
    else:
        released(monkeypatch, **content)
    with pytest.raises(IntegrationError, match=message) as caught:
        imported(monkeypatch)
    assert isinstance(caught.value, ImportError)
    assert "\n  " in str(caught.value)  # what to do instead


SCRIPT = """
import sys
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
print(__name__, sys.argv[1:], accelerator.state.dynamo_plugin.to_kwargs())
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    pytest.importorskip("accelerate")
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def test_a_script_that_knows_nothing(script: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    environment["ACCELERATE_DYNAMO_BACKEND"] = "NO"  # as the launcher does
    command = [sys.executable, "-m", MODULE, str(script), "--epochs", "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "__main__ ['--epochs', '3'] {'backend': 'rtx'}\n", done.stderr


def test_the_launcher_chose_another_backend(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(SettingsError, match="the launcher chose the backend inductor, not rtx"):
        imported(monkeypatch).run([str(script)])


def test_no_script(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    with pytest.raises(SettingsError, match="no training script"):
        imported(monkeypatch).run([])
