"""Runs the steps of a plan: operators on tensors, arithmetic of sizes on the host, and control flow."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols

from torch_rtx.errors import OnnxError
from torch_rtx.onnx import control, host
from torch_rtx.onnx.control import Values
from torch_rtx.onnx.host import Host
from torch_rtx.onnx.ops.sequences import listed
from torch_rtx.onnx.plan import GRADIENT, Body, Step

log = logging.getLogger(__name__)
# Homes of the errors that say what is wrong with a node. Errors of PyTorch's own classes, such as that of a capture
# which can't go on, are for its callers.
_PLAIN = ("builtins", "numpy.exceptions")


class Runner:
    """The steps of a model, without its tensors.

    Args:
        inputs, outputs: slots.
        known: what the model's own tensors are for the arithmetic of sizes.
        weights: slots of the model's tensors.

    Attributes:
        dtype: what the module has for float32.
    """

    def __init__(
        self,
        steps: tuple[Step, ...],
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        known: Mapping[int, Host],
        weights: tuple[int, ...],
    ) -> None:
        self.steps, self.inputs, self.outputs, self.known, self.weights = steps, inputs, outputs, known, weights
        self.dtype = torch.float32

    def run(self, weights: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> list[Any]:
        """The results for the inputs; None: an input has its default."""
        values: Values = dict(zip(self.weights, weights, strict=True))
        given = {slot: value for slot, value in zip(self.inputs, inputs, strict=True) if value is not None}
        values.update(dict.fromkeys(set(self.inputs) - {*self.weights}) | given)
        tensors = [value for value in (*inputs, *weights) if isinstance(value, Tensor)]
        # A default that the caller replaced is no longer known.
        known = {slot: value for slot, value in self.known.items() if slot not in given}
        call = _Call(known, tensors[0].device if tensors else torch.device("cpu"), self.dtype)
        call.steps(self.steps, values)
        results = [call.tensor(values[slot]) for slot in self.outputs]
        return [result if isinstance(result, Tensor | None) else listed(result) for result in results]

    def traced(self, weights: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> list[Any]:
        """`run` for Dynamo, for which the model is one call: it must not wait for sizes of data that no result has."""
        try:
            results = self.run(weights, inputs)
        except OnnxError as error:  # Dynamo does not say more than that the call failed
            log.warning("torch.compile can't put the ONNX model into a graph: %s", error)
            raise
        mode = detect_fake_mode(results)
        if mode is not None and mode.shape_env is not None:
            needed, pending = free_unbacked_symbols(results), mode.shape_env.pending_fresh_unbacked_symbols
            pending[:] = [symbol for symbol in pending if symbol in needed]
        return results


class _Call:
    """A call: where its tensors are."""

    def __init__(self, known: Mapping[int, Host], device: torch.device, dtype: torch.dtype) -> None:
        self.known, self.device, self.dtype, self.depth = known, device, dtype, 0

    def tensor(self, value: Any) -> Any:
        """A value as a tensor."""
        return value.tensor(self.device, constant=not self.depth) if isinstance(value, Host) else value

    def tensors(self, values: Sequence[Any]) -> list[Any]:
        """The values of one call as tensors. What the host computed in float32 has the dtype of the module beside
        tensors that do: a mask, or positions. By itself it may be a size, which half precision could not hold."""
        found = [self.tensor(value) for value in values]
        if self.dtype is torch.float32 or not any(isinstance(v, Tensor) and v.dtype is self.dtype for v in values):
            return found
        follows = [isinstance(value, Host) and value.dtype is torch.float32 for value in values]
        return [one.to(self.dtype) if cast else one for one, cast in zip(found, follows, strict=True)]

    @contextmanager
    def inside(self) -> Iterator[None]:
        """In a graph that an operator holds, which may have no constants: PyTorch's export loses them."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def steps(self, steps: Sequence[Step], values: Values) -> None:
        """Run steps, and put what they make into `values`."""
        for step in steps:
            try:
                results = self.step(step, values)
            except OnnxError as error:
                if error.op is not None:
                    raise
                raise step.error(error.message, error.hint) from error
            except Exception as error:
                if type(error).__module__ in _PLAIN and not isinstance(error, MemoryError):
                    raise step.error(f"{type(error).__name__}: {error}") from error
                error.add_note(f"at node {step.name!r}, operator {step.op} of the ONNX model")
                raise
            if len(results) < len(step.outputs) and any(slot is not None for slot in step.outputs[len(results) :]):
                raise step.error(f"the operator has {len(results)} outputs, and the node {len(step.outputs)}")
            values.update((slot, one) for slot, one in zip(step.outputs, results, strict=False) if slot is not None)
            for slot in step.frees:
                values.pop(slot, None)

    def step(self, step: Step, values: Values) -> Sequence[Any]:
        """The results of a node."""
        if step.op in _CONTROL:
            return _CONTROL[step.op](self, step, values)
        if step.op in host.OF_TENSORS:
            return [host.OF_TENSORS[step.op](step.attributes, values[step.inputs[0] or 0])]
        found = self.on_host(step, values)
        if found is not None:
            return found
        return self.on_tensors(step, [None if slot is None else values[slot] for slot in step.inputs])

    def on_host(self, step: Step, values: Values) -> Sequence[Any] | None:
        """The results of a node whose inputs the host knows; None: it has other inputs, or is not for the host."""
        function = host.HOST_OPS.get(step.op)
        if function is None:
            return None
        inputs = [None if slot is None else self.known.get(slot, values[slot]) for slot in step.inputs]
        if not inputs or any(isinstance(value, Tensor | list) for value in inputs):
            return None
        computed = any(isinstance(values[slot], Host) for slot in step.inputs if slot is not None)
        if not computed and any(value is not None and value.dtype.is_floating_point for value in inputs):
            return None
        told = {"outputs": len(step.outputs)} if step.op == "Split" else {}
        try:
            results = function(step.attributes, *inputs, **told)
        except GuardOnDataDependentSymNode:
            return None
        return results if results is None or isinstance(results, tuple) else [results]

    def on_tensors(self, step: Step, inputs: Sequence[Any]) -> Sequence[Any]:
        """The results of a node's operator."""
        assert step.operator is not None
        data = self.tensors([None if ints else value for value, ints in zip(inputs, step.ints, strict=True)])
        arguments = [
            host.integers(self.known.get(slot, value) if slot is not None else value) if ints else tensor
            for value, tensor, ints, slot in zip(inputs, data, step.ints, step.inputs, strict=True)
        ]
        arguments = [
            value.detach() if state and isinstance(value, Tensor) else value
            for value, state in zip(arguments, step.state, strict=True)
        ]
        attributes = {key: self.placed(value) for key, value in step.attributes.items()}
        if step.told:
            dtypes = [getattr(value, "dtype", None) for value in inputs]
            held = [
                value if slot is None else self.known.get(slot, value)
                for slot, value in zip(step.inputs, inputs, strict=True)
            ]
            known = [value.array.tolist() if isinstance(value, Host) else None for value in held]
            facts = {"outputs": len(step.outputs), "dtypes": dtypes, "device": self.device}
            facts |= {"known": known, "constants": known, "stored": step.attributes}
            attributes.update((name, facts[name]) for name in step.told)
        results = step.operator.function(*arguments, **attributes)
        return results if isinstance(results, tuple) else [results]

    def placed(self, value: Any) -> Any:
        """An attribute, on the device of the inputs."""
        return value.to(self.device) if isinstance(value, Tensor) else value

    # ---- control flow ------------------------------------------------------------------------------------------------

    def body(self, body: Body, inputs: Sequence[Any], values: Values) -> list[Any]:
        """The results of a graph inside a node."""
        inner = {slot: values[slot] for slot in body.captured}
        inner.update(zip(body.inputs, inputs, strict=False))
        self.steps(body.steps, inner)
        return [inner[slot] for slot in body.outputs]

    def number(self, slot: int | None, values: Values, missing: Any) -> Any:
        """A number, or a tensor of one if this is a capture and data decides it."""
        if slot is None:
            return missing
        value = self.known.get(slot, values[slot])
        if isinstance(value, Host):
            return value.numbers()[0]
        return value if control.is_traced([value]) else value.reshape(-1)[0].item()


_CONTROL = {"If": control.if_, "Loop": control.loop, "Scan": control.scan, GRADIENT: control.gradient}
