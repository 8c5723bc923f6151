"""Derivatives that are taken inside of a captured function, through every operator that capture keeps whole."""

import pytest
import torch
import torch.nn.functional as F
from torch._dispatch.python import enable_python_dispatcher
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from tests.backend.test_capture import op_names
from torch_rtx.backend import capture

aten = torch.ops.aten
INDICES, OFFSETS, COUNTS = torch.tensor([0, 2, 1, 1]), torch.tensor([0, 2]), torch.tensor([1, 2])


def draw(*shape):
    return torch.randn(*shape, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(0)
ROWS, QUERY = draw(3, 4), draw(1, 2, 3, 4)
IMAGES = {size: draw(1, 2, *(4,) * size) for size in (1, 2, 3)}


def rnn(op, gates, *sequence):
    """A recurrent layer of width 5 over features of width 4; `sequence` is what says how its input is batched."""
    parameters = [draw(gates * 5, 4), draw(gates * 5, 5), draw(gates * 5), draw(gates * 5)]
    state = draw(1, 2, 5)
    state = [state, state] if gates == 4 else state
    if sequence:
        return ROWS, lambda x: op(x, *sequence, state, parameters, True, 1, 0.0, False, False)[0]
    return draw(3, 2, 4), lambda x: op(x, state, parameters, True, 1, 0.0, False, False, False)[0]


def resized():
    """Calls of what resizes images: operator, number of dimensions, the arguments after the image."""
    for size in (1, 2, 3):
        for name in ("upsample_nearest", "_upsample_nearest_exact"):
            packet = getattr(aten, f"{name}{size}d")
            yield packet.default, size, ([6] * size,)
            yield packet.vec, size, ([6] * size, None)
    for name in ("bilinear2d", "trilinear3d", "bicubic2d", "linear1d"):
        yield getattr(aten, f"upsample_{name}").vec, int(name[-2]), ([6] * int(name[-2]), False, None)
    for name in ("bilinear2d", "bicubic2d"):
        yield getattr(aten, f"_upsample_{name}_aa").vec, 2, ([6, 6], False, None)


def windowed():
    """Calls of convolutions and pooling, as `resized`."""
    for size in (1, 2, 3):
        conv, transposed = getattr(aten, f"conv{size}d"), getattr(aten, f"conv_transpose{size}d")
        weight = draw(3, 2, *(3,) * size)
        yield conv.default, size, (weight, draw(3))
        yield conv.padding, size, (weight, draw(3), [1] * size, "same")
        yield (transposed.default if size == 1 else transposed.input), size, (weight.transpose(0, 1),)
        yield getattr(aten, f"max_pool{size}d").default, size, ([2] * size,)
        yield getattr(aten, f"adaptive_avg_pool{size}d").default, size, ([2] * size,)
    yield aten.avg_pool1d.default, 1, ([2],)
    yield aten.adaptive_max_pool1d.default, 1, ([2],)
    yield aten.group_norm.default, 2, (2,)
    yield aten.instance_norm.default, 2, (None, None, None, None, True, 0.1, 1e-5, False)
    yield aten.grid_sampler.default, 2, (draw(1, 3, 3, 2).tanh(), 0, 0, False)


def on_rows():
    """Calls on a matrix: operator, the arguments after it."""
    yield aten.linear.default, (draw(2, 4), draw(2))
    yield aten.bilinear.default, (draw(3, 5), draw(2, 4, 5), draw(2))
    yield aten.matmul.default, (draw(4, 2),)
    yield aten.softmax.int, (-1,)
    yield aten.log_softmax.int, (-1,)
    yield aten.layer_norm.default, ([4], draw(4), draw(4))
    yield aten.rms_norm.default, ([4], draw(4))
    yield aten._fused_rms_norm.default, ([4], draw(4), 1e-5)
    yield aten.prelu.default, (draw(4),)
    yield from ((op, ()) for op in (aten.relu6.default, aten.selu.default, aten.log_sigmoid.default))
    yield aten.embedding_bag.default, (INDICES, OFFSETS)
    yield aten.embedding_bag.padding_idx, (INDICES, OFFSETS, False, 0, False, None, False, None)
    yield aten.repeat_interleave.self_int, (2, 0)


def first(op, args):
    """The first result of the call, as a function of its first argument."""

    def call(x):
        found = op(x, *args)
        return found[0] if isinstance(found, tuple) else found

    return call


CALLS = {op: (IMAGES[size], first(op, args)) for op, size, args in (*resized(), *windowed())}
CALLS |= {op: (ROWS, first(op, args)) for op, args in on_rows()}
CALLS |= {
    aten.scaled_dot_product_attention.default: (QUERY, lambda x: aten.scaled_dot_product_attention.default(x, x, x)),
    aten.repeat_interleave.self_Tensor: (ROWS[:2], first(aten.repeat_interleave.self_Tensor, (COUNTS, 0))),
    aten.one_hot.default: (ROWS, lambda x: x[:, :3] * aten.one_hot.default(INDICES, 3)[:3]),
    aten.lstm.input: rnn(aten.lstm.input, 4),
    aten.lstm.data: rnn(aten.lstm.data, 4, torch.tensor([2, 1])),
    aten.gru.input: rnn(aten.gru.input, 3),
    aten.gru.data: rnn(aten.gru.data, 3, torch.tensor([2, 1])),
}


def loss(f):
    return lambda x: f(x).sin().sum()


def traced_grad(f):
    def gradient(x):
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            return torch.autograd.grad(loss(f)(y), y)[0]

    return gradient


def tangent(f):
    def derivative(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x))).sin()).tangent

    return derivative


TRANSFORMS = {
    "grad": lambda f: grad(loss(f)),
    "vjp": lambda f: lambda x: vjp(f, x)[1](f(x).cos())[0],
    "jvp": lambda f: lambda x: jvp(lambda x: f(x).sin(), (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda f: jacrev(lambda x: f(x).flatten()[:2]),
    "vmap(grad)": lambda f: lambda x: vmap(grad(loss(f)))(torch.stack([x, 2 * x])),
    "grad(grad)": lambda f: grad(lambda x: loss(grad(loss(f)))(x)),
    "autograd.grad": traced_grad,
    "forward AD": tangent,
}


def outcome(f, x):
    """The result, or the error: PyTorch lacks some derivatives."""
    try:
        return f(x)
    except (RuntimeError, NotImplementedError) as error:
        return error


def test_there_is_a_call_of_every_kept_operator():
    assert set(capture.KEEP) == set(CALLS)


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:An output with one or more elements")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_kept_operator_has_its_derivatives(name):
    """Where the operators are called as they are while a graph is traced; eager says what is right."""
    for op, (x, call) in CALLS.items():
        f = TRANSFORMS[name](call)
        with torch.no_grad():
            with enable_python_dispatcher():
                expected = outcome(f, x)
                with capture.keep_ops():
                    found = outcome(f, x)
            eager = outcome(f, x)
        if isinstance(expected, Exception):
            assert type(found) is type(expected), (op, found)
            continue
        torch.testing.assert_close(found, expected, msg=lambda text, op=op: f"{op}: {text}")
        assert isinstance(eager, Exception) or torch.allclose(found, eager, atol=1e-5), op


# ---- whole captures ----

WEIGHT, LAYER = draw(4, 4), torch.nn.Linear(4, 4)


def guidance(x):
    return x + grad(lambda y: F.linear(y, WEIGHT).sin().sum())(x), F.softmax(x, -1)


def per_sample(x):
    parameters = {name: parameter.detach() for name, parameter in LAYER.named_parameters()}
    of_one = grad(lambda given, row: functional_call(LAYER, given, (row,)).sin().sum())
    return vmap(of_one, (None, 0))(parameters, x)


def forces(x):
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        (found,) = torch.autograd.grad((F.linear(y, WEIGHT) * F.linear(x, WEIGHT)).sin().sum(), y)
    return found.detach()


@torch._dynamo.allow_in_graph
def opaque(x):
    return grad(lambda y: F.linear(y, WEIGHT).sin().sum())(x)


TRACED = {"trace_autograd_ops": True} if hasattr(torch._dynamo.config, "trace_autograd_ops") else {}
FUNCTIONS = [(guidance, {"softmax"}), (opaque, set()), *([(forces, {"linear"})] if TRACED else [])]


@pytest.mark.parametrize(("f", "whole"), FUNCTIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@torch._dynamo.config.patch(TRACED)
def test_gradients_inside_of_a_function(f, whole, mode):
    """What is not differentiated stays whole in the same graph."""
    torch._dynamo.reset()
    graphs = []

    def backend(gm, example_inputs):
        return capture.capture(gm, example_inputs, lambda gm, _: graphs.append(gm.graph) or gm, None, None)

    with mode():
        torch.testing.assert_close(torch.compile(f, backend=backend, fullgraph=True)(ROWS), f(ROWS))
    assert {"linear", "softmax"} & set(op_names(graphs[0])) == whole


def test_gradients_of_each_sample():
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(per_sample, backend="rtx", fullgraph=True)(ROWS), per_sample(ROWS))
