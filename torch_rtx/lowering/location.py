"""Where in the user's model an FX node comes from."""

from __future__ import annotations

import re
import sys
from functools import cache

import torch
from torch import fx

from torch_rtx.ir import Loc

_FRAME = re.compile(r'File "([^"\n]+)", line (\d+)')
_STEP = re.compile(
    r"(?:\.__dict__)?(?:\._|\['_)(?:modules|parameters|buffers)(?:'\])?\['([^']+)'\]"  # an entry of a module's tables
    r"|\.(?!__self__)(\w+)|\[(\d+)\]|\['([^']+)'\]"
)
_ROOT = re.compile(r"(?:L|G)\['([^']+)'\]")
_MARKS = re.compile(r"[\n\r{]| @ |  #")
_TORCH = torch.__path__[0]


def module_path(source: str) -> str:
    """The path in the module tree that Dynamo's name of an object says: `L['self']._modules['fc']` is `fc`."""
    root = _ROOT.match(source)
    if root is None:
        return source
    return ".".join(a or b or c or d for a, b, c, d in _STEP.findall(source[root.end() :]))


def one_line(text: str) -> str:
    """`text` without what the text form of a location gives a meaning to."""
    return _MARKS.sub("_", text)


@cache
def short_file(path: str) -> str:
    """`path` below the folder that Python imports it from, so that it is the same on every machine."""
    roots = [p.rstrip("/\\") for p in sys.path if p and path.startswith(p.rstrip("/\\") + "/")]
    short = path[len(max(roots, key=len)) + 1 :] if roots else path.replace("\\", "/").rpartition("/")[2]
    return one_line(short.replace("\\", "/"))


@cache
def _place(stack_trace: str) -> tuple[str, int]:
    """File and line of the innermost frame that is neither PyTorch's nor of generated code, else of the innermost."""
    frames = _FRAME.findall(stack_trace)
    own = [frame for frame in frames if not frame[0].startswith((_TORCH, "<"))] or frames
    return (short_file(own[-1][0]), int(own[-1][1])) if own else ("", 0)


class Locations:
    """Locations of the nodes of one graph. Each is an object of its own, which passes hand on: see `origin`."""

    def __init__(self) -> None:
        self._modules: dict[str, str] = {}
        self._origins: dict[int, tuple[Loc, fx.Node]] = {}  # by the location's id, which it holds on to

    def origin(self, loc: Loc | None) -> fx.Node | None:
        """The node that this very location was made for."""
        found = self._origins.get(id(loc))
        return None if found is None else found[1]

    def of(self, node: fx.Node) -> Loc | None:
        """The node's module path, source file and line; None where the capture recorded none of them."""
        trace = node.meta.get("stack_trace")
        stack = node.meta.get("nn_module_stack")
        file, line = _place(trace) if trace else ("", 0)
        module = ""
        if stack:
            path = next(reversed(stack.values()))[0]
            module = self._modules.setdefault(path, one_line(module_path(path)))
        if not module and not file:
            return None
        loc = Loc(module, file, line)
        self._origins[id(loc)] = loc, node
        return loc
