"""What PyTorch does in each capture for logs, for modes that nobody turns on here, and for devices that are not there.

It takes a tenth of the time of the tests, which never read it. Where a release of PyTorch has another name for one of
these, that one takes the time that it took before.
"""

from __future__ import annotations

import sys
import traceback
import types
from typing import Any


def install() -> None:
    """Leave it out from now on in this process."""
    import torch._dynamo.guards
    import torch._subclasses.fake_tensor
    import torch.utils._traceback
    from torch._decomp.decompositions_for_rng import PhiloxStateTracker

    # AOTAutograd makes tensors for the state of functional random numbers: a seventh of the time of a small capture.
    PhiloxStateTracker.reset = classmethod(lambda cls: None)
    # Dynamo measures how long the guards of a graph take, for a log. It empties the caches of the CPU first: 30 ms.
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
    # Each node of a trace and each FakeTensorMode has a stack, of which few frames are ever written, if any. PyTorch
    # looks for the text of all, also of pytest's.
    torch.utils._traceback._extract_symbolized_tb = _symbolized
    torch._subclasses.fake_tensor.traceback = types.SimpleNamespace(**{**vars(traceback), "extract_stack": _stack})
    # `torch.manual_seed` leaves the seed for devices that may be initialized later, each time with the whole stack as
    # text.
    if not torch.cuda.is_available():
        for device in (torch.cuda, torch.xpu, torch.mtia):
            device.manual_seed_all = lambda seed: None


def _symbolized(frames: list[dict[str, Any]], skip: int) -> traceback.StackSummary:
    """`torch.utils._traceback._extract_symbolized_tb`, which looks for no text before it is asked for."""
    found = traceback.StackSummary()
    for frame in reversed(frames[skip:]):
        found.append(traceback.FrameSummary(frame["filename"], frame["line"], frame["name"], lookup_line=False))
    return found


def _stack() -> traceback.StackSummary:
    """`traceback.extract_stack`, likewise."""
    found = traceback.StackSummary.extract(traceback.walk_stack(sys._getframe(1)), lookup_lines=False)
    found.reverse()
    return found
