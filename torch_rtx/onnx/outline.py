"""The outline of an ONNX program: all that makes it but the names and the values of its weights.

Two files whose outlines are equal hold the same program. The weights of one then fit into an engine of the other by
their places, whatever an exporter called them. No place is ambiguous: the inputs of a node and the results of a model
are ordered, so that each weight is reached from a result in a way of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_rtx.onnx.framed import digest_of_bytes

if TYPE_CHECKING:
    from torch_rtx.onnx.plan import Step


@dataclass(frozen=True)
class Outline:
    """The outline of a program.

    Attributes:
        structure: a digest of the operators, their attributes and their connections.
        slots: the slots of the tensors that the results need, in the order of their first use.
    """

    structure: str
    slots: tuple[int, ...]


def outline(steps: Sequence[Step], outputs: Sequence[int], inputs: Sequence[int]) -> Outline:
    """The outline of steps whose calls bring `inputs`; every other slot that no step makes holds a tensor."""
    walk = _Walk(inputs)
    walk.from_outputs(steps, outputs)
    return Outline(walk.digest.hexdigest(), tuple(walk.slots))


def digest_of(tensor: Tensor) -> str:
    """A tensor's dtype and shape, and a digest of its values."""
    stored = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return f"{stored.dtype} {list(stored.shape)};{digest_of_bytes(stored.reshape(-1).view(torch.uint8).numpy())}"


class _Walk:
    """Numbers slots, each after those that it is made from, and digests what makes them."""

    def __init__(self, inputs: Sequence[int]) -> None:
        self.positions = {slot: position for position, slot in enumerate(inputs)}
        self.numbers: dict[int, int] = {}
        self.slots: list[int] = []
        self.digest = hashlib.sha256()

    def from_outputs(self, steps: Sequence[Step], outputs: Sequence[int]) -> None:
        """Visit everything that `outputs` are made from, in an order that depends on the connections alone."""
        makers = {slot: step for step in steps for slot in step.outputs if slot is not None}
        pending = [*reversed(outputs)]
        while pending:
            slot = pending[-1]
            if slot in self.numbers:
                pending.pop()
            elif slot not in makers:
                self.leaf(slot)
            elif before := [other for other in makers[slot].reads() if other not in self.numbers]:
                pending += reversed(before)
            else:
                self.step(makers[slot])
        self.write("results", [self.numbers[slot] for slot in outputs])

    def leaf(self, slot: int) -> None:
        """An input or a tensor."""
        self.write("leaf", self.positions.get(slot))
        self.number(slot)
        if slot not in self.positions:
            self.slots.append(slot)

    def step(self, step: Step) -> None:
        """A node, all of whose inputs have numbers."""
        version = None if step.operator is None else step.operator.since
        attributes = sorted((name, _text(value)) for name, value in step.attributes.items())
        inputs = [None if slot is None else self.numbers[slot] for slot in step.inputs]
        self.write(step.op, version, attributes, inputs, [slot is not None for slot in step.outputs])
        for name, body in sorted(step.bodies.items()):
            self.write(name, len(body.inputs))
            self.number(*body.inputs)
            self.from_outputs(body.steps, body.outputs)
        self.number(*step.outputs)

    def number(self, *slots: int | None) -> None:
        """Give slots their numbers."""
        for slot in slots:
            if slot is not None:
                self.numbers[slot] = len(self.numbers)

    def write(self, *facts: Any) -> None:
        """Digest facts."""
        self.digest.update(repr(facts).encode("utf-8", "surrogatepass"))


def _text(value: Any) -> str:
    """An attribute as text that is equal for equal values."""
    if isinstance(value, Tensor):
        return digest_of(value)
    return str([_text(one) for one in value]) if isinstance(value, list) else repr(value)
