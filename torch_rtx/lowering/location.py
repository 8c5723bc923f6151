"""Source locations of FX nodes in the user's model."""

from __future__ import annotations

import re
import sys
from functools import cache

import torch
from torch import fx

from torch_rtx.ir import Loc

_FRAME = re.compile(r'File "([^"\n]+)", line (\d+)')
_STEP = re.compile(
    r"(?:\.__dict__)?(?:\._|\['_)(?:modules|parameters|buffers)(?:'\])?\['([^']+)'\]"  # an entry of a module's dicts
    r"|\.(?!__self__)(\w+)|\[(\d+)\]|\['([^']+)'\]"
)
_ROOT = re.compile(r"(?:L|G)\['([^']+)'\]")
_DELIMITERS = re.compile(r"[\n\r{]| @ |  #")
_TORCH = torch.__path__[0]


def module_path(source: str) -> str:
    """The module path in Dynamo's source name of an object: `L['self']._modules['fc']` is `fc`."""
    root = _ROOT.match(source)
    if root is None:
        return source
    return ".".join(a or b or c or d for a, b, c, d in _STEP.findall(source[root.end() :]))


def one_line(text: str) -> str:
    """`text` without the delimiters of a location's text form."""
    return _DELIMITERS.sub("_", text)


@cache
def short_file(path: str) -> str:
    """`path` relative to its folder in sys.path, so that it is the same on every machine."""
    roots = [p.rstrip("/\\") for p in sys.path if p and path.startswith(p.rstrip("/\\") + "/")]
    short = path[len(max(roots, key=len)) + 1 :] if roots else path.replace("\\", "/").rpartition("/")[2]
    return one_line(short.replace("\\", "/"))


@cache
def _file_line(stack_trace: str) -> tuple[str, int]:
    """File and line of the innermost frame outside of PyTorch and generated code; without one, of the innermost."""
    frames = _FRAME.findall(stack_trace)
    own = [frame for frame in frames if not frame[0].startswith((_TORCH, "<"))] or frames
    return (short_file(own[-1][0]), int(own[-1][1])) if own else ("", 0)


class Locations:
    """Locations of the nodes of one graph. `origin` identifies a location by its `id`, which passes preserve."""

    def __init__(self) -> None:
        self._modules: dict[str, str] = {}
        self._origins: dict[int, tuple[Loc, fx.Node]] = {}  # by the location's id; keeps the location alive

    def origin(self, loc: Loc | None) -> fx.Node | None:
        """The node for which `of` created this object."""
        found = self._origins.get(id(loc))
        return None if found is None else found[1]

    def of(self, node: fx.Node) -> Loc | None:
        """The node's module path, source file and line; None if the capture recorded none of them."""
        trace = node.meta.get("stack_trace")
        stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")  # the latter of a gradient
        file, line = _file_line(trace) if trace else ("", 0)
        module = ""
        if stack:
            path = next(reversed(stack.values()))[0]
            module = self._modules.setdefault(path, one_line(module_path(path)))
        if not module and not file:
            return None
        loc = Loc(module, file, line)
        self._origins[id(loc)] = loc, node
        return loc
