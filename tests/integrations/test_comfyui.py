"""The nodes for ComfyUI draw in a double of it what it draws by itself, whatever it does to weights."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import torch_rtx.integrations.comfyui
from tests.doubles import comfy
from torch_rtx.backend import sessions
from torch_rtx.errors import CaptureError, InputError, IntegrationError, SettingsError
from torch_rtx.integrations.comfyui import engines
from torch_rtx.integrations.comfyui.nodes import CompileModel, UseEngine

TEXT = 5  # tokens of a prompt


@pytest.fixture(autouse=True)
def _in_comfy(tmp_path: Path) -> Iterator[None]:
    """As a node of it is called."""
    with comfy.installed(tmp_path), torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A compiled model, which each test leaves as it is."""
    torch._dynamo.reset()
    with comfy.installed(tmp_path_factory.mktemp("models")), torch.inference_mode():
        (patcher,) = CompileModel().patch(quantized(), "default", "auto")
    yield patcher
    torch._dynamo.reset()


def quantized() -> comfy.ModelPatcher:
    """A model with matrices in float8 that computes in bfloat16."""
    torch.manual_seed(0)
    model = comfy.UNetModel(blocks=1, ops=comfy.scaled_fp8)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data = (4 * parameter).to(torch.float8_e4m3fn)
        if name.endswith("scale_weight"):
            parameter.data.fill_(0.25)
    return comfy.ModelPatcher(comfy.BaseModel(model, torch.bfloat16))


def plain(model: nn.Module | None = None) -> comfy.ModelPatcher:
    torch.manual_seed(0)
    return comfy.ModelPatcher(comfy.BaseModel(comfy.UNetModel(blocks=1) if model is None else model))


def lora(patcher: Any, seed: int) -> Any:
    """A clone with a LoRA."""
    clone, generator = patcher.clone(), torch.Generator().manual_seed(seed)
    state = patcher.model.state_dict()
    keys = [key for key in state if "attn.to_" in key and key.endswith(".weight")]
    sides = [[torch.randn(8, 2, generator=generator), torch.randn(2, 8, generator=generator)] for _ in keys]
    assert clone.add_patches(dict(zip(keys, sides, strict=True)))
    return clone


def sample(patcher: Any, size: int = 8, batch: int = 1, **conds: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, 4, size, size, generator=generator)
    return comfy.sample(patcher, latent, torch.randn(batch, TEXT, 8, generator=generator), **conds)


def without_node(patcher: Any) -> Any:
    clone = patcher.clone()
    clone.remove_wrappers_with_key("apply_model", "torch.compile")
    return clone


def check(patcher: Any, **call: Any) -> Tensor:
    """What is drawn is what the model draws by itself."""
    result = sample(patcher, **call)
    torch.testing.assert_close(result, sample(without_node(patcher), **call), rtol=1e-3, atol=1e-3)
    return result


def control() -> dict[str, list[Tensor]]:
    return {"output": [torch.ones(1, 8, 8, 8, dtype=torch.bfloat16)]}


def sessions_now() -> list[Any]:
    """The sessions of all graphs."""
    found = (ref() for ref in sessions._ALL)
    return [session for one in found if one is not None for session, _ in one._found.values()]


def test_compiled_model_follows_what_comfyui_does(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    others = sessions_now()
    first = check(model)
    graphs = counters["stats"]["unique_graphs"]
    one, two = check(lora(model, 1)), check(lora(model, 2))
    assert not torch.equal(one, two)
    assert torch.equal(check(lora(model, 1)), one)
    assert torch.equal(check(model), first)

    model.detach()  # to the host, and back
    held = [session for session in sessions_now() if not any(session is other for other in others)]
    assert held
    assert not any(session.store.ready for session in held)
    assert torch.equal(check(model), first)
    patched = lora(model, 1)
    patched.weight_inplace_update = True
    assert torch.equal(check(patched), one)
    assert torch.equal(check(model), first)
    (again,) = CompileModel().patch(model, "default", "auto")  # as ComfyUI runs the node again
    assert torch.equal(check(again), first)
    assert counters["stats"]["unique_graphs"] == graphs

    model.partially_unload("cpu")
    with caplog.at_level(logging.INFO, "torch_rtx.comfyui"):
        check(model)
    assert counters["stats"]["unique_graphs"] == graphs
    assert "does not fit into the memory" in caplog.text
    model.detach()
    assert torch.equal(check(model), first)


def test_patches_and_controlnet_are_followed(model: Any) -> None:
    first = check(model)
    other = model.clone()
    other.set_model_attn2_patch(lambda context, options: 2 * context)
    assert not torch.equal(check(other), first)
    assert not torch.equal(check(model, control=control), first)
    assert torch.equal(check(model), first)


def test_tensors_of_comfy_kitchen() -> None:
    """Which are subclasses that dispatch by themselves, and write to a log on the way."""
    pytest.importorskip("comfy_kitchen")
    from comfy_kitchen.tensor import QuantizedTensor

    class Layer(nn.Module):
        def __init__(self, layout: str) -> None:
            super().__init__()
            self.dtype, self.layout = torch.bfloat16, layout
            self.weight = self.drawn(0)

        def drawn(self, seed: int) -> nn.Parameter:
            generator = torch.Generator().manual_seed(seed)
            weight = torch.randn(16, 16, generator=generator).bfloat16()
            return nn.Parameter(QuantizedTensor.from_float(weight, self.layout), requires_grad=False)

        def forward(self, x: Tensor, timesteps: Tensor, **_: Any) -> Tensor:
            tokens = QuantizedTensor.from_float(x.reshape(-1, 16), self.layout)
            return nn.functional.linear(tokens, self.weight).reshape(x.shape)

    for layout in ("TensorCoreFP8Layout", "TensorWiseINT8Layout"):
        (model,) = CompileModel().patch(plain(Layer(layout)), "default", "auto")
        first, graphs = check(model), counters["stats"]["unique_graphs"]
        model.model.diffusion_model.weight = model.model.diffusion_model.drawn(1)
        assert not torch.equal(check(model), first)
        assert counters["stats"]["unique_graphs"] == graphs
        assert not counters["graph_break"]


def test_no_memory_in_the_middle(model: Any) -> None:
    """An error of a step reaches ComfyUI, which unloads models; the next run draws as ever."""
    first, calls = check(model), 0
    again = model.clone()

    def full(executor: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = executor(*args, **kwargs)
        if calls == 2:
            raise torch.OutOfMemoryError("full")
        return result

    again.add_wrapper_with_key("apply_model", "full", full)
    with pytest.raises(torch.OutOfMemoryError):
        sample(again)
    model.detach()
    assert model.model.diffusion_model._compiled_call_impl is None
    assert torch.equal(check(model), first)


def test_weights_that_come_while_they_are_used(caplog: pytest.LogCaptureFixture) -> None:
    """A clone holds its weights where ComfyUI can make one; else the model runs as it would, and the log says so."""
    patcher = comfy.DynamicPatcher(plain().model)
    (model,) = CompileModel().patch(patcher, "default", "auto")
    assert not model.is_dynamic()
    patcher.clone = lambda: comfy.ModelPatcher.clone(patcher)  # type: ignore[method-assign]  # an older ComfyUI
    (model,) = CompileModel().patch(patcher, "default", "auto")
    graphs = counters["stats"]["unique_graphs"]
    check(model)
    assert counters["stats"]["unique_graphs"] == graphs
    assert "--disable-dynamic-vram" in caplog.text


def use(patcher: Any, name: str = "unet") -> Any:
    (model,) = UseEngine().patch(patcher, name, 64, 128, 2, 8)
    return model


def test_engine_in_place_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = use(plain())
    check(model)
    assert (tmp_path / "rtx" / "unet.rtx").exists()
    monkeypatch.setattr(engines, "_built", None)  # from now on nothing is built
    model = use(plain())  # as in the next process
    first, one = check(model, size=16, batch=2), check(lora(model, 1))
    model.detach()
    check(model, size=11)
    assert torch.equal(check(lora(model, 1)), one)
    assert torch.equal(check(model, size=16, batch=2), first)
    with pytest.raises(InputError, match="height"):
        sample(model, size=24)
    other = model.clone()
    other.set_model_attn2_patch(lambda context, options: 2 * context)
    check(other)
    assert "it is changed by patches" in caplog.text

    class Other(comfy.UNetModel):
        def _forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super()._forward(*args, **kwargs)

    with pytest.raises(IntegrationError, match=r"unet\.rtx computes something else"):
        sample(use(plain(Other(blocks=1))))


def test_model_that_looks_at_the_step() -> None:
    class Odd(nn.Module):
        dtype = torch.float32

        def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, transformer_options: Any, **_: Any) -> Tensor:
            return x * transformer_options["sigmas"]

    with pytest.raises(CaptureError, match=r"transformer_options\['sigmas'\]"):
        sample(use(plain(Odd())))


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="is no name of an engine"):
        use(plain(), "../unet")
    with pytest.raises(SettingsError, match="more than max_size"):
        UseEngine().patch(plain(), "unet", 128, 64, 2, 8)
    monkeypatch.setitem(__import__("sys").modules, "comfy.patcher_extension", None)
    with pytest.raises(IntegrationError, match="ComfyUI can't be imported"):
        CompileModel().patch(plain(), "default", "auto")


def test_folder_of_nodes(tmp_path: Path) -> None:
    """A copy of the folder is a package of its own name, as ComfyUI imports it."""
    folder = Path(str(torch_rtx.integrations.comfyui.__file__)).parent
    copied = shutil.copytree(folder, tmp_path / "custom_nodes" / "torch_rtx")
    spec = importlib.util.spec_from_file_location("custom_nodes.torch_rtx", copied / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, node in module.NODE_CLASS_MAPPINGS.items():
        assert module.NODE_DISPLAY_NAME_MAPPINGS[name]
        required = node.INPUT_TYPES()["required"]
        run: Callable[..., Any] = getattr(node, node.FUNCTION)
        assert list(required) == list(run.__code__.co_varnames[1 : run.__code__.co_argcount])
