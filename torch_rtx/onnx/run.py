"""Runs the steps of a plan: operators on tensors, arithmetic of sizes on the host, and control flow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from torch_rtx.errors import OnnxError
from torch_rtx.onnx import host
from torch_rtx.onnx.host import Host
from torch_rtx.onnx.plan import Body, Step

UNROLLED = 1024  # the most passes of a loop that a capture writes out
# Homes of the errors that say what is wrong with a node. Errors of PyTorch's own classes, such as that of a capture
# which can't go on, are for its callers.
_PLAIN = ("builtins", "numpy.exceptions")
Values = dict[int, Any]


class Runner:
    """The steps of a model, without its tensors.

    Args:
        inputs, outputs: slots.
        known: what the model's own tensors are for the arithmetic of sizes.
        weights: slots of the model's tensors.
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

    def run(self, weights: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor]:
        """The results for the inputs; None: an input has its default."""
        values: Values = dict(zip(self.weights, weights, strict=True))
        given = {slot: value for slot, value in zip(self.inputs, inputs, strict=True) if value is not None}
        values.update(dict.fromkeys(set(self.inputs) - {*self.weights}) | given)
        tensors = [value for value in (*inputs, *weights) if isinstance(value, Tensor)]
        # A default that the caller replaced is no longer known.
        known = {slot: value for slot, value in self.known.items() if slot not in given}
        call = _Call(known, tensors[0].device if tensors else torch.device("cpu"))
        call.steps(self.steps, values)
        return [call.tensor(values[slot]) for slot in self.outputs]


class _Call:
    """A call: where its tensors are."""

    def __init__(self, known: Mapping[int, Host], device: torch.device) -> None:
        self.known, self.device = known, device

    def tensor(self, value: Any) -> Any:
        """A value as a tensor."""
        return value.tensor(self.device) if isinstance(value, Host) else value

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
        results = function(step.attributes, *inputs, **told)
        return results if results is None or isinstance(results, tuple) else [results]

    def on_tensors(self, step: Step, inputs: Sequence[Any]) -> Sequence[Any]:
        """The results of a node's operator."""
        assert step.operator is not None
        arguments = [
            host.integers(self.known.get(slot, value) if slot is not None else value) if ints else self.tensor(value)
            for value, ints, slot in zip(inputs, step.ints, step.inputs, strict=True)
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
            facts = {"outputs": len(step.outputs), "dtypes": dtypes, "device": self.device, "known": known}
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

    def decided(self, slot: int | None, values: Values) -> Any:
        """A number that the host knows: plain in eager mode, None where only a capture's tensor has it."""
        if slot is None:
            return None
        value = self.known.get(slot, values[slot])
        if isinstance(value, Host):
            return value.numbers()[0]
        return None if detect_fake_mode([value]) is not None else value.reshape(-1)[0].item()


def _if(call: _Call, step: Step, values: Values) -> Sequence[Any]:
    decided = call.decided(step.inputs[0], values)
    branches = step.bodies["then_branch"], step.bodies["else_branch"]
    if decided is not None:
        return call.body(branches[0 if decided else 1], (), values)
    captured = dict.fromkeys(slot for body in branches for slot in body.captured)
    leaves, shape = _leaves([values[slot] for slot in captured])

    def branch(body: Body) -> Any:
        def run(*given: Any) -> tuple[Tensor, ...]:
            inner = dict(zip(captured, shape(given), strict=True))
            # A branch may not hand on an input.
            return tuple(call.tensor(value).clone() for value in call.body(body, (), inner))

        return run

    # Not torch.cond, which has Dynamo trace the branches: they are Python that runs node by node.
    condition = values[step.inputs[0] or 0].reshape(()).to(torch.bool)
    return torch.ops.higher_order.cond(condition, branch(branches[0]), branch(branches[1]), tuple(leaves))


def _leaves(values: Sequence[Any]) -> tuple[list[Any], Callable[[Sequence[Any]], list[Any]]]:
    """The tensors and the symbolic numbers in values, and a function that puts others in their places."""
    leaves: list[Any] = []
    places: list[Callable[[Sequence[Any]], Any]] = []
    for value in values:
        numbers = value.numbers() if isinstance(value, Host) else [value]
        symbolic = [n for n, one in enumerate(numbers) if isinstance(one, Tensor | torch.SymInt | torch.SymFloat)]
        first = len(leaves)
        leaves += [numbers[n] for n in symbolic]

        def put(given: Sequence[Any], value: Any = value, symbolic: list[int] = symbolic, first: int = first) -> Any:
            if isinstance(value, Host):
                changed = value.numbers()
                for offset, n in enumerate(symbolic):
                    changed[n] = given[first + offset]
                return host.known(changed, value.array.shape, value.dtype)
            return given[first] if symbolic else value

        places.append(put)
    return leaves, lambda given: [put(given) for put in places]


def _loop(call: _Call, step: Step, values: Values) -> Sequence[Any]:
    body, carried_slots = step.bodies["body"], step.inputs[2:]
    count = len(carried_slots)
    limit, going = call.decided(step.inputs[0], values), call.decided(step.inputs[1], values)
    carried = [None if slot is None else values[slot] for slot in carried_slots]
    stacked: list[list[Tensor]] = [[] for _ in body.outputs[1 + count :]]
    unknown = step.inputs[0] is not None and type(limit) is not int
    unknown |= step.inputs[1] is not None and going is None
    number = 0
    while not unknown and (limit is None or number < limit) and going is not False and going != 0:
        index = host.known([number], [], torch.int64)
        state = host.known([True], [], torch.bool)
        results = call.body(body, [index, state, *carried], values)
        going, carried = results[0], results[1 : 1 + count]
        for rows, row in zip(stacked, results[1 + count :], strict=True):
            rows.append(call.tensor(row))
        if isinstance(going, Host):
            going = going.numbers()[0]
        elif detect_fake_mode([going]) is not None:
            unknown = True
            break
        else:
            going = bool(going.reshape(-1)[0].item())
        number += 1
        if number > UNROLLED and detect_fake_mode([v for v in carried if isinstance(v, Tensor)]) is not None:
            raise OnnxError(f"the loop has more than {UNROLLED} passes, which is too many for a capture")
    if unknown:
        raise OnnxError(
            "how often the loop runs depends on data, and a capture can't know it",
            hint="run the module eagerly, or replace the loop in the model",
        )
    if number == 0 and stacked:
        raise OnnxError("the loop makes no pass, and the size of its stacked outputs is not known")
    return [*carried, *(torch.stack(rows) for rows in stacked)]


def _scan(call: _Call, step: Step, values: Values) -> Sequence[Any]:
    body, attributes = step.bodies["body"], step.attributes
    scanned = attributes["num_scan_inputs"]
    given = [call.tensor(values[slot]) for slot in step.inputs if slot is not None]
    carried, sequences = given[: len(given) - scanned], given[len(given) - scanned :]
    outputs = len(body.outputs) - len(carried)
    axes = attributes.get("scan_input_axes") or [0] * scanned
    backwards = attributes.get("scan_input_directions") or [0] * scanned
    length = sequences[0].shape[axes[0]]
    if not isinstance(length, int):
        raise OnnxError("a scan over an axis whose size varies can't be captured", hint="give the axis a fixed size")
    rows: list[list[Tensor]] = [[] for _ in range(outputs)]
    for number in range(length):
        places = [length - 1 - number if back else number for back in backwards]
        slices = [x.select(axis, place) for x, axis, place in zip(sequences, axes, places, strict=True)]
        results = [call.tensor(value) for value in call.body(body, [*carried, *slices], values)]
        carried = results[: len(carried)]
        for row, result in zip(rows, results[len(carried) :], strict=True):
            row.append(result)
    out_axes = attributes.get("scan_output_axes") or [0] * outputs
    out_backwards = attributes.get("scan_output_directions") or [0] * outputs
    ordered = [row[::-1] if back else row for row, back in zip(rows, out_backwards, strict=True)]
    return [*carried, *(torch.stack(row, axis) for row, axis in zip(ordered, out_axes, strict=True))]


_CONTROL = {"If": _if, "Loop": _loop, "Scan": _scan}
