"""Kernels that others wrote: the tactics of a kernel node that launches one.

Each configuration is a form of its own: nothing is known of such a kernel that could rank them, so that all of them
come with an engine, and the device measures them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch_rtx.errors import Unsupported
from torch_rtx.foreign import Launch, find, launch_in
from torch_rtx.ir import Dim, Graph, TensorType, attr_values
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.memory_model import streaming_us
from torch_rtx.tactics import OWN, Slot, Tactic
from torch_rtx.targets import Arch

KIND = "foreign"


def offers(body: Graph, arch: Arch) -> list[Iterator[Tactic[Kernel]]] | None:
    """The forms of a kernel node that launches a kernel that others wrote; None for other nodes.

    Raises:
        Unsupported: this process does not know the kernel.
        KernelError: its source is not accepted in any configuration.
    """
    found = launch_in(body)
    if found is None:
        return None
    kernel = find(found[1].kernel)
    if kernel is None:
        raise Unsupported(f"the source of {found[1].kernel} is not in this process")
    return [iter((tactic,)) for tactic in kernel.offers(body, arch)]


def tactic(kernel: Kernel, body: Graph, arch: Arch, which: int) -> Tactic[Kernel]:
    """The tactic that launches `kernel`, the configuration `which`, for a kernel node with this body."""
    values = (*body.inputs, *attr_values(body.outputs))
    types = [value.type for value in values if isinstance(value.type, TensorType)]
    return Tactic(f"{KIND} {which}" if which else KIND, streaming_us(types, arch), {OWN: kernel})


def grid_of(launch: Launch, integers: int, which: int) -> tuple[Dim, Dim, Dim]:
    """The grid of a configuration; `integers`: the number of the kernel's arguments that are integers."""
    x, y, z = launch.sizes[integers + 3 * which : integers + 3 * which + 3]
    return x, y, z


def address(body: Graph, launch: Launch, position: int) -> Slot:
    """The parameter for a tensor: its result if the kernel writes it, else the operand."""
    if position in launch.written:
        return Slot("pointer", "tensor", len(body.inputs) + launch.written.index(position))
    return Slot("pointer", "tensor", body.inputs.index(launch.tensors[position]))
