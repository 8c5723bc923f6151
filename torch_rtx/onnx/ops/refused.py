"""Operators without a declaration, and why."""

from __future__ import annotations

from torch_rtx.onnx.registry import refuse

STRINGS = "there are no tensors of strings: do that before the model, in Python"
MAPS = "there are no maps: convert the model without it (of skl2onnx: the option zipmap=False)"

refuse(STRINGS, "StringConcat", "StringNormalizer", "StringSplit", "RegexFullMatch")
refuse("decode images before the model, and give it tensors", "ImageDecoder")
refuse(STRINGS, "CategoryMapper", "LabelEncoder", domain="ai.onnx.ml")  # of version 1: later ones are declared
refuse(MAPS, "CastMap", "DictVectorizer", "ZipMap", domain="ai.onnx.ml")

MS = "com.microsoft"
SERVING = "it belongs to a server's own cache or scheduler: export the model without it"
LAYOUT = "its tensors have a layout of another library: export the model without it"

refuse(
    "it generates by a decoder that is a graph inside of it: export the decoder alone, and loop in Python",
    *(
        "BeamSearch",
        "GreedySearch",
        "Sampling",
        "WhisperBeamSearch",
        "BifurcationDetector",
        "DecoderMaskedSelfAttention",
    ),
    domain=MS,
)
refuse("it is compiled for something else: export the model without it", "EPContext", "Snpe", domain=MS)
refuse(STRINGS, "MurmurHash3", "Tokenizer", "WordConvEmbedding", domain=MS)
refuse("there are no sparse tensors", "SparseToDenseMatMul", domain=MS)
refuse(
    LAYOUT,
    *("DequantizeBFP", "DequantizeWithOrder", "GatherPacked", "MatMulFpQ4", "MatMulPacked", "MoEPacked"),
    *("QOrderedAttention", "QOrderedGelu", "QOrderedLayerNormalization", "QOrderedLongformerAttention"),
    *("QOrderedMatMul", "QuantizeBFP", "QuantizeWithOrder", "BitmaskBiasDropout", "BitmaskDropout"),
    domain=MS,
)
refuse(
    SERVING,
    *("ConvStateReplay", "DynamicSparseAttention", "EngramGate", "GatedDeltaNet", "GatedDeltaNetStateReplay"),
    *("Mamba2Verify", "NGramHashMapping", "PackedSparseAttentionIndexer", "PackedSparseAttentionIndexerMerge"),
    *("PagedAttention", "SparseAttentionIndexer", "SparsePagedAttention", "SpeculativePrefixCommit"),
    *("VarlenCausalConvWithState", "VarlenNGramHashMapping"),
    domain=MS,
)
refuse(
    "no exporter of PyTorch models is known to write it: open an issue with the model",
    *("AttnLSTM", "BranchwiseRMSNorm", "DecoderAttention", "DynamicTimeWarping", "GatedAdd", "GemmFloat8"),
    *("HyperConnectionLowRankMix", "HyperConnectionPostMix", "HyperConnectionPreMix", "LongformerAttention"),
    *("MatMulBlockQuantizedFp4Weight", "MatMulBlockQuantizedFp8Weight", "MatMulNBitsQLoRA", "MaxpoolWithMask"),
    *("MoEGroupRouter", "RMSNormRotary", "RouterGateUpProj", "SampleOp"),
    domain=MS,
)
