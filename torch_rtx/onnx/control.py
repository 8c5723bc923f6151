"""If, Loop and Scan: as Python while the module runs eagerly, and where a capture knows how they go; else as operators
of PyTorch that hold graphs.

`torch.cond` and `torch.while_loop` have Dynamo trace what they are given. That fails for a body, which is Python that
runs node by node; the operators below them trace by calling it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    ShapeEnv,
    free_unbacked_symbols,
    statically_known_true,
)
from torch.utils import _pytree as pytree

from torch_rtx.errors import OnnxError
from torch_rtx.onnx import host
from torch_rtx.onnx.host import Host
from torch_rtx.onnx.ops.sequences import Growing, Stacked
from torch_rtx.onnx.plan import Body, Step

log = logging.getLogger(__name__)
UNROLLED = 1024  # the most passes of a loop that a capture writes out
LIMIT = -(2**31)  # no slot
ENDLESS = 2**31 - 1  # numbers of passes that models give where they mean any number
Values = dict[int, Any]
# Of a pass: whether there is another, the state, and what it gives to be stacked. Its arguments are its number, the
# state before it, and the values around the body.
Results = tuple[Any, list[Any], list[Any]]
Pass = Callable[[Any, Sequence[Any], Values], Results]


class Call(Protocol):
    """What control flow needs of a call of the module."""

    device: torch.device

    def tensor(self, value: Any) -> Any:
        """A value as a tensor."""

    def body(self, body: Body, inputs: Sequence[Any], values: Values) -> list[Any]:
        """The results of a graph inside a node."""

    def inside(self) -> AbstractContextManager[None]:
        """The time in which a graph that an operator holds is traced."""

    def number(self, slot: int | None, values: Values, missing: Any) -> Any:
        """A number, or a tensor of one if this is a capture and data decides it."""


def is_traced(values: Iterable[Any]) -> bool:
    """Whether a capture runs, in which tensors have no values."""
    return detect_fake_mode([value for value in values if isinstance(value, Tensor)]) is not None


# ---- If --------------------------------------------------------------------------------------------------------------


def if_(call: Call, step: Step, values: Values) -> Sequence[Any]:
    """The results of the branch that is taken, or `torch.cond`; of a branch that can't run, a check of the other."""
    condition = _known(call, call.number(step.inputs[0], values, False))
    branches = step.bodies["then_branch"], step.bodies["else_branch"]
    if not isinstance(condition, Tensor):
        return call.body(branches[0 if condition else 1], (), values)
    condition = condition.reshape(()).to(torch.bool)
    problems = [_problem(call, body, values) for body in branches]
    if problems[0] and problems[1]:
        raise problems[0]
    problem = problems[0] or problems[1]
    if problem is not None:
        number, message = condition.long().item(), f"the model takes a branch that was left out: {problem}"
        # Not torch._check, whose message torch.export would replace.
        torch.ops.aten._assert_scalar.default(number == (0 if problems[0] else 1), message)
        return call.body(branches[1 if problems[0] else 0], (), values)
    leaves, inner = _leaves({slot: values[slot] for body in branches for slot in body.captured})
    found: list[tuple[list[Tensor], Any]] = []

    def branch(body: Body) -> Callable[..., tuple[Tensor, ...]]:
        def run(*given: Any) -> tuple[Tensor, ...]:
            found.append(_tensors(call, call.body(body, (), inner(given))))
            if any(_kind(one) != _kind(other) for one, other in zip(found[0], found[-1], strict=True)):
                raise OnnxError(
                    f"the branches give {_described(found[0][0])} and {_described(found[-1][0])}, "
                    "and a capture holds both",
                    hint="what decides the branch can be an input that `from_onnx(..., fixed=...)` fixes",
                )
            return tuple(result.clone() for result in found[-1][0])  # a branch may not hand on an input

        return run

    with _settled([condition, *leaves]), call.inside():
        merged = torch.ops.higher_order.cond(condition, branch(branches[0]), branch(branches[1]), leaves)
    return _restored(merged, found[0][1])


def _known(call: Call, condition: Any) -> Any:
    """A condition as a truth value, or as a tensor if it is computed with sizes that data decides."""
    if isinstance(condition, Tensor):
        return condition
    try:
        return bool(condition)
    except GuardOnDataDependentSymNode:
        return call.tensor(host.known([condition], [], torch.bool))


def _problem(call: Call, body: Body, values: Values) -> OnnxError | None:
    """Why a branch can't run, such as that it is for other sizes than those of the capture."""
    noise = logging.getLogger("torch._subclasses.fake_tensor")  # which logs what it raises
    silent, noise.disabled = noise.disabled, True
    try:
        with _unrecorded(detect_fake_mode()):
            call.body(body, (), values)
    except OnnxError as error:
        log.warning("a branch is left out of the capture, and calls that would take it fail: %s", error)
        return error
    finally:
        noise.disabled = silent
    return None


@contextmanager
def _unrecorded(mode: Any) -> Iterator[None]:
    """A time in which a capture records nothing."""
    with disable_proxy_modes_tracing(), ExitStack() as stack:
        if mode is not None and mode.shape_env is not None:
            stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        yield


def _kind(part: Any) -> Any:
    """What two branches must have in common: the structure of their results, and types and ranks of tensors."""
    return [(x.dtype, x.dim()) for x in part] if isinstance(part, list) else part


def _described(tensors: Iterable[Tensor]) -> str:
    return ", ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in tensors) or "nothing"


@contextmanager
def _settled(values: Sequence[Any]) -> Iterator[None]:
    """Operators trace graphs of their own, in which sizes of data that Dynamo has yet to find in results are errors."""
    mode = detect_fake_mode(values)
    if mode is None or mode.shape_env is None:
        yield
        return
    pending = mode.shape_env.pending_fresh_unbacked_symbols
    waiting = [*pending]
    pending.clear()
    yield
    pending[:0] = waiting


# ---- Gradient --------------------------------------------------------------------------------------------------------


def gradient(call: Call, step: Step, values: Values) -> Sequence[Any]:
    """The derivatives of the sum of y by each of the xs, at the values that the node reads."""
    body, count, learning = step.bodies["y"], len(step.attributes["xs"]), torch.is_grad_enabled()
    at = [call.tensor(values[slot]) for slot in step.inputs if slot is not None]
    with torch.enable_grad():
        at = [x if x.requires_grad else x.detach().requires_grad_() for x in at[:count]] + at[count:]
        y = call.tensor(call.body(body, at, values)[0])
        if not y.requires_grad:
            return [torch.zeros_like(x) for x in at[:count]]
        found = torch.autograd.grad(
            y.sum(), at[:count], create_graph=learning, allow_unused=True, materialize_grads=True
        )
    return list(found)


# ---- what a graph reads ----------------------------------------------------------------------------------------------


def _leaves(values: Mapping[int, Any]) -> tuple[tuple[Any, ...], Callable[[Sequence[Any]], Values]]:
    """The tensors and the symbolic integers in values, and a function that puts others in their places."""
    parts = [(_symbols(value) if isinstance(value, Host) else value) for value in values.values()]
    flat, tree = pytree.tree_flatten(parts)
    places: dict[int, int] = {}  # by id: an operator takes each tensor once
    leaves: list[Any] = []
    for leaf in flat:
        if isinstance(leaf, Tensor | torch.SymInt) and id(leaf) not in places:
            places[id(leaf)] = len(leaves)
            leaves.append(leaf)

    def inner(given: Sequence[Any]) -> Values:
        put = [given[places[id(leaf)]] if id(leaf) in places else leaf for leaf in flat]
        filled = pytree.tree_unflatten(put, tree)
        return {
            slot: host.known(part, value.array.shape, value.dtype) if isinstance(part, tuple) else part
            for (slot, value), part in zip(values.items(), filled, strict=True)
        }

    return tuple(leaves), inner


def _symbols(value: Host) -> Any:
    """Its numbers; as a tensor if an operator can't take one of them."""
    numbers = tuple(value.numbers())
    if any(isinstance(number, torch.SymFloat | torch.SymBool) for number in numbers):
        return value.tensor(torch.device("cpu"))
    return numbers


def _tensors(call: Call, values: Sequence[Any]) -> tuple[list[Tensor], Any]:
    """Values as tensors, and their structure: there are sequences, and optionals that are None."""
    return pytree.tree_flatten([() if value is None else call.tensor(value) for value in values])


def _restored(tensors: Sequence[Tensor], tree: Any) -> list[Any]:
    """The values of such tensors."""
    return [None if isinstance(value, tuple) else value for value in pytree.tree_unflatten(tensors, tree)]


# ---- Loop and Scan ---------------------------------------------------------------------------------------------------


def loop(call: Call, step: Step, values: Values) -> Sequence[Any]:
    """The state after the last pass, and what the passes gave, stacked."""
    body = step.bodies["body"]
    state = [None if slot is None else values[slot] for slot in step.inputs[2:]]
    limit, going = call.number(step.inputs[0], values, None), call.number(step.inputs[1], values, True)
    if isinstance(limit, Tensor):
        limit = _count(limit.reshape(()).clamp(min=0))

    def run(number: Any, state: Sequence[Any], around: Values) -> Results:
        given = [host.known([number], [], torch.int64), host.known([True], [], torch.bool), *state]
        results = call.body(body, given, around)
        return results[0], results[1 : 1 + len(state)], results[1 + len(state) :]

    around = {slot: values[slot] for slot in body.captured}
    count = len(body.outputs) - 1 - len(state)
    state, rows = _Repeated(call, run, around, limit, count, not _draws(body)).run(going, state)
    return [*state, *map(_stacked, rows)]


def _draws(body: Body) -> bool:
    """Whether an operator of a body draws random numbers."""
    functions = [step.operator.function for step in body.steps if step.operator is not None]
    inner = [inner for step in body.steps for inner in step.bodies.values()]
    return any("seed" in inspect.signature(function).parameters for function in functions) or any(map(_draws, inner))


def scan(call: Call, step: Step, values: Values) -> Sequence[Any]:
    """The state after the last slice, and what the slices gave, stacked."""
    body, count = step.bodies["body"], step.attributes["num_scan_inputs"]
    given: list[Any] = [None if slot is None else call.tensor(values[slot]) for slot in step.inputs]
    if len(given) > len(body.inputs):
        return _scan_batch(call, step, values, given[0], given[1:])
    return _scan(call, step, values, given[: len(given) - count], given[len(given) - count :])


def _scan(
    call: Call, step: Step, values: Values, state: list[Any], sequences: Sequence[Tensor], length: Any = None
) -> list[Any]:
    """Scan of sequences, or of the first `length` slices of each."""
    body, attributes = step.bodies["body"], step.attributes
    axes = attributes.get("scan_input_axes") or [0] * len(sequences)
    backwards = attributes.get("scan_input_directions", attributes.get("directions")) or [0] * len(sequences)
    places = range(-len(sequences), 0)  # no slots

    def run(number: Any, state: Sequence[Any], around: Values) -> Results:
        end = around[places[0]].shape[axes[0]] if length is None else length
        slices = [
            around[place].select(axis, end - 1 - number if back else number)
            for place, axis, back in zip(places, axes, backwards, strict=True)
        ]
        results = call.body(body, [*state, *slices], around)
        return True, results[: len(state)], results[len(state) :]

    around = {slot: values[slot] for slot in body.captured} | dict(zip(places, sequences, strict=True))
    limit = sequences[0].shape[axes[0]] if length is None else length
    state, rows = _Repeated(call, run, around, limit, len(body.outputs) - len(state)).run(True, state)
    out_axes = attributes.get("scan_output_axes") or [0] * len(rows)
    out_backwards = attributes.get("scan_output_directions") or [0] * len(rows)
    return [*state, *(_stacked(*row) for row in zip(rows, out_axes, out_backwards, strict=True))]


def _scan_batch(call: Call, step: Step, values: Values, lengths: Tensor | None, given: Sequence[Tensor]) -> list[Any]:
    """Scan of opset 8: of each sample of a batch by itself, up to its length; zeros are behind it."""
    count, batch = len(given) - step.attributes["num_scan_inputs"], given[0].shape[0]
    if not isinstance(batch, int) or (lengths is not None and is_traced([lengths])):
        raise OnnxError("Scan of opset 8 needs a fixed batch and known lengths in a capture")
    known = [None] * batch if lengths is None else lengths.tolist()
    longest, samples = given[count].shape[1], []
    for sample, length in enumerate(known):
        parts = [x[sample] for x in given]
        found = _scan(call, step, values, parts[:count], parts[count:], length)
        for number, row in enumerate(found[count:], count):
            found[number] = torch.cat([row, row.new_zeros(longest - row.shape[0], *row.shape[1:])])
        samples.append([call.tensor(value) for value in found])
    return [torch.stack(column) for column in zip(*samples, strict=True)]


def _stacked(rows: Sequence[Tensor] | Tensor, axis: int = 0, back: int = 0) -> Tensor:
    """Rows along an axis, maybe the last one first."""
    if isinstance(rows, Tensor):
        return (rows.flip(0) if back else rows).movedim(0, axis)
    return torch.stack(list(rows)[::-1] if back else list(rows), axis)


class _Repeated:
    """Passes of a body.

    Args:
        run: a pass.
        around: the values around the body that it reads.
        limit: the most passes; None: any number.
        rows: how much a pass gives to be stacked.
        repeatable: another run would give the same: no random numbers are drawn.
    """

    def __init__(self, call: Call, run: Pass, around: Values, limit: Any, rows: int, repeatable: bool = True) -> None:
        self.call, self.pass_, self.around, self.rows, self.repeatable = call, run, around, rows, repeatable
        self.limit: Any = None if isinstance(limit, int) and limit >= ENDLESS else limit

    def run(self, going: Any, state: list[Any]) -> tuple[list[Any], list[Any]]:
        """The state after the last pass, and for each output the rows, stacked or not."""
        traced = is_traced([*pytree.tree_leaves(state), *pytree.tree_leaves(list(self.around.values()))])
        if traced and self.depends_on_data(going, state):
            return self.as_operator(going, state)
        rows: list[Any] = [[] for _ in range(self.rows)]
        number = 0
        while going and (self.limit is None or number < self.limit):
            if traced and number == UNROLLED:
                raise OnnxError(f"the loop has more than {UNROLLED} passes, which is too many for a capture")
            going, state, row = self.pass_(number, state, self.around)
            for column, one in zip(rows, row, strict=True):
                column.append(self.call.tensor(one))
            going, number = _decided(going), number + 1
        return state, rows if number or not rows else [_none_of(row) for row in self.tried(state)[2]]

    def depends_on_data(self, going: Any, state: list[Any]) -> bool:
        """Whether only a run knows how many passes there are, or they are too many to be written out."""
        if _is_plain(going) and not going:
            return False
        if not isinstance(self.limit, int | None) or (self.limit or 0) > UNROLLED or not _is_plain(going):
            return True
        while going:
            going, results, _ = self.tried(state)
            if not _is_plain(_decided(going)):
                return True
            # What a pass makes of a number that the host knows may be a tensor, which decides in the next one.
            became = [
                isinstance(old, Host) and isinstance(new, Tensor) for old, new in zip(state, results, strict=True)
            ]
            if not any(became):
                return False
            state = [new if changed else old for old, new, changed in zip(state, results, became, strict=True)]
        return False

    def tried(self, state: list[Any], of_any: bool = False) -> Results:
        """The results of the first pass, or of any, of which nothing is recorded: tensors without values."""
        mode, around = detect_fake_mode(pytree.tree_leaves([state, self.around])), self.around
        with ExitStack() as stack:
            if mode is None:  # eager
                mode = stack.enter_context(FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True))
                fake = partial(mode.from_tensor, static_shapes=True)
                state, around = pytree.tree_map_only(Tensor, fake, (state, around))
            stack.enter_context(_unrecorded(mode))
            number = _count(torch.zeros((), dtype=torch.int64)) if of_any else 0
            going, state, rows = self.pass_(number, state, around)
            return going, state, [self.call.tensor(row) for row in rows]

    # ---- as an operator that holds a graph ---------------------------------------------------------------------------

    def as_operator(self, going: Any, state: list[Any]) -> tuple[list[Any], list[Any]]:
        """What `run` gives. Sequences that grow are rows, too."""
        after = self.tried(state)[1]
        grown = [
            place
            for place, (old, new) in enumerate(zip(state, after, strict=True))
            if isinstance(old, list | Stacked) and pytree.tree_structure(old) != pytree.tree_structure(new)
        ]
        if not grown:
            return self.in_tensors(going, state)

        def run(number: Any, given: Sequence[Any], around: Values) -> Results:
            going, after, rows = self.pass_(number, given, around)
            added: list[Sequence[Tensor]] = [getattr(after[place], "added", ()) for place in grown]
            if any(len(one) != 1 for one in added):
                raise OnnxError("in a capture, each pass of the loop must append one element to the sequence")
            kept = [given[place] if place in grown else value for place, value in enumerate(after)]
            return going, kept, [*rows, *(one[0] for one in added)]

        inner = _Repeated(self.call, run, self.around, self.limit, self.rows + len(grown), self.repeatable)
        results, rows = inner.in_tensors(going, [Growing() if n in grown else one for n, one in enumerate(state)])
        for place, new in zip(grown, rows[len(rows) - len(grown) :], strict=True):
            old = state[place]
            before = [old.rows] if isinstance(old, Stacked) else [x.unsqueeze(0) for x in old]
            results[place] = Stacked(torch.cat([*before, new]) if before else new)
        return results, rows[: len(rows) - len(grown)]

    def in_tensors(self, going: Any, state: list[Any]) -> tuple[list[Any], list[Any]]:
        """What `run` gives. Rows go into tensors as long as there can be passes; without a limit, a loop without rows
        counts them first."""
        first, tree = _tensors(self.call, state)
        going_on, _, rows = self.tried(_restored(first, tree), of_any=True)
        always = all(_is_plain(one) and one for one in (going, _decided(going_on)))
        flags = [] if always else [self.flag(going)]
        limit = self.limit
        if rows and limit is None:
            if not self.repeatable:
                raise OnnxError(
                    "in a capture, a loop without a limit whose results are stacked can't draw random numbers",
                    hint="give the loop a number of passes, or run the module eagerly",
                )
            limit = _count(self.operator(None, flags, first, tree, [])[0])
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (*first, *_leaves(self.around)[0], *rows))
        room = [_none_of(row, limit + learning) for row in rows]
        number, *results = self.operator(limit, flags, first, tree, room)
        results, filled = results[len(flags) : len(flags) + len(first)], results[len(flags) + len(first) :]
        if filled and (flags or learning):
            count = _count(number) if flags else limit
            filled = [rows.narrow(0, 0, count) for rows in filled]
        if learning:
            # PyTorch's derivative of a loop that makes no pass is that of one, which needs room for a row. What it
            # gives are views of the results of all passes.
            filled = [rows.clone() for rows in filled]
            results = [torch.where((number > 0).to(x.device), x, old) for x, old in zip(results, first, strict=True)]
        return _restored(results, tree), filled

    def operator(
        self, limit: Any, flags: Sequence[Tensor], first: Sequence[Tensor], tree: Any, buffers: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """`while_loop` with the number of passes, whether there is another if data decides it, state and rows."""
        leaves, inner = _leaves({**self.around, LIMIT: limit})
        if limit is None and not flags:
            raise OnnxError("the loop never ends")
        state = 1 + len(flags)
        size = state + len(first) + len(buffers)

        def left(*given: Any) -> Tensor:
            most = inner(given[size:])[LIMIT]
            below = torch.ones((), dtype=torch.bool) if most is None else given[0] < most
            return below.to(given[1].device) & given[1] if flags else below

        def once(*given: Any) -> tuple[Tensor, ...]:
            number, before, filled = given[0], given[state:][: len(first)], given[state + len(first) : size]
            place, around = _count(number), inner(given[size:])
            going, results, rows = self.pass_(place, _restored(before, tree), around)
            after, structure = _tensors(self.call, results)
            if structure != tree or not all(map(_alike, before, after)):
                raise OnnxError(
                    f"the state of the loop is {_described(before)} before a pass and {_described(after)} after it, "
                    "which a capture can't hold, because the number of passes depends on data",
                    hint="run the module eagerly, or replace the loop in the model",
                )
            written = [
                buffer.index_copy(0, number.reshape(1).to(buffer.device), self.call.tensor(row).unsqueeze(0))
                for buffer, row in zip(filled, rows, strict=False)
            ]
            kept = [self.flag(going) for _ in flags]
            # A pass may not hand on an input.
            return (number + 1, *(x.clone(memory_format=torch.contiguous_format) for x in (*kept, *after)), *written)

        # Numbers of passes are on the host, where nobody waits for them.
        start = [torch.zeros((), dtype=torch.int64, device="cpu"), *flags]
        start += [x.clone(memory_format=torch.contiguous_format) for x in (*first, *buffers)]
        if any(isinstance(x, Tensor) and x.requires_grad for x in (*start, *leaves)):
            # PyTorch's derivative of a loop takes a state that begins as a constant for one all along.
            start = [x if x.requires_grad or not x.is_floating_point() else x.requires_grad_() for x in start]
        with _settled(start), self.call.inside():
            return torch.ops.higher_order.while_loop(left, once, tuple(start), leaves)

    def flag(self, going: Any) -> Tensor:
        """A condition as a tensor without axes."""
        if not isinstance(going, Tensor | Host):
            going = host.known([going], [], torch.bool)
        return self.call.tensor(going).reshape(()).to(torch.bool)


def _decided(going: Any) -> Any:
    """A condition as a number, unless a capture has no value of it."""
    if isinstance(going, Host):
        return going.numbers()[0]
    return bool(going) if isinstance(going, Tensor) and not is_traced([going]) else going


def _is_plain(number: Any) -> bool:
    return isinstance(number, int)


def _count(number: Tensor) -> Any:
    """A number of passes as a size."""
    count = number.item()
    torch._check(count >= 0)
    return count


def _none_of(row: Tensor, count: Any = 0) -> Tensor:
    """Room for rows."""
    if free_unbacked_symbols(row):
        raise OnnxError("what a pass gives to be stacked has a size that data decides")
    return torch.zeros((count, *row.shape), dtype=row.dtype, device=row.device)


def _alike(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.dim()) != (other.dtype, other.dim()):
        return False
    return all(statically_known_true(a == b) for a, b in zip(one.shape, other.shape, strict=True))
