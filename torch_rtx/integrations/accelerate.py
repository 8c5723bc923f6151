"""Makes `rtx` a backend that Hugging Face Accelerate and the Trainer of transformers take.

Both refuse names that Accelerate's enumeration of backends lacks. Importing this module adds the name:

    import torch_rtx.integrations.accelerate

    Accelerator(dynamo_backend="rtx")
    TrainingArguments(torch_compile_backend="rtx")

Run as a module, it runs a training script that knows nothing of torch_rtx, with `rtx` as the backend of its Accelerator
or Trainer:

    accelerate launch -m torch_rtx.integrations.accelerate train.py --epochs 3
"""

from __future__ import annotations

import runpy
import sys
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

from torch_rtx.errors import IntegrationError, SettingsError

NAME = "RTX"  # Accelerate compares names in upper case, and gives torch.compile the lower case


def register() -> Enum:
    """Add the backend to Accelerate's enumeration, unless it is there.

    Returns:
        The member of `accelerate.utils.DynamoBackend`. A process that unpickles it registers it as well.

    Raises:
        IntegrationError: Accelerate is not installed, or has no such enumeration any more.
    """
    hint = "`model.compile(backend='rtx')` before the model is given to Accelerate or the Trainer does without"
    try:
        from accelerate.utils import DynamoBackend, TorchDynamoPlugin
    except ImportError as error:
        raise IntegrationError(f"accelerate can't be imported: {error}", hint="pip install accelerate") from error
    try:
        if NAME not in DynamoBackend.__members__:
            _add(DynamoBackend)
        member: Enum = DynamoBackend(NAME)
        given = TorchDynamoPlugin(backend=NAME.lower()).to_kwargs()["backend"]
    except Exception as error:
        raise IntegrationError(f"this release of accelerate takes no further backends: {error!r}", hint=hint) from error
    if given != NAME.lower():
        raise IntegrationError(f"this release of accelerate gives torch.compile the backend {given!r}", hint=hint)
    return member


def _add(backends: Any) -> None:
    """Add the member NAME to an enumeration of strings; `enum` offers this only while a class is defined."""
    member = str.__new__(backends, NAME)
    member._name_ = member._value_ = NAME
    member.__reduce_ex__ = lambda _: (register, ())  # the class alone would refuse the name in another process
    type.__setattr__(backends, NAME, member)
    backends._member_names_.append(NAME)
    backends._member_map_[NAME] = backends._value2member_map_[NAME] = member


def run(arguments: list[str]) -> None:
    """Run a script, whose path and arguments these are, as the main program; `rtx` is the default backend in it.

    Raises:
        SettingsError: no script is given, or the launcher was told to use another backend.
    """
    from accelerate.utils import TorchDynamoPlugin, patch_environment

    if not arguments:
        hint = "accelerate launch -m torch_rtx.integrations.accelerate train.py --its-arguments"
        raise SettingsError("no training script is given", hint=hint)
    chosen = TorchDynamoPlugin().backend.value  # the launcher says by a variable of the environment
    if chosen not in ("NO", NAME):
        hint = "leave out --dynamo_backend, or launch the script itself"
        raise SettingsError(f"the launcher chose the backend {chosen.lower()}, not rtx", hint=hint)
    sys.argv[:] = arguments
    sys.path[0] = str(Path(arguments[0]).resolve().parent)  # as if Python had been given the script
    with patch_environment(accelerate_dynamo_backend=NAME):
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    import_module("torch_rtx.integrations.accelerate").run(sys.argv[1:])  # by the name that a pickle has to know
else:
    register()
