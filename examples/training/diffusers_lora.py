"""LoRA on the UNet of a diffusion model, as diffusers' training scripts do it; needs diffusers, peft and accelerate.

    python examples/training/diffusers_lora.py

The scripts themselves need no change:
`accelerate launch -m torch_rtx.integrations.accelerate train_text_to_image_lora.py --its-arguments`.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig

import torch_rtx.integrations.accelerate  # noqa: F401  makes `rtx` a name that Accelerate takes


def train(backend: str | None) -> list[float]:
    """The loss of each step of a tiny UNet whose own weights are frozen."""
    torch.manual_seed(0)
    accelerator = Accelerator(dynamo_backend=backend, cpu=not torch.cuda.is_available())
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    layers = [p for p in unet.parameters() if p.requires_grad]
    unet, optimizer = accelerator.prepare(unet, torch.optim.AdamW(layers, lr=1e-2))
    noising = DDPMScheduler(num_train_timesteps=1000)
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8)
    noise, times = torch.randn_like(latents), torch.tensor([10, 500])
    noisy = noising.add_noise(latents, noise, times)
    noisy, times, text, noise = (tensor.to(accelerator.device) for tensor in (noisy, times, text, noise))
    losses = []
    for _ in range(3):
        with accelerator.accumulate(unet):
            loss = torch.nn.functional.mse_loss(unet(noisy, times, text, return_dict=False)[0], noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(layers, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("losses:", *(f"{loss:.4f}" for loss in train("rtx")))
