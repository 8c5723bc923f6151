"""A stand-in for ComfyUI, written from what its interfaces do: how it holds a model, patches, moves and calls it.

`ModelPatcher` and `BaseModel` have the methods and attributes of the same names, as far as the nodes of torch_rtx use
them or meet what they do:

- clones share a model, and each brings its own patches; weights are patched when the model is loaded, each into a
  new parameter, and the old ones are kept for later;
- a model is moved to the device that it runs on and back, whole or layer by layer; what does not fit stays away, and
  its layers bring their weights themselves for each call (`comfy_cast_weights`, `weight_function`);
- weights have another dtype than the computation, and layers cast them (`manual_cast`);
- options that differ from step to step reach the model in a dict, which the model writes to;
- wrappers are called around the model, by their kind and key.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ---- layers that cast their weights ----------------------------------------------------------------------------------


class Cast:
    """What layers of `comfy.ops` have besides those of PyTorch."""

    comfy_cast_weights = False
    weight_function: ClassVar[list[Callable[[Tensor], Tensor]]] = []
    bias_function: ClassVar[list[Callable[[Tensor], Tensor]]] = []

    def cast(self: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias where and as the input is."""
        weight, bias = self.weight.to(x.device, x.dtype), self.bias
        for function in self.weight_function:
            weight = function(weight)
        if bias is not None:
            bias = bias.to(x.device, x.dtype)
            for function in self.bias_function:
                bias = function(bias)
        return weight, bias

    def casts(self) -> bool:
        return self.comfy_cast_weights or len(self.weight_function) > 0 or len(self.bias_function) > 0


class disable_weight_init:
    class Linear(nn.Linear, Cast):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, *self.cast(x)) if self.casts() else super().forward(x)

    class Conv2d(nn.Conv2d, Cast):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, *self.cast(x)) if self.casts() else super().forward(x)

    class GroupNorm(nn.GroupNorm, Cast):
        def forward(self, x: Tensor) -> Tensor:
            if self.casts():
                return F.group_norm(x, self.num_groups, *self.cast(x), self.eps)
            return super().forward(x)


class manual_cast(disable_weight_init):
    class Linear(disable_weight_init.Linear):
        comfy_cast_weights = True

    class Conv2d(disable_weight_init.Conv2d):
        comfy_cast_weights = True

    class GroupNorm(disable_weight_init.GroupNorm):
        comfy_cast_weights = True


class scaled_fp8(manual_cast):
    class Linear(manual_cast.Linear):
        """float8 with a scale for each layer."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.scale_weight = nn.Parameter(torch.ones(()), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            weight, bias = self.cast(x)
            if self.weight.element_size() == 1:
                weight = weight * self.scale_weight.to(x.device, x.dtype)
            return F.linear(x, weight, bias)


# ---- wrappers --------------------------------------------------------------------------------------------------------


class WrappersMP:
    APPLY_MODEL = "apply_model"
    DIFFUSION_MODEL = "diffusion_model"


class CallbacksMP:
    ON_CLONE = "on_clone"
    ON_LOAD = "on_load_after"
    ON_DETACH = "on_detach_after"
    ON_CLEANUP = "on_cleanup"


def wrappers_of(kind: str, transformer_options: dict[str, Any]) -> list[Any]:
    found = transformer_options.get("wrappers", {}).get(kind, {})
    return [wrapper for wrappers in found.values() for wrapper in wrappers]


class WrapperExecutor:
    def __init__(self, original: Callable[..., Any], class_obj: Any, wrappers: list[Any], index: int = 0) -> None:
        self.original, self.class_obj, self.wrappers, self.index = original, class_obj, wrappers, index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return WrapperExecutor(self.original, self.class_obj, self.wrappers, self.index + 1).execute(*args, **kwargs)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if self.index == len(self.wrappers):
            return self.original(*args, **kwargs)
        return self.wrappers[self.index](self, *args, **kwargs)


# ---- a model ---------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, context: int, ops: Any) -> None:
        super().__init__()
        self.to_q, self.to_out = ops.Linear(width, width, bias=False), ops.Linear(width, width)
        self.to_k, self.to_v = ops.Linear(context, width, bias=False), ops.Linear(context, width, bias=False)

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        for patch in transformer_options.get("patches", {}).get("attn2_patch", []):
            context = patch(context, transformer_options)
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        heads = [t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v)]
        return self.to_out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, context: int, ops: Any) -> None:
        super().__init__()
        self.norm, self.conv = ops.GroupNorm(4, width), ops.Conv2d(width, width, 3, padding=1)
        self.emb, self.attn = ops.Linear(width, width), Attention(width, context, ops)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        x = x + self.conv(F.silu(self.norm(x))) + self.emb(emb)[:, :, None, None]
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attn(tokens, context, transformer_options)
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class UNetModel(nn.Module):
    """As models of ComfyUI are called, with what they do to the options."""

    def __init__(self, width: int = 8, context: int = 8, blocks: int = 2, ops: Any = disable_weight_init) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.time = ops.Linear(width, width)
        self.input, self.out = ops.Conv2d(4, width, 3, padding=1), ops.Conv2d(width, 4, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width, context, ops) for _ in range(blocks))
        self.width = width

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006  # as there
        **kwargs: Any,
    ) -> Tensor:
        wrappers = wrappers_of(WrappersMP.DIFFUSION_MODEL, transformer_options)
        run = WrapperExecutor(self._forward, self, wrappers)
        return run.execute(x, timesteps, context, control, transformer_options, **kwargs)

    def _forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, control: Any, transformer_options: Any, **kwargs: Any
    ) -> Tensor:
        transformer_options["original_shape"] = list(x.shape)
        transformer_options["transformer_index"] = 0
        scales = torch.arange(self.width // 2, device=x.device)
        angles = timesteps[:, None] * torch.exp(-scales)
        emb = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))
        h = self.input(x)
        for index, block in enumerate(self.blocks):
            transformer_options["block"] = ("input", index)
            h = block(h, emb, context, transformer_options)
            if control is not None and control.get("output"):
                h = h + control["output"].pop()
            transformer_options["transformer_index"] += 1
        return self.out(h)


class BaseModel(nn.Module):
    """Around a diffusion model: what a sampler calls.

    Args:
        manual_cast_dtype: what is computed in, where the weights have another dtype.
    """

    def __init__(self, diffusion_model: nn.Module, manual_cast_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.diffusion_model, self.manual_cast_dtype = diffusion_model.requires_grad_(False).eval(), manual_cast_dtype
        self.device: Any = None
        self.current_patcher: ModelPatcher | None = None

    def apply_model(self, x: Tensor, t: Tensor, c_crossattn: Tensor, transformer_options: Any, **kwargs: Any) -> Tensor:
        wrappers = wrappers_of(WrappersMP.APPLY_MODEL, transformer_options)
        run = WrapperExecutor(self._apply_model, self, wrappers)
        return run.execute(x, t, None, c_crossattn, kwargs.pop("control", None), transformer_options, **kwargs)

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Any,
        c_crossattn: Tensor,
        control: Any,
        transformer_options: Any,
        **kw: Any,
    ) -> Tensor:
        dtype = self.manual_cast_dtype or self.diffusion_model.dtype
        given = {name: one.to(dtype) if isinstance(one, Tensor) else one for name, one in kw.items()}
        options = {"context": c_crossattn.to(dtype), "control": control}
        out = self.diffusion_model(
            x.to(dtype), t.float(), **options, transformer_options={**transformer_options}, **given
        )
        return x - out.float() * t[:, None, None, None]


# ---- the patcher -----------------------------------------------------------------------------------------------------


def get_attr(obj: Any, path: str) -> Any:
    for name in path.split("."):
        obj = getattr(obj, name)
    return obj


def set_attr_param(obj: Any, path: str, value: Tensor) -> None:
    owner, _, name = path.rpartition(".")
    setattr(get_attr(obj, owner), name, nn.Parameter(value, requires_grad=False))


def copy_to_param(obj: Any, path: str, value: Tensor) -> None:
    get_attr(obj, path).data.copy_(value)


def merge(weight: Tensor, patches: list[Any]) -> Tensor:
    """`weight` with LoRAs `(strength, up, down)`, computed in float32."""
    for strength, up, down in patches:
        weight = weight + strength * (up @ down).reshape(weight.shape).to(weight.device)
    return weight


class ModelPatcher:
    def __init__(
        self, model: Any, load_device: Any = "cpu", offload_device: Any = "cpu", weight_inplace_update: bool = False
    ) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.weight_inplace_update = weight_inplace_update
        self.patches: dict[str, list[Any]] = {}
        self.backup: dict[str, Tensor] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.callbacks: dict[str, dict[Any, list[Any]]] = {}
        self.wrappers: dict[str, dict[Any, list[Any]]] = {}
        self.patches_uuid = uuid.uuid4()
        for name, value in (("model_lowvram", False), ("current_weight_patches_uuid", None), ("loaded", False)):
            if not hasattr(model, name):
                setattr(model, name, value)

    def is_dynamic(self) -> bool:
        return False

    def clone(self, disable_dynamic: bool = False) -> ModelPatcher:
        other = type(self)(self.model, self.load_device, self.offload_device, self.weight_inplace_update)
        other.patches = {key: [*patches] for key, patches in self.patches.items()}
        other.patches_uuid, other.backup = self.patches_uuid, self.backup
        options = self.model_options
        other.model_options = {**options, "transformer_options": {**options["transformer_options"]}}
        for name in ("callbacks", "wrappers"):
            nested = {kind: {k: [*v] for k, v in keys.items()} for kind, keys in getattr(self, name).items()}
            setattr(other, name, nested)
        for callback in self.get_all_callbacks(CallbacksMP.ON_CLONE):
            callback(self, other)
        return other

    def get_model_object(self, name: str) -> Any:
        return get_attr(self.model, name)

    def add_callback_with_key(self, kind: str, key: Any, callback: Any) -> None:
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(callback)

    def remove_callbacks_with_key(self, kind: str, key: Any) -> None:
        self.callbacks.get(kind, {}).pop(key, None)

    def get_all_callbacks(self, kind: str) -> list[Any]:
        return [one for found in self.callbacks.get(kind, {}).values() for one in found]

    def add_wrapper_with_key(self, kind: str, key: Any, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: Any) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def add_patches(self, patches: dict[str, Any], strength_patch: float = 1.0) -> list[str]:
        known = [key for key in patches if key in self.model.state_dict()]
        for key in known:
            self.patches[key] = [*self.patches.get(key, []), (strength_patch, *patches[key])]
        self.patches_uuid = uuid.uuid4()
        return known

    def set_model_attn2_patch(self, patch: Any) -> None:
        options = self.model_options["transformer_options"]
        patches = options.setdefault("patches", {})
        patches["attn2_patch"] = [*patches.get("attn2_patch", []), patch]

    def load(self, fits: Callable[[str], bool] = lambda name: True) -> None:
        """To the device, but for the layers that do not fit."""
        if self.model.current_weight_patches_uuid not in (None, self.patches_uuid):
            self.unpatch_model()
        self.model.model_lowvram = False
        for name, layer in self.model.named_modules():
            if not layer._parameters:
                continue
            keys = [f"{name}.{each}" for each, parameter in layer._parameters.items() if parameter is not None]
            if fits(name) or not isinstance(layer, Cast):
                for key in keys:
                    self._patch(key)
                layer.to(self.load_device)
            else:
                self._offload(layer, name)
        self.model.current_weight_patches_uuid, self.model.loaded = self.patches_uuid, True

    def _patch(self, key: str) -> None:
        if key not in self.patches or key in self.backup:
            return
        weight = get_attr(self.model, key)
        self.backup[key] = weight.to(self.offload_device, copy=self.weight_inplace_update)
        patched = merge(weight.to(self.load_device, torch.float32, copy=True), self.patches[key]).to(weight.dtype)
        (copy_to_param if self.weight_inplace_update else set_attr_param)(self.model, key, patched)

    def _offload(self, layer: Any, name: str) -> None:
        layer.prev_comfy_cast_weights, layer.comfy_cast_weights = layer.comfy_cast_weights, True
        key = f"{name}.weight"
        patches = self.patches.get(key)
        if patches:
            layer.weight_function = [lambda weight: merge(weight.float(), patches).to(weight.dtype)]
        layer.to(self.offload_device)
        self.model.model_lowvram = True

    def unpatch_model(self) -> None:
        for layer in self.model.modules():
            if hasattr(layer, "prev_comfy_cast_weights"):
                layer.comfy_cast_weights = layer.prev_comfy_cast_weights
                del layer.prev_comfy_cast_weights
                layer.weight_function = []
        for key, weight in self.backup.items():
            (copy_to_param if self.weight_inplace_update else set_attr_param)(self.model, key, weight)
        self.backup.clear()
        self.model.to(self.offload_device)
        self.model.current_weight_patches_uuid, self.model.loaded, self.model.model_lowvram = None, False, False

    def partially_unload(self, device_to: Any, memory_to_free: int = 0, force_patch_weights: bool = False) -> int:
        """Here: the blocks leave, whatever they free."""
        for name, layer in self.model.named_modules():
            if "blocks" in name and isinstance(layer, Cast):
                key = f"{name}.weight"
                if key in self.backup:
                    set_attr_param(self.model, key, self.backup.pop(key))
                self._offload(layer, name)
        return memory_to_free

    def detach(self, unpatch_all: bool = True) -> Any:
        self.unpatch_model()
        for callback in self.get_all_callbacks(CallbacksMP.ON_DETACH):
            callback(self, unpatch_all)
        return self.model


class DynamicPatcher(ModelPatcher):
    """Brings weights to the device while they are used, unless a clone is told not to."""

    def is_dynamic(self) -> bool:
        return True

    def clone(self, disable_dynamic: bool = False) -> ModelPatcher:
        if not disable_dynamic:
            return super().clone()
        plain = ModelPatcher(self.model, self.load_device, self.offload_device)
        plain.patches, plain.wrappers = self.patches, self.wrappers
        return plain


def sample(patcher: ModelPatcher, latent: Tensor, context: Tensor, steps: int = 2, **conds: Any) -> Tensor:
    """What a sampler node does, without weights to load: the options differ in each step."""
    if not patcher.model.loaded or patcher.model.current_weight_patches_uuid != patcher.patches_uuid:
        patcher.load()
    patcher.model.current_patcher = patcher
    sigmas = torch.linspace(1.0, 0.25, steps)
    for sigma in sigmas:
        options: dict[str, Any] = {
            **patcher.model_options["transformer_options"],
            "wrappers": {kind: {**keys} for kind, keys in patcher.wrappers.items()},
            "cond_or_uncond": [0] if sigma > 0.5 else [1],
            "uuids": [uuid.uuid4()],
            "sigmas": sigma.reshape(1),
            "sample_sigmas": sigmas,
        }
        given = {name: value() if callable(value) else value for name, value in conds.items()}
        latent = patcher.model.apply_model(latent, sigma.expand(len(latent)), context, options, **given)
    return latent


# ---- as a package ----------------------------------------------------------------------------------------------------


@contextmanager
def installed(models: Path) -> Iterator[None]:
    """`import comfy.patcher_extension` and `import folder_paths` find this."""
    comfy, extension, folders = ModuleType("comfy"), ModuleType("comfy.patcher_extension"), ModuleType("folder_paths")
    vars(extension).update(WrappersMP=WrappersMP, CallbacksMP=CallbacksMP)
    vars(comfy).update(patcher_extension=extension)
    known: dict[str, list[str]] = {}

    def files(name: str) -> list[str]:
        return sorted(path.name for folder in known.get(name, []) for path in Path(folder).glob("*"))

    vars(folders).update(
        models_dir=str(models),
        add_model_folder_path=lambda name, path, is_default=False: known.setdefault(name, []).append(path),
        get_folder_paths=lambda name: known[name],
        get_filename_list=files,
        folder_names_and_paths=known,
    )
    names = {"comfy": comfy, "comfy.patcher_extension": extension, "folder_paths": folders}
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(names)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
