"""Operators without a declaration, and why."""

from __future__ import annotations

from torch_rtx.onnx.registry import refuse

STRINGS = "there are no tensors of strings: do that before the model, in Python"
MAPS = "there are no maps: convert the model without it (of skl2onnx: the option zipmap=False)"

refuse(STRINGS, "StringConcat", "StringNormalizer", "StringSplit", "RegexFullMatch")
refuse("decode images before the model, and give it tensors", "ImageDecoder")
refuse(STRINGS, "CategoryMapper", "LabelEncoder", domain="ai.onnx.ml")  # of version 1: later ones are declared
refuse(MAPS, "CastMap", "DictVectorizer", "ZipMap", domain="ai.onnx.ml")
