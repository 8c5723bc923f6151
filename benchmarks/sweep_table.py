"""The models of the suite `sweep`: architectures by name from libraries that people use, none chosen after a result.

A name is `library.architecture`. Weights are random; sizes are those of published checkpoints, but for language models
of many equal layers or experts, which keep the width and have fewer of them. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Tensor:
    """An input: its shape behind the batch, and the number that its integers stay below; 0: it is of floats."""

    shape: tuple[int, ...]
    below: int = 0


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        inputs: by argument of `forward`; those named by a digit are positional.
        batch: the first size of each input.
        kind: what the library calls the class or the model.
        config: arguments of the configuration.
        few: those that make a model of few layers, with the same kinds of graphs.
        dtype: of weights and inputs on a GPU, as torch names it.
    """

    name: str
    inputs: Mapping[str, Tensor]
    batch: int
    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)
    few: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float16"

    @property
    def library(self) -> str:
        """The package that has the model: a module of Python, or `own`."""
        return self.name.partition(".")[0]

    def shapes(self) -> str:
        """The inputs in words, such as `input_ids i64[8, 128]`."""
        short = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}[self.dtype]
        return ", ".join(
            f"{name} {'i64' if one.below else short}{[self.batch, *one.shape]}" for name, one in self.inputs.items()
        )


def _floats(*shape: int) -> Tensor:
    return Tensor(shape)


def _ids(below: int, *shape: int) -> Tensor:
    return Tensor(shape, below)


def _timm(kind: str, side: int = 224, batch: int = 8, dtype: str = "float16") -> Entry:
    return Entry(f"timm.{kind}", {"0": _floats(3, side, side)}, batch, kind, dtype=dtype)


def _torchvision(kind: str, *shape: int, batch: int = 8) -> Entry:
    return Entry(f"torchvision.{kind}", {"0": _floats(*(shape or (3, 224, 224)))}, batch, kind)


LAYERS = {"num_hidden_layers": 2}


def _transformers(
    name: str, kind: str, inputs: Mapping[str, Tensor], batch: int, few: Mapping[str, Any] = LAYERS, **config: Any
) -> Entry:
    return Entry(f"transformers.{name}", inputs, batch, kind, config, few)


def _encoder(name: str, kind: str, below: int, length: int = 128, batch: int = 8, **config: Any) -> Entry:
    """A model of text in both directions."""
    few = config.pop("few", LAYERS)
    return _transformers(name, kind, {"input_ids": _ids(below, length)}, batch, few, **config)


def _decoder(name: str, kind: str, below: int, length: int = 512, **config: Any) -> Entry:
    """A causal language model over a prompt, without a cache; a short one where the model loops over tokens in Python,
    which every compiler unrolls."""
    few = config.pop("few", LAYERS)
    inputs = {"input_ids": _ids(below, length)}
    config = {"vocab_size": below, "use_cache": False, **config}
    return Entry(f"transformers.{name}", inputs, 1, kind, config, few, "bfloat16")


def _diffusers(
    name: str, kind: str, inputs: Mapping[str, Tensor], batch: int, few: Mapping[str, Any], **config: Any
) -> Entry:
    return Entry(f"diffusers.{name}", inputs, batch, kind, config, few)


_T5_LAYERS = {"num_layers": 2, "num_decoder_layers": 2}
_BOTH = {"encoder_layers": 2, "decoder_layers": 2}
_SECONDS = _floats(16000)
_IMAGE = {"pixel_values": _floats(3, 224, 224)}
_LLAMA_LIKE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 16}

SWEEP: tuple[Entry, ...] = (
    _timm("swinv2_tiny_window8_256", 256),
    _timm("convmixer_768_32"),
    _timm("mixer_b16_224"),
    _timm("poolformer_s24"),
    _timm("mobilevit_s", 256),
    _timm("mobilevitv2_100", 256),
    _timm("levit_256"),
    _timm("edgenext_small", 256),
    _timm("repvit_m1_1"),
    _timm("ghostnet_100"),
    _timm("hrnet_w18"),
    _timm("res2net50_26w_4s"),
    _timm("inception_v4", 299),
    _timm("volo_d1_224"),
    _timm("cait_s24_224"),
    _timm("focalnet_tiny_srf"),
    _timm("davit_tiny"),
    _timm("hiera_tiny_224"),
    _timm("mambaout_tiny"),
    _timm("crossvit_15_240", 240),
    _timm("tnt_s_patch16_224"),
    _timm("fastvit_t8", 256),
    _timm("mobilenetv4_conv_medium", 256),
    _timm("mobilenetv4_hybrid_medium", 256),
    _timm("tiny_vit_11m_224"),
    _timm("lambda_resnet26t", 256),
    _timm("coatnet_0_rw_224"),
    _timm("maxvit_tiny_tf_224"),
    _timm("efficientformer_l1", dtype="float32"),  # its biases of attention stay float32 when it is cast
    _timm("xcit_small_12_p16_224"),
    _timm("twins_svt_small"),
    _timm("pvt_v2_b2"),
    _timm("gcvit_tiny"),
    _timm("nest_tiny"),
    _timm("visformer_small"),
    _timm("rexnet_100"),
    _timm("eca_nfnet_l0"),
    _timm("densenet121"),
    _timm("botnet26t_256", 256),
    _timm("halonet26t", 256),
    _timm("sequencer2d_s"),
    _timm("gmlp_s16_224"),
    _timm("efficientvit_b1", 256),
    _timm("beit_base_patch16_224"),
    _timm("eva02_small_patch14_224"),
    _torchvision("shufflenet_v2_x1_0"),
    _torchvision("googlenet"),
    _torchvision("squeezenet1_1"),
    _torchvision("mnasnet1_0"),
    _torchvision("vgg16"),
    _torchvision("swin_v2_t", 3, 256, 256),
    _torchvision("r3d_18", 3, 16, 112, 112, batch=2),
    _torchvision("mvit_v2_s", 3, 16, 224, 224, batch=1),
    _torchvision("s3d", 3, 16, 224, 224, batch=1),
    _torchvision("deeplabv3_resnet50", 3, 520, 520, batch=1),
    _torchvision("lraspp_mobilenet_v3_large", 3, 520, 520, batch=1),
    Entry(
        "torchvision.raft_small",
        {"0": _floats(3, 360, 520), "1": _floats(3, 360, 520)},
        1,
        "raft_small",
        dtype="float32",  # its coordinates are, whatever the weights are
    ),
    Entry("torchvision.ssdlite", {"0": _floats(3, 320, 320)}, 4, "ssdlite320_mobilenet_v3_large"),
    Entry("torchvision.retinanet", {"0": _floats(3, 800, 800)}, 1, "retinanet_resnet50_fpn"),
    _decoder(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        32000,
        hidden_size=2048,
        intermediate_size=11264,
        moe_intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
        few={"num_hidden_layers": 2, "n_routed_experts": 8},
    ),
    _decoder(
        "gpt_oss",
        "GptOssForCausalLM",
        32000,
        num_hidden_layers=4,
        num_local_experts=32,
        few={"num_hidden_layers": 2, "num_local_experts": 8},
    ),
    _decoder("olmo2", "Olmo2ForCausalLM", 100352, num_hidden_layers=16, **_LLAMA_LIKE),
    _decoder(
        "cohere",
        "CohereForCausalLM",
        32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=4,
        num_attention_heads=32,
    ),
    _decoder("starcoder2", "Starcoder2ForCausalLM", 49152, num_hidden_layers=12),
    _decoder("gemma2", "Gemma2ForCausalLM", 256000, num_hidden_layers=8),
    _decoder(
        "gptneox",
        "GPTNeoXForCausalLM",
        50304,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=16,
    ),
    _decoder("bloom", "BloomForCausalLM", 250880, hidden_size=1024, n_layer=24, n_head=16, few={"n_layer": 2}),
    _decoder("falcon", "FalconForCausalLM", 65024, num_hidden_layers=4),
    _decoder(
        "recurrent_gemma", "RecurrentGemmaForCausalLM", 256000, 64, num_hidden_layers=6, few={"num_hidden_layers": 3}
    ),
    _decoder("mamba", "MambaForCausalLM", 50280, 64, num_hidden_layers=24),
    _decoder("mamba2", "Mamba2ForCausalLM", 50288, num_hidden_layers=12, hidden_size=1024, num_heads=32, n_groups=1),
    _decoder("phi3", "Phi3ForCausalLM", 32064, num_hidden_layers=8),
    _decoder("granite", "GraniteForCausalLM", 49152, num_hidden_layers=16, **_LLAMA_LIKE),
    _decoder("smollm3", "SmolLM3ForCausalLM", 128256, num_hidden_layers=12),
    _decoder("lfm2", "Lfm2ForCausalLM", 65536, num_hidden_layers=8, few={"num_hidden_layers": 4}),
    _decoder(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        151936,
        num_hidden_layers=4,
        few={"num_hidden_layers": 2, "num_experts": 8},
    ),
    _decoder(
        "mixtral", "MixtralForCausalLM", 32000, num_hidden_layers=4, few={"hidden_size": 512, "num_hidden_layers": 2}
    ),
    _decoder(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        32000,
        num_hidden_layers=4,
        num_experts=64,
        few={"num_hidden_layers": 4, "num_experts": 16},
    ),
    _decoder("opt", "OPTForCausalLM", 50272, hidden_size=768, num_hidden_layers=12, ffn_dim=3072),
    _decoder("gptj", "GPTJForCausalLM", 50400, n_layer=4, few={"n_layer": 2}),
    _encoder("albert", "AlbertModel", 30000, hidden_size=768, num_attention_heads=12, intermediate_size=3072),
    _encoder("mpnet", "MPNetModel", 30527),
    _encoder("funnel", "FunnelModel", 30522, few={"block_sizes": [1, 1, 1]}),
    _encoder("xlnet", "XLNetModel", 32000, d_model=768, n_layer=12, n_head=12, d_inner=3072, few={"n_layer": 2}),
    replace(_encoder("fnet", "FNetModel", 32000), dtype="float32"),  # transforms of such sizes have no half precision
    _encoder("longformer", "LongformerModel", 30522, 1024, 2, attention_window=512, max_position_embeddings=4098),
    _encoder("bigbird", "BigBirdModel", 50358, 1024, 2),
    _encoder("electra", "ElectraModel", 30522),
    _encoder("mobilebert", "MobileBertModel", 30522),
    _encoder("squeezebert", "SqueezeBertModel", 30522),
    _encoder("convbert", "ConvBertModel", 30522),
    _encoder("roformer", "RoFormerModel", 50000),
    _encoder("nystromformer", "NystromformerModel", 30000, 512, 2, max_position_embeddings=512),
    _encoder("modernbert", "ModernBertModel", 50368, 512, 2),
    _encoder(
        "deberta_v2",
        "DebertaV2Model",
        128100,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
    ),
    _encoder("esm", "EsmModel", 33, 256, 4, vocab_size=33, pad_token_id=1, mask_token_id=32),
    _encoder("canine", "CanineModel", 60000, 512, 2),
    _encoder("ibert", "IBertModel", 30522),
    _encoder("layoutlm", "LayoutLMModel", 30522),
    _transformers(
        "switch",
        "SwitchTransformersForConditionalGeneration",
        {
            "input_ids": _ids(32000, 128),
            "attention_mask": _ids(2, 128),  # of ones, which the model makes itself in eager mode alone
            "decoder_input_ids": _ids(32000, 32),
        },
        8,
        _T5_LAYERS,
        num_layers=12,
        num_decoder_layers=12,
        use_cache=False,
    ),
    Entry(
        "transformers.bart",
        {"input_ids": _ids(50265, 128), "decoder_input_ids": _ids(50265, 64)},
        8,
        "BartModel",
        {"encoder_layers": 6, "decoder_layers": 6, "d_model": 768, "use_cache": False},
        _BOTH,
        "bfloat16",  # in float16 its code looks for infinities, and decides by what it finds
    ),
    _transformers(
        "m2m100",
        "M2M100Model",
        {"input_ids": _ids(128112, 128), "decoder_input_ids": _ids(128112, 32)},
        4,
        _BOTH,
        use_cache=False,
    ),
    _transformers("wavlm", "WavLMModel", {"input_values": _SECONDS}, 4),
    _transformers("wav2vec2_conformer", "Wav2Vec2ConformerModel", {"input_values": _SECONDS}, 4),
    _transformers("hubert", "HubertModel", {"input_values": _SECONDS}, 4),
    _transformers("ast", "ASTModel", {"input_values": _floats(1024, 128)}, 4),
    _transformers("encodec", "EncodecModel", {"input_values": _floats(1, 24000)}, 2, {}),
    _transformers("dac", "DacModel", {"input_values": _floats(1, 44032)}, 1, {}),
    _transformers("mimi", "MimiModel", {"input_values": _floats(1, 24000)}, 2, use_cache=False),
    _transformers("clap_audio", "ClapAudioModel", {"input_features": _floats(1, 1001, 64)}, 2, {}),
    _transformers(
        "segformer_b2",
        "SegformerForSemanticSegmentation",
        {"pixel_values": _floats(3, 512, 512)},
        1,
        {"depths": [1, 1, 1, 1]},
        depths=[3, 4, 6, 3],
        hidden_sizes=[64, 128, 320, 512],
        decoder_hidden_size=768,
    ),
    _transformers("detr", "DetrForObjectDetection", {"pixel_values": _floats(3, 800, 800)}, 1, _BOTH),
    _transformers(
        "rt_detr", "RTDetrForObjectDetection", {"pixel_values": _floats(3, 640, 640)}, 1, {"decoder_layers": 2}
    ),
    _transformers("yolos", "YolosForObjectDetection", {"pixel_values": _floats(3, 512, 864)}, 1),
    _transformers("dpt", "DPTForDepthEstimation", {"pixel_values": _floats(3, 384, 384)}, 1, {}),
    _transformers("depth_anything", "DepthAnythingForDepthEstimation", {"pixel_values": _floats(3, 518, 518)}, 1, {}),
    _transformers("siglip", "SiglipVisionModel", _IMAGE, 8),
    _transformers("dinov3_vit", "DINOv3ViTModel", _IMAGE, 8),
    _transformers(
        "swin2sr", "Swin2SRForImageSuperResolution", {"pixel_values": _floats(3, 64, 64)}, 2, {"depths": [2, 2]}
    ),
    _transformers("superpoint", "SuperPointForKeypointDetection", {"pixel_values": _floats(3, 480, 640)}, 1, {}),
    _transformers("videomae", "VideoMAEModel", {"pixel_values": _floats(16, 3, 224, 224)}, 1),
    _transformers("timesformer", "TimesformerModel", {"pixel_values": _floats(8, 3, 224, 224)}, 1),
    _transformers(
        "perceiver", "PerceiverForMaskedLM", {"inputs": _ids(262, 2048)}, 2, {"num_self_attends_per_block": 2}
    ),
    _transformers(
        "patchtst",
        "PatchTSTForPrediction",
        {"past_values": _floats(512, 7)},
        32,
        context_length=512,
        num_input_channels=7,
    ),
    _transformers("vits", "VitsModel", {"input_ids": _ids(38, 64)}, 1, {}),
    _diffusers(
        "sdxl_unet",
        "UNet2DConditionModel",
        {
            "sample": _floats(4, 64, 64),
            "timestep": _ids(1000),
            "encoder_hidden_states": _floats(77, 2048),
        },
        2,
        {"layers_per_block": 1, "transformer_layers_per_block": [1, 1, 2]},
        sample_size=64,
        block_out_channels=[320, 640, 1280],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        use_linear_projection=True,
    ),
    _diffusers(
        "vae",
        "AutoencoderKL",
        {"sample": _floats(3, 256, 256)},
        1,
        {"layers_per_block": 1},
        block_out_channels=[128, 256, 512, 512],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
    ),
    Entry("diffusers.taesd", {"sample": _floats(3, 512, 512)}, 1, "AutoencoderTiny", dtype="float32"),
    _diffusers(
        "dit_xl_2",
        "DiTTransformer2DModel",
        {"hidden_states": _floats(4, 32, 32), "timestep": _ids(1000), "class_labels": _ids(1000)},
        2,
        {"num_layers": 2},
    ),
    _diffusers(
        "sd3",
        "SD3Transformer2DModel",
        {
            "hidden_states": _floats(16, 64, 64),
            "encoder_hidden_states": _floats(154, 4096),
            "pooled_projections": _floats(2048),
            "timestep": _ids(1000),
        },
        2,
        {"num_layers": 2},
        sample_size=64,
        num_layers=12,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        joint_attention_dim=4096,
    ),
    _diffusers(
        "pixart",
        "PixArtTransformer2DModel",
        {
            "hidden_states": _floats(4, 64, 64),
            "encoder_hidden_states": _floats(120, 4096),
            "timestep": _ids(1000),
        },
        2,
        {"num_layers": 2},
        sample_size=64,
        caption_channels=4096,
        cross_attention_dim=1152,
        num_layers=14,
    ),
    Entry("own.dlrm", {"0": _floats(13), "1": _ids(100000, 26, 4)}, 2048, "Dlrm"),
    Entry("own.nerf", {"0": _floats(64, 6)}, 4096, "Nerf"),
    Entry("own.unet", {"0": _floats(1, 256, 256)}, 2, "UNet"),
    Entry("own.yolo", {"0": _floats(3, 640, 640)}, 1, "Yolo"),
)
ENTRIES = {entry.name: entry for entry in SWEEP}
