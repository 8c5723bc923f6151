"""Kernels that others wrote, as calls in a graph, and the registry of those that this process knows.

One operator, `torch_rtx.launch` (see `foreign_op`), stands for the launch of any of them. It names its kernel by a
digest of what the kernel is made of, and returns the tensors that the kernel writes, as new ones. The source is not
part of a graph: where a kernel is compiled, or called in the way that its author would, the registry has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch_rtx.errors import KernelError
from torch_rtx.ir import Dim, Graph, Node, Value, attr_values
from torch_rtx.optable import LAUNCH


class Foreign(Protocol):
    """A kernel that others wrote, with its configurations and the values of its constants."""

    @property
    def key(self) -> str:
        """Its name in graphs: that of its function, and a digest."""

    @property
    def loc(self) -> object:
        """Where it is launched in the user's model, if known."""

    def run(self, tensors: Sequence[Any], sizes: Sequence[int]) -> None:
        """Launch it as its author would, for these arguments of `torch_rtx.launch`, and write to them."""

    def offers(self, body: Graph, arch: Any) -> Sequence[Any]:
        """The tactics of a kernel node with this body, of `lowering.kernels.Kernel`s, one for each configuration."""


@dataclass(frozen=True)
class Launch:
    """The arguments of a call of `torch_rtx.launch`.

    Attributes:
        kernel: the key of the kernel.
        tensors: its arguments that are tensors, in the order of its parameters.
        written: positions in `tensors` of those that it writes, in the order of the results.
        sizes: its arguments that are integers, in the order of its parameters; then, for each configuration, the grid
            along x, y and z.
    """

    kernel: str
    tensors: tuple[Value, ...]
    written: tuple[int, ...]
    sizes: tuple[Dim, ...]


def launch_of(node: Node) -> Launch | None:
    """The arguments of a call of `torch_rtx.launch`; None for other nodes."""
    if node.kind == "kernel" or node.op != LAUNCH:
        return None
    given: Mapping[str, Any] = dict(node.args)
    return Launch(given["kernel"], *(tuple(given.get(name, ())) for name in ("tensors", "written", "sizes")))


def launch_in(body: Graph | None) -> tuple[Node, Launch] | None:
    """The call of a foreign kernel in the body of a kernel node; None if there is none."""
    for node in () if body is None else body.nodes:
        if (found := launch_of(node)) is not None:
            return node, found
    return None


def starts_of(node: Node) -> dict[str, Value]:
    """By the name of each result of a call of `torch_rtx.launch`: the operand whose contents it starts from."""
    launch = launch_of(node)
    if launch is None:
        return {}
    pairs = zip(node.outputs, launch.written, strict=True)
    return {value.name: launch.tensors[position] for value, position in pairs if value is not None}


def filled_by_launches(graph: Graph) -> set[str]:
    """The names of the values that the graph reads as what the kernels of launches write to, and nowhere else."""
    written: set[str] = set()
    read = {value.name for value in attr_values(graph.outputs)}
    for node in graph.nodes:
        names = [value.name for value in node.inputs]
        launch = launch_of(node)
        starts = set() if launch is None else {launch.tensors[position].name for position in launch.written}
        written |= starts
        read.update(name for name in names if name not in starts or names.count(name) > 1)
    return written - read


_registry: dict[str, Foreign] = {}


def register(kernel: Foreign) -> str:
    """Make a kernel known to this process; returns its key. Kernels of one key are the same."""
    return _registry.setdefault(kernel.key, kernel).key


def find(key: str) -> Foreign | None:
    """The kernel with this key, if this process knows it."""
    return _registry.get(key)


def known(key: str) -> Foreign:
    """The kernel with this key.

    Raises:
        KernelError: this process does not know it: the graph comes from a file, which has no sources.
    """
    found = find(key)
    if found is None:
        hint = "build the engine for this GPU, too (targets=[...]), or import the code that has the kernel"
        raise KernelError(f"the kernel {key} has no code that may run here, and the file has no sources", hint=hint)
    return found
