"""Pipelines of every kind on a GPU, with tiny models: as in eager mode, at other sizes, with LoRAs, from threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.integrations.pipelines import PIPELINES, TEXT, denoiser, images, lora, sd15, sdxl
from torch_rtx.integrations.diffusers import accelerate

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("fresh_dynamo")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


# Of pipelines that draw no others.
SIZES = {"controlnet": (16,), "ltx": (32, 64, 96, 32)}


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize("name", PIPELINES)
def test_sizes_and_adapters(name: str, blocks: bool, tmp_path: Path) -> None:
    """Sizes are compiled for at most twice, adapters for never."""
    pipe = PIPELINES[name](tmp_path).to(DEVICE)
    sizes = SIZES.get(name, (16, 24, 32, 40, 16))
    paths = [lora(pipe, tmp_path, seed) for seed in (1, 2)]
    expected = [images(pipe, size) for size in sizes]
    adapted = []
    for path in paths:
        pipe.load_lora_weights(path, adapter_name="one")
        adapted.append([images(pipe, size) for size in sizes])
        pipe.unload_lora_weights()
    counters.clear()
    with accelerate(pipe, repeated_blocks=blocks, dynamic=None) as accelerated:
        for size, plain in zip(sizes, expected, strict=True):
            close(images(pipe, size), plain)
        assert graphs() <= 3 * len(accelerated.components) + 2 * blocks
        before = graphs()
        for path, results in [*zip(paths, adapted, strict=True)] * 2:
            pipe.load_lora_weights(path, adapter_name="one")
            for size, result in zip(sizes, results, strict=True):
                close(images(pipe, size), result)
            pipe.unload_lora_weights()
        for hotswap, (path, results) in enumerate([*zip(paths, adapted, strict=True)] * 2):
            pipe.load_lora_weights(path, adapter_name="one", hotswap=bool(hotswap))
            close(images(pipe, sizes[0]), results[0])
        pipe.unload_lora_weights()
        for size, plain in zip(sizes, expected, strict=True):
            close(images(pipe, size), plain)
        assert graphs() == before


def test_tiles(tmp_path: Path) -> None:
    """An autoencoder decodes whole images and tiles."""
    pipe = sd15(tmp_path).to(DEVICE)
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 16, 16
    latents = torch.randn(1, 4, 24, 40, device=DEVICE)
    expected = []
    for tiled in (False, True):
        pipe.vae.use_tiling = tiled
        expected.append(pipe.vae.decode(latents).sample)
    with accelerate(pipe, ["vae"]):
        for tiled in (False, True, False):
            pipe.vae.use_tiling = tiled
            close(pipe.vae.decode(latents).sample, expected[tiled])


def test_ip_adapter(tmp_path: Path) -> None:
    """It replaces processors of attention after the UNet was compiled."""
    pipe = sd15(tmp_path)
    pipe.image_encoder = None
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=TEXT))
    pipe.register_modules(image_encoder=encoder.eval())
    pipe.to(DEVICE)
    torch.manual_seed(0)
    keys = [name for name in pipe.unet.attn_processors if "attn2" in name]
    weights = {
        "image_proj": {
            "proj.weight": torch.randn(4 * TEXT, TEXT),
            "proj.bias": torch.randn(4 * TEXT),
            "norm.weight": torch.ones(TEXT),
            "norm.bias": torch.zeros(TEXT),
        },
        "ip_adapter": {
            f"{2 * index + 1}.to_{part}_ip.weight": torch.randn(8, TEXT) for index in range(len(keys)) for part in "kv"
        },
    }
    embeds = [torch.randn(2, 1, TEXT, device=DEVICE)]
    twin = copy.deepcopy(pipe)
    twin.tiny_call = pipe.tiny_call
    plain = images(pipe)
    with accelerate(pipe):
        close(images(pipe), plain)
        results = []
        for one in (twin, pipe):
            one.unet._load_ip_adapter_weights([weights])
            one.set_ip_adapter_scale(0.7)
            results.append(images(one, ip_adapter_image_embeds=embeds))
            one.set_ip_adapter_scale(0.2)
            results.append(images(one, ip_adapter_image_embeds=embeds))
        close(results[2], results[0])
        close(results[3], results[1])
        assert not torch.equal(results[2], results[3])


def test_two_threads_and_many_adapters(tmp_path: Path) -> None:
    """Pipelines that share their models, each in a thread; the adapter in use changes between calls."""
    pipe = sdxl(tmp_path).to(DEVICE)
    names = [f"adapter{index}" for index in range(20)]
    for index, name in enumerate(names):
        pipe.load_lora_weights(lora(pipe, tmp_path, index), adapter_name=name)
    expected = {}
    for name in names:
        pipe.set_adapters(name)
        expected[name] = images(pipe)
    own = {name: copy.deepcopy(pipe.components[name]) for name in ("scheduler", "tokenizer", "tokenizer_2")}
    other = type(pipe)(**{**pipe.components, **own}, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    other.tiny_call = pipe.tiny_call
    turn, problems = threading.Lock(), []

    def work(one: Any, order: list[str]) -> None:
        try:
            with torch.no_grad():
                for name in order * 5:
                    with turn:
                        one.set_adapters(name)
                        result = images(one)
                    close(result, expected[name])
                    images(one)  # with whatever is active
        except BaseException as error:
            problems.append(error)

    with accelerate(pipe):
        images(pipe)
        before = graphs()
        threads = [threading.Thread(target=work, args=a) for a in ((pipe, names), (other, names[::-1]))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert problems == []
        assert graphs() == before


@pytest.mark.parametrize("first", [False, True], ids=["before", "after"])
def test_offloading(first: bool, tmp_path: Path) -> None:
    """Models are moved to the device for their calls; adapters go with them."""
    pipe = sdxl(tmp_path)
    path = lora(pipe, tmp_path)
    if first:
        pipe.enable_model_cpu_offload(device=DEVICE)
    accelerated = accelerate(pipe)
    if not first:
        pipe.enable_model_cpu_offload(device=DEVICE)
    plain = images(pipe)
    pipe.load_lora_weights(path, adapter_name="one")
    changed = images(pipe)
    before = graphs()
    assert torch.equal(images(pipe), changed)
    assert graphs() == before
    pipe.unload_lora_weights()
    assert torch.equal(images(pipe), plain)
    accelerated.undo()
    close(images(pipe), plain)
    pipe.load_lora_weights(path, adapter_name="one")
    close(images(pipe), changed)
    assert denoiser(pipe).forward is not None
