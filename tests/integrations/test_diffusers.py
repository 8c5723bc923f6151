"""Pipelines of diffusers with tiny models draw what they draw in eager mode, and LoRAs compile nothing."""

from __future__ import annotations

import copy
import inspect
import io
import random
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import torch_rtx
from torch_rtx.errors import InputError, IntegrationError, RefitError, SettingsError

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from tests.integrations.pipelines import TEXT, flux, images, lora, sdxl
from torch_rtx.backend.sessions import release
from torch_rtx.integrations.diffusers import Accelerated, accelerate
from torch_rtx.integrations.peft import _Layer
from torch_rtx.integrations.sizes import compiled
from torch_rtx.runtime.session import Session
from torch_rtx.runtime.watch import Watch
from torch_rtx.runtime.weights import WeightStore

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and PEFT


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def pair(files: Path) -> Iterator[tuple[Any, Any, Accelerated]]:
    """A pipeline in eager mode, and its copy, whose models are compiled once for all tests. Adapters are compared
    beside calls, as on a GPU."""
    torch._dynamo.reset()
    pipe = sdxl(files)
    eager = type(pipe)(**{name: copy.deepcopy(one) for name, one in pipe.components.items()}, add_watermarker=False)
    eager.set_progress_bar_config(disable=True)
    eager.tiny_call = pipe.tiny_call
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), accelerate(pipe) as accelerated:
        patch.setattr("torch_rtx.integrations.peft.Watch", partial(Watch, beside=True))
        images(pipe)
        yield eager, pipe, accelerated
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


def test_everything_that_pays_is_compiled(pair: tuple[Any, Any, Accelerated]) -> None:
    eager, pipe, accelerated = pair
    before = graphs()
    close(images(pipe, steps=2), images(eager, steps=2))
    assert graphs() == before
    assert set(accelerated.components) == {"unet", "text_encoder", "text_encoder_2", "vae.decoder", "vae.encoder"}
    assert accelerate(pipe).components == []  # nothing is left to do
    twin = copy.deepcopy(pipe.unet)
    assert type(twin.forward).__name__ == "method"
    assert twin.forward.__self__ is twin
    assert inspect.signature(pipe.unet.forward) == inspect.signature(twin.forward)  # some pipelines read it


def test_forty_sizes_have_two_graphs(pair: tuple[Any, Any, Accelerated]) -> None:
    """Also if another height comes first, and another width later."""
    eager, pipe, _ = pair
    draw, before = random.Random(0), graphs()
    more = {"text_embeds": torch.randn(2, TEXT), "time_ids": torch.randn(2, 6)}
    text, sides = torch.randn(2, TEXT, 2 * TEXT), [(8, 8), (8, 12), (12, 8), (8, 8)]
    for height, width in [*sides, *((draw.randint(4, 16), draw.randint(4, 16)) for _ in range(36))]:
        given = torch.randn(2, 4, height, width), torch.tensor(7.0), text
        close(*(one.unet(*given, added_cond_kwargs=more).sample for one in (pipe, eager)))
    assert graphs() <= before + 2


def test_views_have_no_graph_of_their_own() -> None:
    """The noise that a pipeline begins with may be one, and what a scheduler makes of it is none."""
    run, before = compiled(torch.sin), graphs()
    for length in (3, 4, 5):
        noise = torch.randn(2, length, 2).permute(0, 2, 1)
        for given in (noise, noise.clone(), noise):
            close(run(given), given.sin())
    assert graphs() == before + 2


def test_autoencoder_whole_and_in_tiles(pair: tuple[Any, Any, Accelerated]) -> None:
    eager, pipe, _ = pair
    latent = torch.randn(1, 4, 12, 9)
    for tiled in (True, False):
        for vae in (pipe.vae, eager.vae):
            vae.use_tiling = tiled
        close(*(one.vae.decode(latent).sample for one in (pipe, eager)))


def test_adapters_compile_nothing(pair: tuple[Any, Any, Accelerated], tmp_path: Path) -> None:
    """By every way of diffusers; the same adapters give the same image, bit for bit."""
    eager, pipe, _ = pair
    before, plain = graphs(), images(pipe)
    paths = [lora(eager, tmp_path, 1), lora(eager, tmp_path, 2), lora(eager, tmp_path, 3, 4, ("to_k", "conv1"))]

    def both(*names: str, weights: list[float] | None = None, **kwargs: Any) -> torch.Tensor:
        for one in (eager, pipe):
            one.set_adapters([*names], weights)
        result = images(pipe, **kwargs)
        close(result, images(eager, **kwargs))
        return result

    for one in (eager, pipe):
        for name, path in zip(("first", "second", "third"), paths, strict=True):
            one.load_lora_weights(path, adapter_name=name)
    first = both("first")
    assert not torch.equal(first, plain)
    second = both("second")
    both("first", "third", weights=[0.5, 0.25])
    half = both("first", weights=[0.5])
    close(both("first", weights=[1.0], cross_attention_kwargs={"scale": 0.5}), half)
    assert torch.equal(both("second"), second)
    assert torch.equal(both("first"), first)
    for one in (eager, pipe):
        one.fuse_lora(adapter_names=["first"], lora_scale=0.5)
    close(images(pipe), images(eager))
    for one in (eager, pipe):
        one.unfuse_lora()
        one.load_lora_weights(paths[1], adapter_name="first", hotswap=True)
    assert pipe.unet.forward._adapters.suspected  # so that the next call runs once
    close(both("first"), second)  # `unfuse_lora` rounds
    for one in (eager, pipe):
        one.delete_adapters("third")
        one.disable_lora()
    close(images(pipe), plain)
    for one in (eager, pipe):
        one.unload_lora_weights()
    close(images(pipe), plain)
    assert graphs() == before


def test_faults_leave_the_pipeline_usable(pair: tuple[Any, Any, Accelerated], tmp_path: Path) -> None:
    _, pipe, _ = pair
    before, plain = graphs(), images(pipe)
    good, other, wide = lora(pipe, tmp_path, 1), lora(pipe, tmp_path, 2, 2, ("conv1",)), lora(pipe, tmp_path, 3, 4)
    damaged = tmp_path / "damaged.safetensors"
    file = next(Path(good).iterdir())
    damaged.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OSError, match="Unable to load weights"):
        pipe.load_lora_weights(str(tmp_path), weight_name=damaged.name, adapter_name="damaged")
    assert torch.equal(images(pipe), plain)
    pipe.load_lora_weights(good, adapter_name="good")
    assert not torch.equal(images(pipe), plain)
    with pytest.raises(RuntimeError, match="unexpected keys"):
        pipe.load_lora_weights(other, adapter_name="good", hotswap=True)  # other layers: diffusers removes the adapter
    assert torch.equal(images(pipe), plain)
    pipe.load_lora_weights(good, adapter_name="good")
    pipe.load_lora_weights(wide, adapter_name="good", hotswap=True)  # another rank
    swapped = images(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(wide, adapter_name="good")
    close(images(pipe), swapped)
    pipe.unload_lora_weights()
    with pytest.raises(ValueError, match="divisible by"):
        images(pipe, 9)
    assert torch.equal(images(pipe), plain)
    assert graphs() == before


def test_no_memory_in_the_middle(
    pair: tuple[Any, Any, Accelerated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is missed: the error is PyTorch's own, and the next call draws as ever."""
    _, pipe, _ = pair
    before, plain = graphs(), images(pipe)
    pipe.load_lora_weights(lora(pipe, tmp_path, 1), adapter_name="one")
    adapted = images(pipe)
    for kind, name, skipped in ((Session, "run", 5), (WeightStore, "_attach", 0), (_Layer, "_add", 2)):
        original, left = getattr(kind, name), skipped

        def full(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise torch.OutOfMemoryError("full")
            return _original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(kind, name, full)
            pipe.set_adapters("one", 0.5)  # other weights, so that they are merged anew
            release(pipe.unet.parameters())
            with pytest.raises(torch.OutOfMemoryError, match="full"):
                images(pipe, steps=2)
        pipe.set_adapters("one", 1.0)
        assert torch.equal(images(pipe), adapted)
    pipe.unload_lora_weights()
    assert torch.equal(images(pipe), plain)
    assert graphs() == before


def test_adapters_change_in_another_thread(pair: tuple[Any, Any, Accelerated], tmp_path: Path) -> None:
    """What is done to them during a call counts from the next one on."""
    _, pipe, _ = pair
    pipe.load_lora_weights(lora(pipe, tmp_path), adapter_name="one")
    forward, started = pipe.unet.forward, threading.Event()
    run, latents = forward._run, []

    def slow(*args: Any, **kwargs: Any) -> Any:
        started.set()
        thread.join(0.1)
        assert thread.is_alive()  # waits for the end of the call
        latents.append(run(*args, **kwargs)[0])
        return (latents[-1],)

    thread = threading.Thread(target=lambda: started.wait() and pipe.set_adapters("one", 0.25))
    forward._run = slow
    try:
        thread.start()
        images(pipe)
    finally:
        forward._run = run
        thread.join()
    changed = images(pipe)
    pipe.set_adapters("one", 0.25)
    assert torch.equal(images(pipe), changed)
    pipe.set_adapters("one", 1.0)
    assert not torch.equal(images(pipe), changed)
    pipe.unload_lora_weights()


def test_an_engine_in_the_place_of_the_denoiser(pair: tuple[Any, Any, Accelerated], tmp_path: Path) -> None:
    """As a component of the pipeline it has what the pipeline reads; in `accelerate` it has the adapters as well."""
    eager, _, _ = pair
    plain, unet, calls = images(eager), eager.unet, []
    with unet.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True):
        images(eager)
    (args, kwargs) = calls[0]
    assert None in kwargs.values()
    file = io.BytesIO()
    torch_rtx.save(torch_rtx.compile(unet, args, kwargs), file)

    def load(**given: Any) -> torch_rtx.CompiledModule:
        file.seek(0)
        return torch_rtx.load(file, **given)

    try:
        eager.unet = load(weights=unet)
        close(images(eager), plain)
        with pytest.raises(InputError, match="dimension 2 of input 'sample' is 16, the engine was built for 8"):
            images(eager, 16)
    finally:
        eager.unet = unet
    path = lora(eager, tmp_path)
    eager.load_lora_weights(path, adapter_name="one")
    changed = images(eager)
    eager.unload_lora_weights()
    engine = load()
    with accelerate(eager, ["unet"], engines={"unet": engine}):
        first = images(eager)
        eager.load_lora_weights(path, adapter_name="one")
        close(images(eager), changed)
        eager.unload_lora_weights()
        assert torch.equal(images(eager), first)
    assert "forward" not in vars(unet)
    with pytest.raises(RefitError, match="missing"):
        accelerate(eager, [], engines={"text_encoder": engine})
    assert "forward" not in vars(eager.text_encoder)


def test_undo(files: Path) -> None:
    """Also around hooks that were put on meanwhile, and for blocks alone, which share one graph per kind."""
    pipe = flux(files)
    plain, before = images(pipe), graphs()
    trained = [p.requires_grad for p in pipe.transformer.parameters()]
    pipe.transformer.compile(backend="rtx")
    compiled = pipe.transformer._compiled_call_impl
    with accelerate(pipe, ["transformer"], repeated_blocks=True) as accelerated:
        close(images(pipe), plain)
        assert graphs() == before + 2
        assert repr(accelerated) == "Accelerated(transformer)"
        inner = pipe.transformer.forward
        pipe.transformer._old_forward, pipe.transformer.forward = inner, lambda *args, **kwargs: inner(*args, **kwargs)
    assert pipe.transformer._old_forward.__func__ is type(pipe.transformer).forward
    assert pipe.transformer._compiled_call_impl is compiled
    pipe.transformer._compiled_call_impl = None
    assert all(module._compiled_call_impl is None for module in pipe.transformer.modules())
    assert [p.requires_grad for p in pipe.transformer.parameters()] == trained
    assert torch.equal(images(pipe), plain)
    accelerated.undo()


def test_training_goes_by_the_layers_of_peft(pair: tuple[Any, Any, Accelerated], tmp_path: Path) -> None:
    _, pipe, _ = pair
    pipe.load_lora_weights(lora(pipe, tmp_path), adapter_name="one")
    forward = pipe.unet.forward
    run, seen = forward._run, []
    forward._run = lambda *args, **kwargs: seen.append(any("lora" in n for n, _ in pipe.unet.named_modules()))
    try:
        with torch.enable_grad():
            pipe.unet(None)
        pipe.unet(None)
    finally:
        forward._run = run
        pipe.unload_lora_weights()
    assert seen == [True, False]


def test_a_walk_through_layers_that_a_call_comes_between(pair: tuple[Any, Any, Accelerated], tmp_path: Path) -> None:
    """It goes through the layers of PEFT, and takes no longer than it is asked for."""
    _, pipe, _ = pair
    pipe.load_lora_weights(lora(pipe, tmp_path), adapter_name="one")
    expected = [*pipe.unet.named_modules()]
    walk = pipe.unet.named_modules()
    begun = [next(walk), next(walk)]
    forward = pipe.unet.forward
    run, found = forward._run, list[list[Any]]()
    forward._run = lambda *args, **kwargs: found.extend(([*walk], [*pipe.unet.named_modules()]))
    try:
        pipe.unet(None)
    finally:
        forward._run = run
        pipe.unload_lora_weights()
    rest, hidden = found
    assert begun + rest == expected
    assert len(hidden) < len(expected)
    assert next(pipe.unet.parameters()) is pipe.unet.conv_in.weight
    assert [*forward._walks] == [walk]  # nobody has another one


def test_no_pipeline_and_no_such_model(pair: tuple[Any, Any, Accelerated]) -> None:
    with pytest.raises(IntegrationError, match="a Linear is no pipeline of diffusers\n.*model.compile"):
        accelerate(nn.Linear(1, 1))
    with pytest.raises(SettingsError, match="the pipeline has no model 'transformer'\n.*vae.decoder.*unet"):
        accelerate(pair[0], ["transformer"])
    with pytest.raises(SettingsError, match="no engine can be for vae\n.*vae.decoder"):
        accelerate(pair[0], [], engines={"vae": None})  # type: ignore[dict-item]
