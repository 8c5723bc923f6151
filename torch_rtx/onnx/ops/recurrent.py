"""LSTM, GRU and RNN: a call of PyTorch's own where it computes the same, else step by step.

Tensors have ONNX's layouts: X (T, B, I), W (D, gates * H, I), R (D, gates * H, H), B (D, 2 * gates * H), states
(D, B, H), Y (T, D, B, H), where D is the number of directions; `layout=1` has B first in X, Y and the states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.registry import op

# by name in small letters: of x, alpha and beta, and the values of these that are used if none are given
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], float, float]] = {
    "affine": (lambda x, a, b: a * x + b, 1.0, 0.0),
    "elu": (lambda x, a, b: F.elu(x, a), 1.0, 0.0),
    "hardsigmoid": (lambda x, a, b: (a * x + b).clamp(0, 1), 0.2, 0.5),
    "leakyrelu": (lambda x, a, b: F.leaky_relu(x, a), 0.01, 0.0),
    "relu": (lambda x, a, b: F.relu(x), 0.0, 0.0),
    "scaledtanh": (lambda x, a, b: a * torch.tanh(b * x), 1.0, 1.0),
    "sigmoid": (lambda x, a, b: torch.sigmoid(x), 0.0, 0.0),
    "softplus": (lambda x, a, b: F.softplus(x), 0.0, 0.0),
    "softsign": (lambda x, a, b: F.softsign(x), 0.0, 0.0),
    "tanh": (lambda x, a, b: torch.tanh(x), 0.0, 0.0),
    "thresholdedrelu": (lambda x, a, b: torch.where(x > a, x, 0), 1.0, 0.0),
}
TAKES_ALPHA = {"affine", "elu", "hardsigmoid", "leakyrelu", "scaledtanh", "thresholdedrelu"}
TAKES_BETA = {"affine", "hardsigmoid", "scaledtanh"}


@dataclass
class Weights:
    """The tensors of a node."""

    w: Tensor
    r: Tensor
    b: Tensor | None

    def direction(self, at: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of one direction: W, R, and the biases of both products."""
        w, r = self.w[at], self.r[at]
        b = self.w.new_zeros(2 * w.shape[0]) if self.b is None else self.b[at]
        b_w, b_r = b.chunk(2)
        return w, r, b_w, b_r

    def library(self, at: int, order: Sequence[int]) -> list[Tensor]:
        """What PyTorch's operators take for one direction; `order`: of each of their gates, its place in ONNX."""

        def sort(x: Tensor) -> Tensor:
            gates = x.chunk(len(order))
            return x if list(order) == sorted(order) else torch.cat([gates[i] for i in order])

        w, r, *biases = self.direction(at)
        return [sort(w), sort(r), *map(sort, biases if self.b is not None else ())]


Step = Callable[[Tensor, tuple[Tensor, ...], int], tuple[Tensor, ...]]
Library = Callable[[Tensor, tuple[Tensor, ...], list[Tensor], bool, bool], tuple[Tensor, ...]]


def functions_of(
    names: Sequence[str] | None,
    alphas: Sequence[float] | None,
    betas: Sequence[float] | None,
    default: Sequence[str],
    directions: int,
) -> list[Callable[[Tensor], Tensor]] | None:
    """The functions of all directions; None: they are the default ones."""
    names = [name.lower() for name in names or list(default) * directions]
    if names == [name.lower() for name in default] * directions:
        return None
    left = {"alpha": list(alphas or ()), "beta": list(betas or ())}

    def bound(name: str) -> Callable[[Tensor], Tensor]:
        if name not in ACTIVATIONS:
            raise OnnxError(f"there is no activation {name!r}", hint=f"Known are {', '.join(ACTIVATIONS)}.")
        function, a, b = ACTIVATIONS[name]
        if name in TAKES_ALPHA and left["alpha"]:
            a = left["alpha"].pop(0)
        if name in TAKES_BETA and left["beta"]:
            b = left["beta"].pop(0)
        return lambda x: function(x, a, b)

    return [bound(name) for name in names]


def run(
    x: Tensor,
    weights: Weights,
    states: tuple[Tensor, ...],
    lengths: Tensor | None,
    direction: str,
    *,
    order: Sequence[int],
    library: Library | None,
    step: Step,
    hold: Callable[[Tensor, Weights], tuple[Tensor, Weights]] | None = None,
) -> tuple[Tensor, ...]:
    """Y (T, D, B, H) and the last states (D, B, H).

    Args:
        library: one call for all steps of one direction, or of both; None: there is none that computes the same.
        step: one step of one direction, of what one step more of `x` is.
        hold: changes input and weights so that the library leaves a state as it is at steps after a sequence's end.
    """
    if direction not in ("forward", "reverse", "bidirectional"):
        raise OnnxError(f"a recurrent operator with direction {direction!r}")
    backward = [direction == "reverse"] if direction != "bidirectional" else [False, True]
    _check_sizes(x, weights, states, len(backward))
    if library is not None and lengths is None and direction != "reverse":
        params = [p for at in range(len(backward)) for p in weights.library(at, order)]
        y, *last = library(x, states, params, weights.b is not None, direction == "bidirectional")
        return (y.unflatten(-1, (len(backward), -1)).transpose(1, 2), *last)
    time = torch.arange(x.shape[0], device=x.device).unsqueeze(-1)
    inside = None if lengths is None else time < lengths
    results = []
    for at, reverse in enumerate(backward):
        turn = _reversal(time, lengths) if reverse else None
        given, own = (x if turn is None else turn(x)), weights
        begin = tuple(state[at : at + 1] for state in states)
        if library is None:
            y, *last = _steps(given, begin, step, at, inside)
        else:
            if hold is not None and inside is not None:
                given, own = hold(torch.cat([given, (~inside).unsqueeze(-1).to(x.dtype)], -1), weights)
            y, *last = library(given, begin, own.library(at, order), own.b is not None, False)
            if lengths is not None:
                last[0] = _at_end(y, lengths, begin[0])
        if inside is not None:
            y = torch.where(inside.unsqueeze(-1), y, 0)
        results.append((y if turn is None else turn(y), *last))
    outputs, *after = zip(*results, strict=True)
    return torch.stack(outputs, 1), *map(torch.cat, after)


def _check_sizes(x: Tensor, weights: Weights, states: tuple[Tensor, ...], directions: int) -> None:
    """Raises OnnxError where shapes do not fit, which calls of the library do not notice."""
    count, hidden = weights.w.shape[1], weights.r.shape[2]
    wanted: dict[str, tuple[Tensor | None, list[Any]]] = {
        "X": (x, [x.shape[0], x.shape[1] if x.dim() > 1 else 0, weights.w.shape[2]]),
        "W": (weights.w, [directions, count, weights.w.shape[2]]),
        "R": (weights.r, [directions, count, hidden]),
        "B": (weights.b, [directions, 2 * count]),
        **{f"initial state {number}": (state, [directions, x.shape[1], hidden]) for number, state in enumerate(states)},
    }
    for name, (given, shape) in wanted.items():
        sizes = [] if given is None else list(given.shape)
        known = [
            (one, other) for one, other in zip(sizes, shape, strict=False) if type(one) is int and type(other) is int
        ]
        if given is not None and (len(sizes) != len(shape) or any(one != other for one, other in known)):
            raise OnnxError(f"{name} has the shape {sizes}, not {shape}")


def _reversal(time: Tensor, lengths: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What reverses the steps of each sequence, and leaves those after its end."""
    if lengths is None:
        return lambda x: x.flip(0)
    source = torch.where(time < lengths, lengths - 1 - time, time)
    return lambda x: x.gather(0, source.unsqueeze(-1).expand(x.shape))


def _at_end(y: Tensor, lengths: Tensor, begin: Tensor) -> Tensor:
    """The result (1, B, H) of the last step of each sequence; that before the first, of an empty one."""
    last = y.gather(0, (lengths - 1).clamp(min=0).view(1, -1, 1).expand(1, *y.shape[1:]))
    return torch.where(lengths.view(1, -1, 1) > 0, last, begin)


def _steps(x: Tensor, begin: tuple[Tensor, ...], step: Step, at: int, inside: Tensor | None) -> tuple[Tensor, ...]:
    """One direction, step by step: Y (T, B, H) and the last states (1, B, H)."""
    states = tuple(state[0] for state in begin)
    results = []
    for t, now in enumerate(x.unbind(0)):
        new = step(now, states, at)
        if inside is not None:
            new = tuple(torch.where(inside[t].unsqueeze(-1), n, old) for n, old in zip(new, states, strict=True))
        states = new
        results.append(states[0])
    return torch.stack(results), *(state.unsqueeze(0) for state in states)


def _recurrent(
    x: Tensor,
    states: Sequence[Tensor | None],
    lengths: Tensor | None,
    direction: str,
    layout: int,
    hidden: int,
    compute: Callable[[Tensor, tuple[Tensor, ...], Tensor | None], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """`compute` on tensors with the steps first, and states of zeros where none are given."""
    if layout:
        x, states = x.transpose(0, 1), [s if s is None else s.transpose(0, 1) for s in states]
    shape = [2 if direction == "bidirectional" else 1, x.shape[1], hidden]
    begin = tuple(x.new_zeros(shape) if state is None else state for state in states)
    y, *last = compute(x, begin, None if lengths is None else lengths.long())
    if layout:
        return y.permute(2, 0, 1, 3), *(s.transpose(0, 1) for s in last)
    return y, *last


def _freeze(gates: dict[int, float], count: int) -> Callable[[Tensor, Weights], tuple[Tensor, Weights]]:
    """A `hold` for a column of the input that is 1 after the end: it saturates gates, whose numbers are given."""

    def hold(x: Tensor, weights: Weights) -> tuple[Tensor, Weights]:
        shape = [weights.w.shape[0], weights.w.shape[1] // count, 1]
        column = torch.cat([weights.w.new_full(shape, gates.get(gate, 0.0)) for gate in range(count)], 1)
        return x, Weights(torch.cat([weights.w, column], 2), weights.r, weights.b)

    return hold


def _library(call: Any) -> Library:
    """A recurrent operator of PyTorch with one layer."""

    def library(
        x: Tensor, states: tuple[Tensor, ...], params: list[Tensor], biases: bool, both: bool
    ) -> tuple[Tensor, ...]:
        begin = list(states) if len(states) > 1 else states[0]
        return call(x, begin, params, biases, 1, 0.0, torch.is_grad_enabled(), both, False)

    return library


@op("RNN")
def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    output_sequence: int = 1,
) -> tuple[Tensor, ...]:
    """h' = f(x W + h R + b) -> Y and the last h."""
    weights = Weights(w, r, b)
    names = [name.lower() for name in activations or ["Tanh"] * w.shape[0]]
    uniform = set(names) in ({"tanh"}, {"relu"}) and clip is None
    library = _library(torch.rnn_relu if "relu" in names else torch.rnn_tanh) if uniform else None
    functions = functions_of(names, activation_alpha, activation_beta, ["none"], w.shape[0])
    assert functions is not None

    def step(now: Tensor, states: tuple[Tensor, ...], at: int) -> tuple[Tensor, ...]:
        w, r, b_w, b_r = weights.direction(at)
        return (functions[at](_clipped(F.linear(now, w, b_w) + F.linear(states[0], r, b_r), clip)),)

    def compute(x: Tensor, begin: tuple[Tensor, ...], lengths: Tensor | None) -> tuple[Tensor, ...]:
        return run(x, weights, begin, lengths, direction, order=[0], library=library, step=step)

    return _recurrent(x, [initial_h], sequence_lens, direction, layout, r.shape[-1], compute)


def _clipped(x: Tensor, clip: float | None) -> Tensor:
    return x if clip is None else x.clamp(-clip, clip)


@op("GRU")
def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
    output_sequence: int = 1,
) -> tuple[Tensor, ...]:
    """Gates in the order update, reset, hidden. PyTorch resets after the product: `linear_before_reset=1`."""
    weights = Weights(w, r, b)
    default = ["Sigmoid", "Tanh"]
    own = functions_of(activations, activation_alpha, activation_beta, default, w.shape[0])
    library = _library(torch.gru) if own is None and clip is None and linear_before_reset else None
    functions = own or [torch.sigmoid, torch.tanh] * w.shape[0]

    def step(now: Tensor, states: tuple[Tensor, ...], at: int) -> tuple[Tensor, ...]:
        (h,) = states
        w, r, b_w, b_r = weights.direction(at)
        f, g = functions[2 * at : 2 * at + 2]
        x_z, x_r, x_h = F.linear(now, w, b_w).chunk(3, -1)
        r_z, r_r, r_h = r.chunk(3)
        b_z, b_reset, b_h = b_r.chunk(3)
        update = f(_clipped(x_z + F.linear(h, r_z, b_z), clip))
        reset = f(_clipped(x_r + F.linear(h, r_r, b_reset), clip))
        past = reset * F.linear(h, r_h, b_h) if linear_before_reset else F.linear(reset * h, r_h, b_h)
        new = g(_clipped(x_h + past, clip))
        return ((1 - update) * new + update * h,)

    def compute(x: Tensor, begin: tuple[Tensor, ...], lengths: Tensor | None) -> tuple[Tensor, ...]:
        return run(x, weights, begin, lengths, direction, order=[1, 0, 2], library=library, step=step)

    return _recurrent(x, [initial_h], sequence_lens, direction, layout, r.shape[-1], compute)


@op("LSTM")
def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    p: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
    output_sequence: int = 1,
) -> tuple[Tensor, ...]:
    """Gates in the order input, output, forget, cell; p (D, 3 * H) are peepholes of the first three."""
    weights = Weights(w, r, b)
    default = ["Sigmoid", "Tanh", "Tanh"]
    own = functions_of(activations, activation_alpha, activation_beta, default, w.shape[0])
    standard = own is None and clip is None and p is None and not input_forget
    functions = own or [torch.sigmoid, torch.tanh, torch.tanh] * w.shape[0]

    def step(now: Tensor, states: tuple[Tensor, ...], at: int) -> tuple[Tensor, ...]:
        h, c = states
        w, r, b_w, b_r = weights.direction(at)
        f, g, last = functions[3 * at : 3 * at + 3]
        i, o, forget, cell = (F.linear(now, w, b_w) + F.linear(h, r, b_r)).chunk(4, -1)
        p_i, p_o, p_f = (0, 0, 0) if p is None else p[at].chunk(3)
        i = f(_clipped(i + p_i * c, clip))
        forget = 1 - i if input_forget else f(_clipped(forget + p_f * c, clip))
        c = forget * c + i * g(_clipped(cell, clip))
        return f(_clipped(o + p_o * c, clip)) * last(c), c

    def compute(x: Tensor, begin: tuple[Tensor, ...], lengths: Tensor | None) -> tuple[Tensor, ...]:
        return run(
            x,
            weights,
            begin,
            lengths,
            direction,
            order=[0, 2, 3, 1],
            library=_library(torch.lstm) if standard else None,
            step=step,
            hold=_freeze({0: -1e4, 2: 1e4}, 4),
        )

    return _recurrent(x, [initial_h, initial_c], sequence_lens, direction, layout, r.shape[-1], compute)
