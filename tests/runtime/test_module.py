"""Engines ahead of time are called like their models, also from a file."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import threading
import weakref
from collections import OrderedDict, defaultdict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch._higher_order_ops import while_loop
from torch.export import Dim, export
from transformers.modeling_outputs import BaseModelOutput

import torch_rtx
from tests.helpers.ahead import IDS, IMAGE, Function, Net, Tied, both, through_file
from tests.helpers.compiled import same
from torch_rtx.errors import (
    CaptureError,
    EngineFormatError,
    InputError,
    InvalidIR,
    PartitionError,
    RefitError,
    RtxError,
)
from torch_rtx.optable import NUMBERS
from torch_rtx.targets import ALIGNMENT

X = torch.linspace(-2, 2, 6).view(2, 3)


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


# What can be compiled -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["module", "raw", "decomposed"])
def test_module_and_exported_program(kind, tmp_path):
    model = Net().eval()
    if kind == "module":
        source, args = model, (IMAGE,)
    else:
        source, args = export(model, (IMAGE,)), None
        source = source.run_decompositions({}) if kind == "decomposed" else source
    module = torch_rtx.compile(source, args)
    for one in (module, through_file(module, tmp_path, weights=model)):
        same(one(IMAGE), model(IMAGE), atol=1e-5, rtol=1e-4)
        same(one(x=IMAGE), model(IMAGE), atol=1e-5, rtol=1e-4)


def test_what_can_not_be_compiled():
    with pytest.raises(CaptureError, match="cannot export a function"):
        torch_rtx.compile(lambda x: x, (X,))
    with pytest.raises(CaptureError, match="args must be a tuple"):
        torch_rtx.compile(Net(), IMAGE)
    with pytest.raises(CaptureError, match="already traced"):
        torch_rtx.compile(export(Net(), (IMAGE,)), (IMAGE,))
    with pytest.raises(CaptureError, match="cannot trace on the meta device"):
        torch_rtx.compile(Net().to("meta"), (IMAGE.to("meta"),))
    settings = torch_rtx.CompilationSettings(device="cuda", strip_weights=False)
    with pytest.raises(CaptureError, match="strip_weights is False and the model has no data for conv.weight"):
        torch_rtx.compile(Net().to("meta").eval(), (IMAGE,), settings=settings)


# Arguments ------------------------------------------------------------------------------------------------------------


class Arguments(nn.Module):
    def forward(self, a, b, c=None, *, scale=1.0, shift=None):
        out = a - 2 * b
        out = out if c is None else out + 3 * c
        return out * scale if shift is None else out * scale + shift


A, B, C = X, X + 1, X * 2
CALLS = {
    "positional": ((A, B), {}),
    "named": ((A,), {"b": B}),
    "all_named": ((), {"b": B, "a": A}),
    "optional": ((A, B, C), {}),
    "optional_named": ((A,), {"c": C, "b": B}),
    "shift": ((A, B), {"shift": C}),
    "none": ((A, B, None), {"shift": None}),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_in_any_way(name, tmp_path):
    model = Arguments()
    args, kwargs = CALLS[name]
    here = torch_rtx.compile(model, args, kwargs)
    named = {**dict(zip("abc", args, strict=False)), **kwargs}
    expected = model(*args, **kwargs)
    for module in (here, through_file(here, tmp_path)):
        same(module(*args, **kwargs), expected)
        same(module(**named), expected)
        same(module(**dict(reversed(named.items()))), expected)
        positional = [named[n] for n in "abc" if n in named]
        same(module(*positional, **{k: v for k, v in named.items() if k not in "abc"}), expected)
        same(module(named["a"], **{k: v for k, v in named.items() if k != "a"}), expected)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "missing argument a, missing argument b; the engine was built for (a, b)"),
        ((A,), {}, "missing argument b"),
        ((A, B), {"z": C}, "unexpected argument z"),
        ((A, B, C), {}, "unexpected argument c"),
        ((A, B, C, C), {}, "got 4 positional arguments, the engine was built for 3"),
        ((A, B), {"b": B}, "argument b is given twice, by position and by name"),
        ((A, None), {}, "input 'b' is a NoneType, expected a tensor"),
        ((A, [B]), {}, "input 'b' is a list, expected a tensor"),
        ((A, {"b": B}), {}, "input 'b' is a dict, expected a tensor"),
        ((A, 1.5), {}, "input 'b' is a float, expected a tensor"),
        ((A, B.double()), {}, "input 'b' has dtype torch.float64, expected torch.float32"),
        ((A, B.to("meta")), {}, "input 'b' is on meta, expected cpu"),
        ((A, B[0]), {}, "input 'b' has 1 dimensions, expected 2: [2, 3]"),
        ((A, B[:, :2]), {}, "dimension 1 of input 'b' is 2, the engine was built for 3"),
    ],
)
def test_arguments_that_do_not_fit(args, kwargs, message, tmp_path):
    here = torch_rtx.compile(Arguments(), (A, B))
    for module in (here, through_file(here, tmp_path)):
        expected = module(A, B)
        with pytest.raises(InputError, match=re.escape(message)):
            module(*args, **kwargs)
        same(module(A, B, shift=None), expected)  # still works, and None for what the capture left out is no argument


class Defaults(nn.Module):
    def forward(self, x, flag=True, scale=None, *, power=2):
        y = x**power if flag else x
        return y if scale is None else y * scale


@pytest.mark.parametrize(("args", "kwargs"), [((A,), {}), ((A, True, None), {"power": 2}), ((A,), {"flag": True})])
def test_defaults_may_be_given_or_left_out(args, kwargs, tmp_path):
    here = torch_rtx.compile(Defaults(), args, kwargs)
    for module in (here, through_file(here, tmp_path)):
        expected = A**2
        for call in ((A,), {}), ((A, True), {}), ((A, True, None), {"power": 2}), ((A,), {"scale": None, "power": 2}):
            same(module(*call[0], **call[1]), expected)
        for name, value in {"flag": False, "power": 3, "scale": 2.0}.items():
            with pytest.raises(InputError, match=f"argument {name}"):
                module(A, **{name: value})
        with pytest.raises(InputError, match="argument flag"):  # 1 == True, but another program may be meant
            module(A, flag=1)


def test_what_is_no_default_must_be_given(tmp_path):
    here = torch_rtx.compile(Defaults(), (A, False), {"power": 3})
    for module in (here, through_file(here, tmp_path)):
        same(module(A, False, power=3), A)
        with pytest.raises(InputError, match="missing argument flag, missing argument power; the engine was built for"):
            module(A)


def test_gradients_of_what_is_no_result_of_the_engine():
    module = torch_rtx.compile(Function(lambda x, y: (x, y * 2, y.int(), y.view(-1))), (A, B))
    with torch.enable_grad():
        x, y = A.clone().requires_grad_(), B.clone().requires_grad_()
        same_x, double, whole, flat = module(x, y)
        assert same_x is x
        assert not whole.requires_grad
        double.add_(1)
        for result in (double, flat):  # a view as well
            with pytest.raises(RuntimeError, match="an engine computes no gradients"):
                result.sum().backward()
        with torch.no_grad():
            assert not module(x, y)[1].requires_grad


def test_var_positional(tmp_path):
    for module in both(Function(lambda *xs: sum(xs)), (A, B, C), tmp_path):
        with pytest.raises(InputError, match="missing argument #2"):
            module(A, B)
        with pytest.raises(InputError, match="got 4 positional arguments, the engine was built for 3"):
            module(A, B, C, C)


def test_specialised_constants(tmp_path):
    class Model(nn.Module):
        def forward(self, x, times, mode="add", flag=True):
            x = x * times
            return x + 1 if mode == "add" and flag else x

    model = Model()
    here = torch_rtx.compile(model, (X, 3), {"mode": "add", "flag": True})
    for module in (here, through_file(here, tmp_path)):
        same(module(X, 3, mode="add", flag=True), model(X, 3))
        same(module(x=X, flag=True, mode="add", times=3), model(X, 3))
        with pytest.raises(InputError, match="argument times is 4, the engine was built for 3"):
            module(X, 4, mode="add", flag=True)
        for times in (3.0, torch.tensor(3), None):
            with pytest.raises(InputError, match="argument times is"):
                module(X, times, mode="add", flag=True)
        with pytest.raises(InputError, match="argument mode is 'sub', the engine was built for 'add'"):
            module(X, 3, mode="sub", flag=True)
        with pytest.raises(InputError, match="missing argument times"):
            module(X)


# Structures -----------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "first second")


def test_nested_inputs(tmp_path):
    def function(batch, rest):
        (a, [b]), c = batch["pair"], batch["deep"]["c"]
        return a - b * c + rest[0] - rest[1]["k"]

    args = ({"pair": (A, [B]), "deep": {"c": C, "n": None}}, [A, {"k": B}])
    for module in both(Function(function), args, tmp_path):
        # The order of keys says nothing.
        other = ({"deep": OrderedDict(n=None, c=C), "pair": (A, [B])}, [A, {"k": B}])
        same(module(*other), function(*args))
        with pytest.raises(InputError, match="argument #0 has another structure than at capture: missing entry 'deep'"):
            module({"pair": (A, [B])}, [A, {"k": B}])
        with pytest.raises(InputError, match="capture: unexpected entry 'more'$"):
            module({**args[0], "more": A}, args[1])
        with pytest.raises(InputError, match="argument #1 has another structure"):
            module(args[0], (A, {"k": B}))
        with pytest.raises(InputError, match="argument #0 has another structure"):
            module(A, args[1])


OUTPUTS = {
    "tensor": lambda x: x + 1,
    "tuple": lambda x: (x + 1, x - 1),
    "list": lambda x: [x + 1],
    "empty": lambda x: (),
    "dict": lambda x: {"b": x + 1, "a": x - 1},
    "int_keys": lambda x: {1: x + 1, 0: x},
    "nested": lambda x: {"a": [x + 1, (x, {"z": x * 2})], "b": None},
    "none": lambda x: None,
    "constants": lambda x: (x + 1, None, 3, 2.5, True, "text"),
    "twice": lambda x: (y := x + 1, y),
    "ordered": lambda x: OrderedDict(b=x + 1, a=x),
    "default": lambda x: defaultdict(list, {"a": x + 1}),
    "namedtuple": lambda x: Pair(x + 1, [x]),
    "return_types": lambda x: x.max(0),
    "constant_tensor": lambda x: (x, torch.tensor([1, 2])),
    "view": lambda x: (x.t(), x[0], x.reshape(-1)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name, tmp_path):
    model = Function(OUTPUTS[name])
    expected = model(X)
    here = torch_rtx.compile(model, (X,))
    for module in (here, through_file(here, tmp_path)):
        for _ in range(3):  # the later calls build results in a faster way
            result = module(X)
            if name == "namedtuple":
                assert (type(result).__name__, result._fields) == ("Pair", ("first", "second"))
                result = Pair(*result)
            same(result, expected)
            assert type(result) is type(expected)
            if name == "twice":
                assert result[0] is result[1]
            if name == "default":
                assert result["new"] == []


@dataclasses.dataclass
class Anonymous:
    value: torch.Tensor


def test_containers_without_a_name_run_and_are_not_saved(tmp_path):
    torch.utils._pytree.register_dataclass(Anonymous)
    module = torch_rtx.compile(Function(lambda x: {"a": Anonymous(x + 1), "b": [x]}), (X,))
    result = module(X)
    same(result["a"].value, X + 1)
    with pytest.raises(RtxError, match="the container Anonymous can't be saved in an engine"):
        torch_rtx.save(module, tmp_path / "model.rtx")
    assert not (tmp_path / "model.rtx").exists()
    keyed = torch_rtx.compile(Function(lambda x: {("a", 1): x + 1}), (X,))
    same(keyed(X), {("a", 1): X + 1})
    with pytest.raises(RtxError, match="its keys .* are not plain"):
        torch_rtx.save(keyed, tmp_path / "model.rtx")


@pytest.mark.quick
def test_inputs_are_named():
    module = torch_rtx.compile(Function(lambda **kw: kw["b"] + kw["a"]), (), {"a": A, "b": B})
    assert len(module.engine.manifest.inputs) == 2
    module = torch_rtx.compile(Arguments(), (A, B))
    assert module.engine.manifest.inputs == ("a", "b")
    assert "nodes=" in repr(module)


# State ----------------------------------------------------------------------------------------------------------------


def test_batch_norm_in_training_mode(tmp_path):
    model = nn.BatchNorm1d(3).train()
    eager, here = copy.deepcopy(model), copy.deepcopy(model)
    module = torch_rtx.compile(torch.export.export(here, (X,)))
    loaded = through_file(module, tmp_path, weights=model.state_dict())
    for _ in range(3):
        expected = eager(X)
        same(module(X), expected, atol=1e-6, rtol=1e-5)
        same(loaded(X), expected, atol=1e-6, rtol=1e-5)
    for other in (here, model):  # attached tensors are the caller's own
        same(dict(other.named_buffers()), dict(eager.named_buffers()))


class Cache(nn.Module):
    def __init__(self, persistent):
        super().__init__()
        self.register_buffer("seen", torch.zeros(4, 3), persistent)
        self.register_buffer("at", torch.zeros((), dtype=torch.long), persistent)

    def forward(self, x):
        self.seen.index_copy_(0, self.at.view(1), x[:1])
        self.at.add_(1)
        return self.seen * 2


@pytest.mark.parametrize("persistent", [True, False])
def test_caches_belong_to_a_session(persistent, tmp_path):
    model = Cache(persistent)
    fresh, steps = copy.deepcopy(model), [X, X + 1, X + 2, X + 3]
    torch_rtx.save(torch_rtx.compile(model, (X,)), tmp_path / "model.rtx")
    save_file(fresh.state_dict(), tmp_path / "weights.safetensors")
    weights = tmp_path / "weights.safetensors" if persistent else None
    a, b = (torch_rtx.load(tmp_path / "model.rtx", weights) for _ in range(2))
    expected = [fresh(x) for x in steps]
    assert not torch.equal(expected[0], expected[1])
    for x, result in zip(steps, expected, strict=True):
        same(a(x), result)
    for x, result in zip(steps, expected, strict=True):  # unmoved by what the other saw
        same(b(x), result)
    same(torch_rtx.load(tmp_path / "model.rtx", weights)(X), expected[0])  # nor is the file
    assert int(model.at) == 0


def test_live_buffers_of_the_model():
    model = Cache(True)
    eager, module = copy.deepcopy(model), torch_rtx.compile(model, (X,))
    for x in (X, X + 1):
        same(module(x), eager(x))
    assert int(model.at) == 2


def test_mutated_inputs(tmp_path):
    def function(x, y):
        x.add_(1)
        y["k"].mul_(x)
        return x * 2

    here = torch_rtx.compile(Function(function), (X.clone(), {"k": X.clone()}))
    for module in (here, through_file(here, tmp_path)):
        a, b = X.clone(), X.clone()
        c, d = X.clone(), X.clone()
        same(module(a, {"k": b}), function(c, {"k": d}))
        same((a, b), (c, d))


def test_outputs_that_alias(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 2))
            self.register_buffer("table", torch.arange(3.0), persistent=False)

        def forward(self, x):
            return x, x.t(), self.weight.detach(), self.weight.detach().t(), self.table, self.table * 2

    model = Model()
    for module in both(model, (X,), tmp_path):
        result = module(X)
        assert result[0] is X
        assert result[1].data_ptr() == X.data_ptr()
        for tensor in result[4:]:  # whoever writes to a result does not change the engine
            tensor.zero_()
        same(module(X), model(X))
        assert not any(tensor.requires_grad for tensor in result)


def test_random_ops(tmp_path):
    here = torch_rtx.compile(Function(lambda x: (torch.rand_like(x), F.dropout(x, 0.5))).eval(), (X,))
    for module in (here, through_file(here, tmp_path)):
        torch.manual_seed(1)
        a = module(X)
        b = module(X)
        torch.manual_seed(1)
        same(module(X), a)
        assert not torch.equal(a[0], b[0])


# Modes ----------------------------------------------------------------------------------------------------------------


def test_gradients(tmp_path):
    model = Net().eval()
    module = both(model, (IMAGE,), tmp_path)[1]
    with torch.enable_grad():
        x = IMAGE.clone().requires_grad_()
        result = module(x)
        same(result.detach(), model(IMAGE).detach(), atol=1e-5, rtol=1e-4)
        with pytest.raises(RuntimeError, match="an engine computes no gradients: train through torch.compile"):
            (result * 2).sum().backward()  # not: no gradient for x
        assert not module(IMAGE).requires_grad
        result = result.detach()
    with torch.inference_mode():
        same(module(IMAGE), result, atol=0, rtol=0)


def test_autocast_at_the_call_changes_nothing():
    model = Net().eval()
    module, expected = torch_rtx.compile(model, (IMAGE,)), model(IMAGE)
    with torch.autocast("cpu", torch.bfloat16):
        same(module(IMAGE), expected, atol=1e-5, rtol=1e-4)
        inside = torch_rtx.compile(model, (IMAGE,))  # captured under it, its casts are part of the engine
        lower = model(IMAGE)
    assert lower.dtype == torch.bfloat16
    same(inside(IMAGE), lower, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("weights", ["plain", "channels_last"])
@pytest.mark.parametrize("image", ["plain", "channels_last"])
def test_memory_formats(weights, image, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    model = model.to(memory_format=torch.channels_last) if weights == "channels_last" else model
    x = IMAGE.to(memory_format=torch.channels_last) if image == "channels_last" else IMAGE
    for module in both(model, (x,), tmp_path):
        for given in (IMAGE, IMAGE.to(memory_format=torch.channels_last), IMAGE.transpose(2, 3).transpose(2, 3)):
            torch.testing.assert_close(module(given), model(given), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, tmp_path):
    model, x = Net().eval().to(dtype), IMAGE.to(dtype)
    here = torch_rtx.compile(model, (x,))
    for module in (here, through_file(here, tmp_path, weights=model)):
        same(module(x), model(x), atol=2e-2, rtol=2e-2)
        with pytest.raises(InputError, match="has dtype torch.float32"):
            module(IMAGE)


def test_tied_and_unsaved_weights(tmp_path):
    both(Tied(), (IDS,), tmp_path)

    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.rand(3), persistent=False)
            self.weight, self.plain, self.pairs = nn.Parameter(torch.rand(3)), torch.rand(3), torch.rand(3, 2)

        def forward(self, x):
            return x * self.table.cos() + self.weight + self.plain + self.pairs[:, 1]

    model = Rotary()
    here = torch_rtx.compile(model, (X,))
    same(through_file(here, tmp_path, weights=model.state_dict())(X), model(X))
    for weights in (model, model.state_dict()):
        loaded = through_file(here, tmp_path)
        loaded.refit(weights)
        same(loaded(X), model(X))
        assert not any(weight.data_ptr() % ALIGNMENT for weight in loaded._store.values)  # no call copies the pairs


@pytest.mark.quick
def test_with_weights_in_the_file(tmp_path):
    settings = torch_rtx.CompilationSettings(strip_weights=False)
    for model, args in ((Net().eval(), (IMAGE,)), (Tied(), (IDS,))):
        here = torch_rtx.compile(model, args, settings=settings)
        loaded = through_file(here, tmp_path)
        assert torch.equal(loaded(*args), here(*args))
        for change in (loaded.refit, loaded.attach):  # what is saved next are the weights that it runs with
            other = copy.deepcopy(model)
            for parameter in other.parameters():
                parameter.add_(torch.rand(()))
            change(other)
            again = through_file(loaded, tmp_path)
            assert torch.equal(again(*args), loaded(*args))
            same(again(*args), other(*args), atol=1e-5, rtol=1e-4)


def test_without_weights_it_can_not_be_called(tmp_path):
    loaded = through_file(torch_rtx.compile(Net().eval(), (IMAGE,)), tmp_path)
    with pytest.raises(RtxError, match="weight-stripped.*\n.*module.refit"):
        loaded(IMAGE)
    loaded.refit(Net())
    loaded(IMAGE)


def test_tensors_that_had_no_data(tmp_path):
    """Attributes and buffers that no state dict has come from the module itself, if they were on `meta` at capture."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.weight = torch.arange(3.0), nn.Parameter(torch.ones(3))
            self.register_buffer("table", torch.arange(3.0) + 1, persistent=False)

        def forward(self, x):
            return x * self.plain + self.weight * self.table + torch.tensor([1.0, 2, 3], device=x.device)

    with torch.device("meta"):
        empty = Model()
    settings = torch_rtx.CompilationSettings(device="cuda")
    torch_rtx.save(torch_rtx.compile(empty, (X,), settings=settings), tmp_path / "model.rtx")
    model, loaded = Model(), torch_rtx.load(tmp_path / "model.rtx", device="cpu")
    for give in (loaded.refit, loaded.attach):
        give(model)
        same(loaded(X), model(X))
    with pytest.raises(RefitError, match="missing: table\n  missing: plain"):
        loaded.refit(model.state_dict())


def test_built_on_meta_for_cuda(tmp_path, caplog):
    model = Net().eval()
    with torch.device("meta"):
        empty = Net().eval()
    settings = torch_rtx.CompilationSettings(device="cuda")
    module = torch_rtx.compile(empty, (IMAGE.to("meta"),), settings=settings)
    assert all(p.is_meta for p in empty.parameters())
    with pytest.raises(RtxError, match="weight-stripped"):
        module(IMAGE)
    torch_rtx.save(module, tmp_path / "model.rtx")
    assert torch_rtx.inspect(tmp_path / "model.rtx").manifest.device == "cuda"
    loaded = torch_rtx.load(tmp_path / "model.rtx", device="cpu")
    for give in (loaded.refit, loaded.attach):
        give(model)
        same(loaded(IMAGE), model(IMAGE), atol=1e-5, rtol=1e-4)
    if not torch.cuda.is_available():
        assert torch_rtx.load(tmp_path / "model.rtx").device == torch.device("cpu")
        assert "not available: it runs on the CPU" in caplog.text


# Fallbacks ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("torch_rtx_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x):
    return torch.empty_like(x)


def test_fallback_operators_must_be_trusted(tmp_path):
    model = Function(lambda x: twice(x + 1) - 1)
    module = torch_rtx.compile(model, (X,))
    same(module(X), model(X))
    path = tmp_path / "model.rtx"
    torch_rtx.save(module, path)
    for trusted in ((), ("other.op.default",)):
        with pytest.raises(InvalidIR, match="torch_rtx_tests.twice.default is not on the allow-list.*\n.*trusted_ops"):
            torch_rtx.load(path, trusted_ops=trusted)
    same(torch_rtx.load(path, trusted_ops=["torch_rtx_tests.twice.default"])(X), model(X))
    settings = torch_rtx.CompilationSettings(require_full_compilation=True)
    with pytest.raises(PartitionError, match="twice.default.*not on the allow-list"):
        torch_rtx.compile(model, (X,), settings=settings)


def test_python_fallbacks_run_here_and_are_not_saved(tmp_path):
    class Model(nn.Module):
        def forward(self, x):
            return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 2), (0, x))[1] * 2  # its state is a number

    module = torch_rtx.compile(Model(), (X,))
    for x in (X + 9, X - 9):
        same(module(x), Model()(x))
    message = r"the fallback node \w+ calls a Python function, which no file can hold"
    with pytest.raises(RtxError, match=message) as error:
        torch_rtx.save(module, tmp_path / "model.rtx")
    assert "test_module.py" in str(error.value.loc)
    assert list(tmp_path.iterdir()) == []


# One module, many threads ---------------------------------------------------------------------------------------------


def test_eight_threads():
    model = Net().eval()
    module = torch_rtx.compile(model, (IMAGE,), dynamic_shapes={"x": {0: Dim("n", min=1, max=16)}})
    inputs = [torch.randn(1 + index, 3, 4, 4) for index in range(8)]
    expected = [model(x) for x in inputs]
    failures, start = [], threading.Barrier(8)

    def work(index):
        start.wait()
        for step in range(25):
            at = (index + step) % 8
            if not torch.allclose(module(inputs[at]), expected[at], atol=1e-5):
                failures.append((index, step))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_signature_must_fit_the_graph():
    module = torch_rtx.compile(Arguments(), (A, B))
    other = torch_rtx.compile(Function(lambda x: x), (A,)).engine.manifest
    with pytest.raises(EngineFormatError, match="the signature does not fit the graph"):
        torch_rtx.CompiledModule(dataclasses.replace(module.engine, manifest=other), torch.device("cpu"))


def test_arguments_called_like_what_generated_code_needs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(
            self, weights: torch.Tensor, inputs: torch.Tensor, _restride: torch.Tensor, run: torch.Tensor
        ) -> torch.Tensor:
            return (self.fc(weights) * inputs + run.t()).t() @ _restride

    model, args = Model(), tuple(torch.randn(3, 3) for _ in range(4))
    torch.testing.assert_close(torch_rtx.compile(model, args)(*args), model(*args).detach())


def test_conjugated_inputs() -> None:
    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    x = torch.randn(4, dtype=torch.complex64)
    module = torch_rtx.compile(Double(), (x,))
    assert torch.equal(module(x.conj()), x.conj() * 2)
    for given in (x, x.conj(), x, torch._neg_view(x), x.conj()):  # of one type, but for a bit of each
        assert torch.equal(module(given), given * 2)


def test_inputs_are_checked_whatever_the_last_call_was() -> None:
    """That a call has the types of the last one is told in another way than that they fit."""

    class Add(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    x = torch.ones(4, 4)
    module = torch_rtx.compile(Add(), (x, x))
    for _ in range(2):
        for y in (x, x.t(), x.clone().requires_grad_(), nn.Parameter(x), x[:1].expand(4, 4)):
            assert torch.equal(module(x, y), x + x)
        with torch.inference_mode():
            assert torch.equal(module(x, x), x + x)
        for wrong, message in ((x.double(), "dtype"), (x[:2], "dimension 0"), (x[0], "dimensions"), (2.0, "tensor")):
            with pytest.raises(InputError, match=message):
                module(x, wrong)
        with pytest.raises(InputError, match="expected 2 inputs, got 1"):
            module.session([x])


def test_hooks_and_replaced_calls() -> None:
    """They are seen although calls without any take a shorter way than `nn.Module`'s."""
    module = torch_rtx.compile(Function(lambda x: {"a": x + 1}), (X,))
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: seen.append("before")),
        module.register_forward_hook(lambda module, args, result: result["a"] * 2),
        nn.modules.module.register_module_forward_hook(lambda module, args, result: seen.append("global")),
    ]
    assert torch.equal(module(X), (X + 1) * 2)
    assert sorted(seen) == ["before", "global"]
    for hook in hooks:
        hook.remove()
    assert torch.equal(module(X)["a"], X + 1)
    forward = module.forward
    module.forward = lambda x: forward(x)["a"] - 1  # as libraries that wrap models do
    torch.testing.assert_close(module(X), X)


def test_results_do_not_hold_each_other() -> None:
    """A result that is built like the first one holds nothing of that."""
    module = torch_rtx.compile(Function(lambda x: BaseModelOutput(last_hidden_state=x + 1)), (X,))
    first = module(X)
    reference = weakref.ref(first.last_hidden_state)
    later = [module(X * step) for step in range(3)]
    del first
    assert reference() is None
    for step, result in enumerate(later):
        assert type(result) is BaseModelOutput
        assert list(result) == ["last_hidden_state"]
        assert (result.hidden_states, result.attentions) == (None, None)
        assert torch.equal(result.last_hidden_state, X * step + 1)
        assert result[0] is result["last_hidden_state"] is result.last_hidden_state


def counted(x):
    count = (x > 0).sum().item()
    torch._check(count >= 0)
    torch._check(count <= 3)
    return x[:count] * 2


@pytest.mark.parametrize(
    "function", [lambda x: torch.nonzero(x > 0) * 2, lambda x: x[x > 0] + 1, counted], ids=["nonzero", "mask", "item"]
)
def test_sizes_that_the_data_decides_go_through_a_file(function, tmp_path):
    """What torch.export checks of such sizes is in the file, and still checked."""
    loaded = through_file(torch_rtx.compile(Function(function), (torch.randn(5),)), tmp_path)
    for x in (torch.tensor([1.0, -1, 2, -1, 3]), -torch.ones(5), torch.tensor([1.0, -1, -1, -1, -1])):
        same(loaded(x), function(x))
    if function is counted:
        with pytest.raises(RuntimeError, match="Runtime assertion failed"):
            loaded(torch.ones(5))


def test_arithmetic_on_sizes_goes_through_a_file(tmp_path):
    """Bit for bit that of Python, for each size; a file may call nothing else by these names."""

    def function(x):
        n, m = x.shape
        return x * n**-0.5, x * (1 / n) + m * 0.1, x * round(n / 3, 2), x * math.trunc(1.7 * n), n / m

    sizes = {0: Dim("n", min=2, max=64), 1: Dim("m", min=2, max=40)}
    module = torch_rtx.compile(Function(function), (torch.randn(5, 8),), dynamic_shapes=((sizes,),))
    loaded = through_file(module, tmp_path)
    for shape in ((5, 8), (64, 2), (13, 7)):
        x = torch.randn(shape)
        same(loaded(x), function(x), rtol=0, atol=0)
    kinds = {node.op: node.kind for node in loaded.engine.graph.nodes if node.op in NUMBERS}
    assert set(kinds.values()) == {"extern"}
    assert "torch_rtx.truediv.default" in kinds


class Selected(nn.Module):
    """Convolutions over as many positions as the data has."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 3, 3, padding=1)

    def forward(self, x, chosen):
        x = self.conv(x[torch.nonzero(chosen)[:, 0]].T[None])
        return x, x.flatten(1) + 1


def test_convolutions_over_sizes_that_the_data_decides():
    """PyTorch writes their strides as those of a size of at least 1."""
    model, x = Selected().eval().requires_grad_(False), torch.randn(5, 4)
    settings = torch_rtx.CompilationSettings(device="cuda", targets="later")
    module = torch_rtx.compile(model, (x, torch.tensor([1, 0, 1, 1, 0])), settings=settings)
    for chosen in ((1, 0, 1, 1, 0), (0, 0, 0, 1, 0)):
        torch.testing.assert_close(module(x, torch.tensor(chosen)), model(x, torch.tensor(chosen)))
