"""An engine as users of `nn.Module` know modules: names, state dicts, parts of other modules, code that is traced."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_rtx
from tests.backend.test_objects import scaled
from tests.engine_files import forge
from tests.helpers.ahead import IDS, IMAGE, Net, Tied, through_file
from tests.helpers.compiled import same
from torch_rtx import CompiledModule
from torch_rtx.errors import EngineFormatError, InputError, RefitError, RtxError
from torch_rtx.runtime import attributes


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, CompiledModule]:
    """A model and its engine, which has the model's tensors."""
    with torch.no_grad():
        model = Net().eval()
        return model, torch_rtx.compile(model, (IMAGE,))


class Parent(nn.Module):
    """A model with an engine as a part."""

    def __init__(self, engine: nn.Module) -> None:
        super().__init__()
        self.head, self.net = nn.Linear(8, 2), engine

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.net(x.sin()).cos())


UNUSED = "bn.num_batches_tracked"  # in a state dict of Net, and of no use to its engine


def without(state: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in names}


# Names ----------------------------------------------------------------------------------------------------------------


def test_names_are_those_of_the_model(pair: tuple[nn.Module, CompiledModule], tmp_path: Path) -> None:
    model, engine = pair
    loaded = through_file(engine, tmp_path)
    for module in (engine, loaded, copy.deepcopy(engine)):
        assert [name for name, _ in module.named_parameters()] == [name for name, _ in model.named_parameters()]
        assert {name for name, _ in module.named_buffers()} == {"bn.running_mean", "bn.running_var"}
        assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in model.parameters())
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    for name, parameter in engine.named_parameters():
        assert parameter.data_ptr() == model.get_parameter(name).data_ptr() == engine.get_parameter(name).data_ptr()
    assert torch.equal(engine.get_buffer("bn.running_mean"), model.get_buffer("bn.running_mean"))
    for get in (engine.get_parameter, engine.get_buffer):
        with pytest.raises(AttributeError):
            get("q.other")
    assert all(parameter.is_meta for parameter in loaded.parameters())  # it has no weights yet
    parent = Parent(engine)
    assert [n for n, _ in parent.named_parameters()] == ["head.weight", "head.bias"] + [
        f"net.{name}" for name, _ in model.named_parameters()
    ]


def test_state_dict(pair: tuple[nn.Module, CompiledModule], tmp_path: Path) -> None:
    model, engine = pair
    expected = without(model.state_dict(), UNUSED)
    state = engine.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    other = Net().eval()
    other.load_state_dict(state)
    assert torch.equal(other(IMAGE), model(IMAGE))
    save_file(state, tmp_path / "state.safetensors")
    loaded = through_file(engine, tmp_path, weights=tmp_path / "state.safetensors")
    assert torch.equal(loaded(IMAGE), engine(IMAGE))
    with pytest.raises(RtxError, match="does not have conv.weight, .* and 7 others in the form of the model\n.*attach"):
        loaded.state_dict()  # folded weights can't be taken apart
    known = dict(loaded.named_parameters())
    assert torch.equal(known["out.weight"], model.get_parameter("out.weight"))
    assert known["q.weight"].is_meta
    loaded.load_state_dict(state, assign=True)
    assert loaded.state_dict().keys() == expected.keys()


def test_tied_parameters() -> None:
    model = Tied()
    engine = torch_rtx.compile(model, (IDS,))
    assert engine.state_dict().keys() == model.state_dict().keys()
    assert [n for n, _ in engine.named_parameters()] == [n for n, _ in model.named_parameters()]
    names = [name for name, _ in engine.named_parameters(remove_duplicate=False)]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters(remove_duplicate=False))
    state = engine.state_dict()
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()


def test_a_part_of_another_module(pair: tuple[nn.Module, CompiledModule]) -> None:
    model, other = pair[0], Net().eval()
    parent, plain = Parent(copy.deepcopy(pair[1])), Parent(other)
    parent.net.attach(copy.deepcopy(model))
    plain.load_state_dict(parent.state_dict())
    same(parent(IMAGE), plain(IMAGE), atol=1e-5, rtol=1e-4)
    state = {name: tensor + 0.1 for name, tensor in plain.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert str(parent.load_state_dict(state)) == "<All keys matched successfully>"
    plain.load_state_dict(state)
    same(parent(IMAGE), plain(IMAGE), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    with pytest.raises(RuntimeError, match='Unexpected key.*"net.more"'):
        parent.load_state_dict({**state, "net.more": IMAGE})
    with pytest.raises(RuntimeError, match='Missing key.*"net.out.weight"'):
        parent.load_state_dict(without(state, "net.out.weight"))
    with pytest.raises(RuntimeError, match="the engine 'net'.*\n.*q.weight: expected shape"):
        parent.load_state_dict({**state, "net.q.weight": IMAGE})
    head = {name: tensor for name, tensor in state.items() if name.startswith("head")}
    assert "net.conv.weight" in parent.load_state_dict(head, strict=False).missing_keys
    same(parent(IMAGE), plain(IMAGE), atol=1e-5, rtol=1e-4)


def test_some_weights_alone(pair: tuple[nn.Module, CompiledModule]) -> None:
    model = copy.deepcopy(pair[0])
    engine = copy.deepcopy(pair[1])
    new = {"q.weight": model.get_parameter("q.weight") * 2}
    with pytest.raises(RefitError, match="missing: "):
        engine.load_state_dict(new, strict=False)  # a copy has folded weights only
    engine.attach(model)
    assert engine.load_state_dict({**new, "more": IMAGE}, strict=False).unexpected_keys == ["more"]
    expected = copy.deepcopy(model)
    expected.load_state_dict(new, strict=False)
    same(engine(IMAGE), expected(IMAGE), atol=1e-5, rtol=1e-4)
    assert not torch.equal(model.get_parameter("q.weight"), new["q.weight"])  # nothing of the caller is written


class Sub(CompiledModule):
    """What a user makes of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale + self.shift(x.mean())


def test_a_subclass_with_parameters_of_its_own(pair: tuple[nn.Module, CompiledModule]) -> None:
    module = pair[1]
    sub = Sub(module.engine, module.device)
    sub.scale, sub.shift = nn.Parameter(torch.tensor(2.0)), nn.Identity()
    sub.extra = nn.Linear(2, 2)
    sub.attach(pair[0])
    expected = module(IMAGE) * 2 + IMAGE.mean()
    assert torch.equal(sub(IMAGE), expected)
    assert {"scale", "extra.weight", "q.weight"} <= dict(sub.named_parameters()).keys()
    for copied in (copy.deepcopy(sub), copy.copy(sub)):
        assert type(copied) is Sub
        assert torch.equal(copied(IMAGE), expected)
    parent, state = Parent(copy.deepcopy(sub)), {f"net.{n}": t * 2 for n, t in sub.state_dict().items()}
    assert parent.load_state_dict(state, strict=False).missing_keys == ["head.weight", "head.bias"]
    assert parent.net.scale == 4
    assert torch.equal(parent.net.extra.weight, sub.extra.weight * 2)
    assert sub.scale == 2


# File objects and pickles ---------------------------------------------------------------------------------------------


def test_a_buffer_in_memory(pair: tuple[nn.Module, CompiledModule]) -> None:
    buffer = io.BytesIO()
    torch_rtx.save(pair[1], buffer)
    buffer.seek(0)
    assert torch.equal(torch_rtx.load(buffer, weights=pair[0])(IMAGE), pair[1](IMAGE))
    with pytest.raises(torch_rtx.EngineFormatError, match="<BytesIO>"):
        torch_rtx.load(io.BytesIO(buffer.getvalue()[:-1]))


def test_one_class_is_all_that_a_checkpoint_needs_to_be_trusted(pair: tuple[nn.Module, CompiledModule]) -> None:
    buffer = io.BytesIO()
    torch.save({"net": pair[1]}, buffer)
    buffer.seek(0)
    with pytest.raises(Exception, match="Unsupported global: GLOBAL torch_rtx.runtime.module.CompiledModule"):
        torch.load(buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals([CompiledModule]):
        found = torch.load(buffer)
    assert torch.equal(found["net"](IMAGE), pair[1](IMAGE))


# Code that is traced --------------------------------------------------------------------------------------------------


def test_dynamo_breaks_the_graph_once(pair: tuple[nn.Module, CompiledModule], fresh_dynamo: None) -> None:
    graphs: list[int] = []

    def backend(graph: Any, inputs: object) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph

    parent = Parent(pair[1])
    compiled, expected = torch.compile(parent, backend=backend), parent(IMAGE)
    counters.clear()
    for _ in range(2):
        assert torch.equal(compiled(IMAGE), expected)
    assert sum(counters["graph_break"].values()) == 1
    assert len(graphs) == 2
    assert torch.equal(torch.compile(pair[1], backend=backend)(IMAGE), pair[1](IMAGE))
    assert len(graphs) == 2
    torch._dynamo.reset()
    with pytest.raises(Exception, match="an engine is compiled already"):
        torch.compile(parent, backend=backend, fullgraph=True)(IMAGE)


TRACERS: dict[str, Callable[[nn.Module], object]] = {
    "export": lambda m: torch.export.export(m, (IMAGE,)),
    "export of a parent": lambda m: torch.export.export(Parent(m), (IMAGE,)),
    "engine in an engine": lambda m: torch_rtx.compile(Parent(m), (IMAGE,)),
}


@pytest.mark.parametrize("how", TRACERS)
def test_an_engine_can_not_be_traced(how: str, pair: tuple[nn.Module, CompiledModule]) -> None:
    with pytest.raises(RtxError, match="an engine can't be traced.*\n.*the model that the engine was built from"):
        TRACERS[how](pair[1])
    same(pair[1](IMAGE), pair[0](IMAGE), atol=1e-5, rtol=1e-4)


def test_tensors_without_memory(pair: tuple[nn.Module, CompiledModule]) -> None:
    pair[1](IMAGE)  # equal types are known already
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(IMAGE)
        with pytest.raises(RtxError, match="can't be traced"):
            pair[1](fake)
    with pytest.raises(InputError, match="input 'x' is a FakeTensor, expected a plain tensor"):
        pair[1](fake)
    with pytest.raises(InputError, match="input 'x' is a Scaled, expected a plain tensor"):
        pair[1](scaled(IMAGE))
    assert torch.equal(pair[1](nn.Parameter(IMAGE)), pair[1](IMAGE))


# Attributes -----------------------------------------------------------------------------------------------------------


class Settings:
    """As a configuration of transformers."""

    def __init__(self) -> None:
        self.hidden_size, self.rates, self.id2label = 8, (0.5, 2), {0: "cat", 1: "dog"}
        self._path, self.module, self.nested, self.dtype = "/secret", torch, {"deep": [1, "a"]}, torch.float16

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Configured(nn.Module):
    def __init__(self, config: object) -> None:
        super().__init__()
        self.config, self.size, self.shape, self.scale, self.none = config, 3, (1, 2), 0.5, None
        self.token, self.bad, self._hidden, self.engine, self.names = "secret", float("nan"), 1, 7, ["a"]
        self.dtype = torch.float32
        self.linear, self.block, self.empty = nn.Linear(2, 2), nn.Sequential(nn.Tanh()), nn.Tanh()
        self.block.linear = nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)

    @property
    def broken(self) -> int:
        raise ValueError


X = torch.ones(1, 2)


def test_attributes_of_the_model(tmp_path: Path) -> None:
    built = torch_rtx.compile(Configured(Settings()), (X,))
    buffer = io.BytesIO()
    torch.save(built, buffer)
    buffer.seek(0)
    copies = [built, through_file(built, tmp_path), copy.deepcopy(built), torch.load(buffer, weights_only=False)]
    for module in copies:
        assert (module.size, list(module.shape), module.scale, module.none) == (3, [1, 2], 0.5, None)
        assert (module.dtype, module.device) == (torch.float32, torch.device("cpu"))
        config = module.config
        assert (config.hidden_size, config["hidden_size"], config.get("more", 1)) == (8, 8, 1)
        assert config.id2label[1] == "dog"
        assert (config.rates, config.nested.deep, config.dtype) == ([0.5, 2], [1, "a"], torch.float16)
        assert set(config) == {"hidden_size", "rates", "id2label", "nested", "dtype"}
        assert isinstance(module.engine, torch_rtx.Engine)  # its own attributes come first
        assert (module.linear.in_features, module.block.linear.out_features) == (2, 3)
        assert "0" not in module.block
        with pytest.raises(AttributeError, match="no 'weight' of its model there"):
            module.linear.weight  # noqa: B018
        with pytest.raises(AttributeError, match="is not an nn.Module"):
            module.get_submodule("linear")
        for name in ("token", "bad", "_hidden", "broken", "names", "training_mode", "empty"):
            with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
                getattr(module, name)
        assert not hasattr(config, "_path")
    assert b"secret" not in (tmp_path / "model.rtx").read_bytes()
    copies[1].size = 4
    assert (copies[1].size, built.size) == (4, 3)


@pytest.mark.parametrize("config", [None, 3, "text", Settings, {"a": {1: {"": 2}}}, [1]])
def test_other_configurations(config: object, tmp_path: Path) -> None:
    module = through_file(torch_rtx.compile(Configured(config), (X,)), tmp_path)
    if isinstance(config, dict):
        assert module.config == {"a": {1: {}}}
    else:
        assert getattr(module, "config", None) is None


def test_a_model_without_attributes(pair: tuple[nn.Module, CompiledModule]) -> None:
    for name in ("config", "dtype", "relu"):
        with pytest.raises(AttributeError, match=f"'CompiledModule' object has no attribute '{name}'"):
            getattr(pair[1], name)
    with pytest.raises(AttributeError, match="no attribute 'conv'"):  # nor before it is initialized
        CompiledModule.__new__(CompiledModule).conv  # noqa: B018


DAMAGED: list[Any] = [
    *({"": value} for value in ("no dtype", "Tensor", 1, None, [1], [[1]], [["a", 1, 2]], [[[], 1]], [[1.5, 1]])),
    {"": "float16", "more": 1},
    [{"a": {"": {}}}],
    eval("[" * 40 + "]" * 40),
]


@pytest.mark.parametrize("value", DAMAGED, ids=repr)
def test_damaged_attributes(value: Any, tmp_path: Path) -> None:
    engine = torch_rtx.compile(Configured({}), (X,)).engine
    path = forge(tmp_path / "a.rtx", lambda p: p["manifest"]["model"]["attributes"].update(config=value), what=engine)
    with pytest.raises(EngineFormatError, match="an attribute of the model is damaged"):
        torch_rtx.load(path)


def test_a_file_can_not_replace_what_an_engine_does(tmp_path: Path) -> None:
    """Names that the module has itself stay its own."""
    names = ("forward", "session", "engine", "refit", "training", "register_forward_hook", "half")
    engine = torch_rtx.compile(Configured({}), (X,)).engine
    change = dict.fromkeys(names, 1)
    path = forge(tmp_path / "a.rtx", lambda p: p["manifest"]["model"]["attributes"].update(change), what=engine)
    module = torch_rtx.load(path)
    assert all(getattr(module, name) != 1 for name in names)


def test_too_many_attributes() -> None:
    module = torch_rtx.compile(Configured({str(number): "x" * 100 for number in range(5000)}), (X,))
    assert not hasattr(module, "config")
    assert not hasattr(module, "size")


def test_too_many_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own attributes matter more."""
    found = attributes.facts_of(Configured({}), ())["attributes"]
    monkeypatch.setattr(attributes, "MAX_BYTES", len(json.dumps(found)) - 1)
    kept = attributes.facts_of(Configured({}), ())["attributes"]
    assert kept == {name: found[name] for name in found.keys() - {"linear", "block"}}
