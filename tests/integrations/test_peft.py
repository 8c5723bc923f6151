"""Adapters of PEFT are merged beside the model's own weights. Calls are not compiled here, and equal those of PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from peft.utils.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap  # noqa: E402

import torch_rtx  # noqa: E402
from torch_rtx.integrations.peft import MergedAdapters, merged  # noqa: E402
from torch_rtx.runtime.watch import Watch  # noqa: E402


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.flat = nn.Conv2d(2, 4, 3, padding=1), nn.Flatten()
        self.blocks = nn.ModuleList(nn.Linear(16, 16, bias=index > 0) for index in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.flat(self.conv(x))
        for block in self.blocks:
            x = block(x).sin() + x
        return x


X = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
LAYERS = ["conv", "blocks.0", "blocks.1"]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def add(model: nn.Module, name: str, layers: list[str] = LAYERS, rank: int = 2, **config: Any) -> None:
    """Add an adapter of random weights, and make it the active one."""
    given = {"r": rank, "lora_alpha": 2 * rank, "init_lora_weights": False, "target_modules": layers, **config}
    peft.inject_adapter_in_model(peft.LoraConfig(**given), model, name)
    activate(model, name)


def tuners(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def activate(model: nn.Module, *names: str, scale: float = 1.0) -> None:
    for tuner in tuners(model):
        tuner.set_adapter([*names])
        for name in names:
            if name in tuner.scaling:
                tuner.set_scale(name, scale)


def call(adapters: MergedAdapters, model: nn.Module, scale: float = 1.0) -> torch.Tensor:
    def run() -> torch.Tensor:
        assert not tuners(model)
        return model(X)

    adapters.update(scale)
    return adapters.run(run, scale)


def state(model: nn.Module) -> list[tuple[str, int, torch.Tensor]]:
    return [(name, id(p), p.clone()) for name, p in [*model.named_parameters(), *model.named_buffers()]]


@pytest.mark.quick
def test_every_way_to_change_adapters() -> None:
    """Each gives what PEFT's own layers do; the weights that calls meet stay where they are."""
    model, log = Net().eval(), list[torch.Tensor]()
    adapters, plain = MergedAdapters(model), model(X)
    assert not adapters.update()

    def check() -> None:
        before, expected = state(model), model(X)
        result = call(adapters, model)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(before, state(model), strict=True))
        log.append(result)

    add(model, "one")
    check()
    places = [own.data_ptr() for own in adapters.weights()]
    add(model, "two", rank=3)
    check()
    activate(model, "one")
    check()
    assert torch.equal(log[-1], log[0])
    assert not torch.equal(log[1], log[0])
    add(model, "three", ["blocks.0"], use_rslora=True)  # not in all layers
    check()
    activate(model, "one", "three", scale=0.5)
    check()
    for tuner in tuners(model):
        tuner.enable_adapters(False)
    check()
    assert torch.equal(log[-1], plain)
    for tuner in tuners(model):
        tuner.enable_adapters(True)
    activate(model, "one")
    check()
    assert torch.equal(log[-1], log[0])
    for tuner in tuners(model):
        tuner.merge()  # as fuse_lora
    check()
    for tuner in tuners(model):
        tuner.unmerge()
    check()
    for tuner in tuners(model):
        tuner.delete_adapter("two")
    check()
    assert [own.data_ptr() for own in adapters.weights()] == places


def test_all_adapters_are_removed() -> None:
    model = Net().eval()
    adapters, plain = MergedAdapters(model), model(X)
    add(model, "one")
    assert adapters.update()
    for name in LAYERS:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, model.get_submodule(name).base_layer)
    assert not adapters.update()
    assert not adapters.weights()
    assert torch.equal(call(adapters, model), plain)


@pytest.mark.parametrize("late", [False, True], ids=["before", "beside"])
@pytest.mark.parametrize("padded", [False, True])
def test_hotswap(padded: bool, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes through `.data`, also to scales where these are tensors. On a device values are compared beside the
    call, which then runs again."""
    monkeypatch.setattr("torch_rtx.integrations.peft.Watch", partial(Watch, beside=late))
    calls = list[torch.Tensor]()
    monkeypatch.setattr(Net, "forward", lambda net, x, own=Net.forward: (calls.append(x), own(net, x))[1])
    other = Net().eval()
    add(other, "one", rank=4 if padded else 2, lora_alpha=5)
    swapped = {name: tensor for name, tensor in other.state_dict().items() if "lora_" in name}
    config = other.peft_config["one"]
    model = Net().eval()
    plain = model(X)
    adapters = MergedAdapters(model)
    add(model, "one")
    if padded:
        prepare_model_for_compiled_hotswap(model, target_rank=4, config=model.peft_config["one"])
    before = call(adapters, model)
    hotswap_adapter_from_state_dict(model, swapped, "one", config)
    calls.clear()
    result = call(adapters, model)
    assert len(calls) == 1 + late
    assert not torch.equal(result, before)
    torch.testing.assert_close(result, model(X), rtol=1e-4, atol=1e-4)
    assert torch.equal(call(adapters, model), result)
    hotswap_adapter_from_state_dict(model, {n: t * 0.5 for n, t in swapped.items()}, "one", config)
    add(model, "two")  # the tensors that are compared are others as well
    activate(model, "one", scale=1.0)
    torch.testing.assert_close(call(adapters, model), model(X), rtol=1e-4, atol=1e-4)
    hotswap_adapter_from_state_dict(model, swapped, "one", config)
    adapters.suspected = True  # then the call is the only one
    calls.clear()
    assert torch.equal(call(adapters, model), result)
    assert len(calls) == 1
    for tuner in tuners(model):
        tuner.enable_adapters(False)
    assert torch.equal(call(adapters, model), plain)  # nothing was written to the model's own weights


def test_nothing_is_compared_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_rtx.integrations.peft.Watch", partial(Watch, beside=True))
    model = Net().eval()
    add(model, "one")
    adapters = MergedAdapters(model)
    before = call(adapters, model)
    CHANGES["adapter through data"](tuners(model)[1])
    with monkeypatch.context() as patch:
        patch.setattr("torch_rtx.integrations.peft.captures", lambda device: True)
        adapters.suspected = True
        assert torch.equal(call(adapters, model), before)
    assert not torch.equal(call(adapters, model), before)


def base(tuner: Any) -> torch.Tensor:
    return tuner.base_layer.weight


CHANGES: dict[str, Callable[[Any], object]] = {
    "in place": lambda tuner: base(tuner).mul_(2),
    "through data": lambda tuner: base(tuner).data.mul_(2),
    "other memory": lambda tuner: setattr(base(tuner), "data", base(tuner) * 2),
    "other parameter": lambda tuner: setattr(tuner.base_layer, "weight", nn.Parameter(base(tuner) * 2)),
    "other dtype": lambda tuner: tuner.double().float(),
    "adapter in place": lambda tuner: tuner.lora_A["one"].weight.add_(1),
    "adapter through data": lambda tuner: tuner.lora_B["one"].weight.data.add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_change(change: str) -> None:
    model = Net().eval()
    add(model, "one")
    adapters = MergedAdapters(model)
    call(adapters, model)
    CHANGES[change](tuners(model)[1])
    torch.testing.assert_close(call(adapters, model), model(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True, "target_modules": ["conv", "blocks.1"]}])
def test_other_adapters(config: dict[str, Any]) -> None:
    model = Net().eval()
    add(model, "one", **config)
    adapters = MergedAdapters(model)
    first = call(adapters, model)
    torch.testing.assert_close(first, model(X), rtol=1e-4, atol=1e-4)
    places = [own.data_ptr() for own in adapters.weights()]
    activate(model, "one", scale=0.5)
    torch.testing.assert_close(call(adapters, model), model(X), rtol=1e-4, atol=1e-4)
    activate(model, "one", scale=1.0)
    assert torch.equal(call(adapters, model), first)
    assert [own.data_ptr() for own in adapters.weights()] == places


def test_a_scale_of_all_adapters() -> None:
    model = Net().eval()
    add(model, "one")
    adapters = MergedAdapters(model)
    first, scaling = call(adapters, model), [dict(tuner.scaling) for tuner in tuners(model)]
    scaled = call(adapters, model, 0.3)
    activate(model, "one", scale=0.3)
    torch.testing.assert_close(scaled, model(X), rtol=1e-4, atol=1e-4)
    activate(model, "one")
    assert [tuner.scaling for tuner in tuners(model)] == scaling
    assert torch.equal(call(adapters, model), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_weights_are_as_exact_as_layers_of_peft(dtype: torch.dtype) -> None:
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(3)))
    for name in ("one", "two"):
        add(model, name, ["0", "1", "2"], rank=8)
    activate(model, "one", "two", scale=0.5)
    model, x = model.to(dtype), torch.randn(64, 128).to(dtype)
    adapters, exact = MergedAdapters(model), copy.deepcopy(model).double()(x.double())
    adapters.update()
    with adapters.hidden():
        result = model(x)
    error, eager = ((each.double() - exact).square().mean().sqrt() for each in (result, model(x)))
    assert error <= 1.5 * eager


def test_only_what_changed_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    model, merges = Net().eval(), list[str]()
    add(model, "one")
    adapters = MergedAdapters(model)
    adapters.update()
    kind = type(adapters._layers[0])
    merge = kind.merge
    monkeypatch.setattr(kind, "merge", lambda layer, scale: (merges.append(layer._name), merge(layer, scale)))
    adapters.update()
    assert merges == []
    tuners(model)[1].set_scale("one", 0.5)
    adapters.update()
    tuners(model)[2].lora_A["one"].weight.mul_(2)
    adapters.update()
    assert merges == ["0", "1"]


def test_a_failure_leaves_everything_to_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net().eval()
    add(model, "one")
    adapters = MergedAdapters(model)
    call(adapters, model)
    for tuner in tuners(model):
        tuner.lora_A["one"].weight.data.add_(1)

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(tuners(model)[0], "merge", fail)
        with pytest.raises(torch.OutOfMemoryError):
            adapters.update()
    assert [tuner.merged for tuner in tuners(model)] == [False] * 3
    torch.testing.assert_close(call(adapters, model), model(X), rtol=1e-4, atol=1e-4)


def test_layers_that_are_not_merged() -> None:
    """Weights of fewer bits than merging needs, and layers of PEFT around others of PEFT."""
    model = Net().eval()
    add(model, "one")
    tuners(model)[1].base_layer.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
    adapters = MergedAdapters(model)
    adapters.update()
    with adapters.hidden():
        assert tuners(model) == [model.blocks[0]]


class Divided(nn.Linear):
    """A layer with parts, as quantized ones are: it is not merged."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.part = nn.Identity()


def test_layers_that_are_not_merged_have_the_scale_of_all_adapters() -> None:
    model = Net().eval()
    model.blocks[0] = Divided()
    add(model, "one")
    adapters, scaling = MergedAdapters(model), [dict(tuner.scaling) for tuner in tuners(model)]
    assert adapters.update(0.3)
    with adapters.hidden(0.3):
        scaled = model(X)
    assert [tuner.scaling for tuner in tuners(model)] == scaling
    activate(model, "one", scale=0.3)
    torch.testing.assert_close(scaled, model(X), rtol=1e-4, atol=1e-4)


def test_layers_that_peft_can_not_merge(caplog: pytest.LogCaptureFixture) -> None:
    """They run themselves, and those that it can merge do not."""
    model = Net().eval()
    add(model, "one", ["blocks.0", "blocks.1"], lora_bias=True)  # the first has no bias
    adapters = MergedAdapters(model)
    for _ in range(2):
        adapters.update()
        with adapters.hidden():
            assert tuners(model) == [model.blocks[0]]
            found = model(X)
        torch.testing.assert_close(found, model(X), rtol=1e-4, atol=1e-4)
        for tuner in tuners(model):
            tuner.lora_A["one"].weight.mul_(2)
    assert caplog.text.count("around '0' is not merged") == 1


def test_adapters_that_are_another_layer() -> None:
    """PEFT merges them by an exchange: the model has its own layer again afterwards."""
    model = Net().eval()
    peft.inject_adapter_in_model(peft.LNTuningConfig(target_modules=["blocks.0"]), model, "one")
    (tuner,), plain = tuners(model), model.blocks[0].base_layer
    tuner.ln_tuning_layers["one"].weight.data.mul_(3)
    adapters = MergedAdapters(model)
    for _ in range(2):
        torch.testing.assert_close(call(adapters, model), model(X))
        assert (tuner.base_layer, tuner.merged) == (plain, False)
        tuner.ln_tuning_layers["one"].weight.data.mul_(2)


def test_an_engine_takes_merged_weights() -> None:
    """Without them, it would compute as if there were no adapters."""
    model = Net().eval()
    engine = torch_rtx.compile(model, (X,))
    plain = engine(X)
    add(model, "one")
    for take in (engine.refit, engine.attach):
        with pytest.raises(torch_rtx.RefitError, match="conv.weight: a Conv2d is around it.*peft.merged"):
            take(model)
    assert torch.equal(engine(X), plain)
    with merged(model) as same:
        engine.refit(same)
    torch.testing.assert_close(engine(X), model(X), rtol=1e-4, atol=1e-4)
    assert len(tuners(model)) == 3


def test_an_engine_takes_the_weights_of_a_peft_model() -> None:
    """Whose names are others than those of the model that the engine is of."""
    model = Net().eval()
    engine = torch_rtx.compile(model, (X,))
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=LAYERS)
    wrapped = peft.get_peft_model(model, config).eval()
    with merged(wrapped) as plain:
        assert plain is model
        engine.refit(plain)
    torch.testing.assert_close(engine(X), wrapped(X), rtol=1e-4, atol=1e-4)


def test_nothing_of_peft_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "peft.tuners.tuners_utils")
    assert not MergedAdapters(Net()).update()
