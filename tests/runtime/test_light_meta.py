"""What stands in for modules that types of calls do not need."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch.fx.experimental import symbolic_shapes

from torch_rtx.runtime.light_meta import KNOWN, SHAPES

# In a process that has imported neither.
MAKES_WAY = """
import contextvars, sys, threading
import torch
from torch_rtx.runtime.light_meta import SHAPES, light_meta
with light_meta():
    torch.ops.aten.add.Scalar(torch.empty(2, 3, device="meta"), 1)
    light = sys.modules[SHAPES], sys.modules["sympy"]
    assert light[0].sym_eq((2, 3), [2, 3]) and not light[0].guard_or_true(False)

    def elsewhere():
        import torch.fx.experimental.symbolic_shapes
        import sympy.core.numbers
        found.append((torch.fx.experimental.symbolic_shapes.ShapeEnv, sympy.Basic, sympy.core.numbers.Integer))

    found = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found[0][2](1) == 1 and issubclass(found[0][2], found[0][1])
    symbol = found[0][0]().create_unbacked_symint()
    assert light[0].statically_known_true(symbol == symbol + 0) and not light[0].sym_eq(2, 3)
assert sys.modules["sympy"] is not light[1] and light[1].Basic is sys.modules["sympy"].Basic
"""


def test_others_get_the_modules():
    """Another thread that imports a module meanwhile gets it; symbolic sizes are asked of the module itself."""
    done = subprocess.run([sys.executable, "-c", MAKES_WAY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:guard_size_oblivious")
def test_answers():
    """Each answer is that of PyTorch's own function."""
    arguments = {
        "sym_eq": [(1, 1), (2, 3), ((1, 2), [1, 2]), ([1, 2], (1, 3)), ((1,), (1, 2))],
        "sym_and": [(True,), (True, False), (True, True, True)],
        "sym_or": [(False,), (True, False), (False, False, False)],
        **dict.fromkeys(("has_guarding_hint", "is_nested_int", "guarding_hint_or_throw"), [(0,), (7,)]),
    }
    compared = 0
    for name, answer in KNOWN[SHAPES].items():
        known = getattr(symbolic_shapes, name, None)  # a release may lack it, and then does not ask
        for given in arguments.get(name, [(True,), (False,)]) if known else ():
            result = answer(*given)
            assert (type(result), result) == (type(known(*given)), known(*given)), (name, given)
            compared += 1
    assert compared > 15
