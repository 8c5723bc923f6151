"""A recorder around the CUDA driver API. Traces of a real and of a fake driver are equal if both answered alike.

A call becomes one line of text. Handles are numbered in the order in which they appear, per kind, and so are addresses;
what depends on the machine (sizes, images, versions) is left out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

# Per call, the kinds of its arguments and of its results after the status. "#": a number. "-": left out. "[x]": a list
# of x. Other words are kinds of handles, or see `Tracer._text`.
CALLS = {
    "cuInit": ("#", ""),
    "cuDeviceGet": ("#", "device"),
    "cuDevicePrimaryCtxRetain": ("device", "context"),
    "cuDeviceGetAttribute": ("# device", "-"),
    "cuCtxGetCurrent": ("", "context"),
    "cuCtxSetCurrent": ("context", ""),
    "cuCtxPushCurrent": ("context", ""),
    "cuCtxPopCurrent": ("", "context"),
    "cuLinkCreate": ("# - -", "-"),
    "cuLinkAddData": ("- # - - - # - -", ""),
    "cuLinkComplete": ("-", "- -"),
    "cuLinkDestroy": ("-", ""),
    "cuModuleLoadData": ("-", "module"),
    "cuModuleGetFunction": ("module -", "function"),
    "cuFuncGetAttribute": ("# function", "-"),
    "cuFuncSetAttribute": ("function # #", ""),
    "cuLaunchKernel": ("function # # # # # # # stream parameters #", ""),
    "cuDriverGetVersion": ("", "-"),
    "cuGraphGetNodes": ("graph #", "[node] #"),
    "cuGraphGetEdges": ("graph #", "[node] [node] - #"),
    "cuGraphNodeGetType": ("node", "#"),
    "cuGraphKernelNodeGetParams": ("node", "kernel"),
    "cuGraphMemcpyNodeGetParams": ("node", "copy"),
    "cuGraphRemoveDependencies": ("graph [node] [node] [edge] #", ""),
    "cuGraphAddDependencies": ("graph [node] [node] [edge] #", ""),
    "cuGraphMemcpyNodeSetParams": ("node copy", ""),
    "cuGraphInstantiate": ("graph #", "executable"),
    "cuGraphExecKernelNodeSetParams": ("executable node kernel", ""),
    "cuGraphExecMemcpyNodeSetParams": ("executable node copy context", ""),
    "cuGraphExecDestroy": ("executable", ""),
    "cuGraphLaunch": ("executable stream", ""),
}


class Tracer:
    """Stands for `api`, the driver API, and records the calls of it.

    Args:
        sizes: bytes of each parameter of every kernel; those of 8 bytes are addresses.

    Attributes:
        lines: the calls so far.
    """

    def __init__(self, api: Any, sizes: tuple[int, ...]) -> None:
        self._api, self._sizes = api, sizes
        self.lines: list[str] = []
        self._numbers: dict[tuple[str, int], int] = {}
        self._objects: list[object] = []  # those without a number are known by their id, so they have to stay

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._api, name)
        return self._recorded(name.removesuffix("_v2"), found) if name[:2] == "cu" else found

    def _recorded(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        arguments, results = (kinds.split() for kinds in CALLS[name])

        def recorded(*given: Any) -> Any:
            line = f"{name}({self._texts(arguments[: len(given)], given)})"
            answer = call(*given)
            count = int(answer[-1]) if results and results[-1] == "#" and answer[0] == 0 else None
            said = self._texts(results, answer[1:], count) if answer[0] == 0 else f"error {int(answer[0])}"
            self.lines.append(f"{line} = {said}" if said else line)
            return answer

        return recorded

    def _texts(self, kinds: list[str], given: Any, count: int | None = None) -> str:
        pairs = zip(kinds, given, strict=True)
        return ", ".join(
            self._list(kind[1:-1], value, count) if kind[0] == "[" else self._text(kind, value)
            for kind, value in pairs
            if kind != "-"
        )

    def _list(self, kind: str, values: Any, count: int | None) -> str:
        """Some versions of cuda-bindings give longer lists than there are elements."""
        return f"[{', '.join(self._text(kind, value) for value in list(values or ())[:count])}]"

    def _text(self, kind: str, value: Any) -> str:
        if kind == "#":
            return str(int(value))
        if kind == "parameters":
            return self._parameters(value)
        if kind == "kernel":
            return f"{self._name('function', value.func)} {self._parameters(value.kernelParams)}"
        if kind == "copy":
            return f"{self._name('address', value.srcDevice)} -> {self._name('address', value.dstDevice)}"
        if kind == "edge":
            return f"{int(value.from_port)}:{int(value.to_port)}:{int(value.type)}"
        return self._name(kind, value)

    def _parameters(self, place: Any) -> str:
        """The parameters of a kernel, of which there is an array of addresses at `place`."""
        places = (ctypes.c_void_p * len(self._sizes)).from_address(int(place))
        values = [
            int.from_bytes(ctypes.string_at(at, size), "little")  # type: ignore[arg-type]
            for at, size in zip(places, self._sizes, strict=True)
        ]
        names = (self._name("address", v) if size == 8 else str(v) for v, size in zip(values, self._sizes, strict=True))
        return f"<{', '.join(names)}>"

    def _name(self, kind: str, value: Any) -> str:
        number = int(value) if hasattr(type(value), "__int__") else id(value)
        self._objects.append(value)
        if number == 0 and kind not in ("stream", "device"):  # these are numbered from 0
            return "null"
        of_kind = sum(known == kind for known, _ in self._numbers)
        return f"{kind}{self._numbers.setdefault((kind, number), of_kind)}"
