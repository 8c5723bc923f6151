"""Attributes of a model that its engine has as well, so that it can stand in for the model: in a pipeline, for example.

These are `config`, `dtype`, and public attributes that are numbers, booleans, None, or lists of such; also those of its
layers, as far as names lead there and not places in a list: pipelines read `unet.add_embedding.linear_1.in_features`.
Text is kept only in a `config`, which is made to be published: elsewhere it may be a path or a key. In a file they are
JSON, with two additions: `{"": "float16"}` is a dtype, `{"": [[0, "cat"], ...]}` a dict whose keys are not all text.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from torch_rtx.errors import EngineFormatError
from torch_rtx.manifest import Json

log = logging.getLogger(__name__)
MAX_BYTES, MAX_DEPTH = 1 << 18, 16  # of all attributes of a model, as JSON
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class Config(dict[str, Any]):
    """A configuration of a model, or the numbers of a layer. Its entries are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the engine has no {name!r} of its model there") from None


def facts_of(model: object, buffers: Collection[str]) -> dict[str, Json]:
    """What an engine keeps of its model: `attributes`, and the names of its `buffers`."""
    found: dict[str, Json] = {}
    if isinstance(model, nn.Module):
        found = _numbers(model)
        _add(found, "dtype", model, _dtype)
        _add(found, "config", model, _config)
        with_layers = {**_layers(model, MAX_DEPTH - 1), **found}
        found = with_layers if len(json.dumps(with_layers)) <= MAX_BYTES else found
    size = len(json.dumps(found))
    if size > MAX_BYTES:
        log.warning("the engine has no attributes of its model, which take %d bytes as JSON", size)
        found = {}
    return {"buffers": [*sorted(buffers)], "attributes": found}


def read_attributes(attributes: Mapping[str, Json]) -> dict[str, Any]:
    """The attributes in a manifest.

    Raises:
        EngineFormatError: they are damaged.
    """
    return {name: _read(value, MAX_DEPTH) for name, value in attributes.items()}


def _numbers(model: nn.Module) -> dict[str, Json]:
    found: dict[str, Json] = {}
    for name in vars(model):
        if not name.startswith("_") and name.isidentifier() and name != "training":
            _add(found, name, model, _number)
    return found


def _layers(model: nn.Module, depth: int) -> dict[str, Json]:
    """The numbers of the layers of `model` and of those in them, by name; without layers that have none."""
    named = [(name, layer) for name, layer in model.named_children() if name.isidentifier() and name[0] != "_"]
    found = {name: {**_layers(layer, depth - 1), **_numbers(layer)} for name, layer in named if depth}
    return {name: layer for name, layer in found.items() if layer}


class _NotPlain(Exception):
    """A value that is not kept."""


def _add(found: dict[str, Json], name: str, model: nn.Module, kind: Callable[[Any], Json]) -> None:
    """Add an attribute if it is of this kind."""
    try:
        found[name] = kind(getattr(model, name))
    except (_NotPlain, AttributeError):
        found.pop(name, None)
    except Exception as error:  # properties and `to_dict` are the model's own code
        found.pop(name, None)
        log.info("the engine has no %s of its model: %s: %s", name, type(error).__name__, error)


def _number(value: object) -> Json:
    """A number, boolean, None, or nested lists of such."""
    if isinstance(value, list | tuple):
        return [_number(item) for item in value]
    if value is None or type(value) in (bool, int) or (type(value) is float and math.isfinite(value)):
        return value  # type: ignore[return-value]
    raise _NotPlain


def _dtype(value: object) -> Json:
    if isinstance(value, torch.dtype):
        return {"": str(value).removeprefix("torch.")}
    raise _NotPlain


def _config(value: Any) -> Json:
    """The public entries of a configuration: of a dict, a dataclass, or an object with `to_dict` or with attributes."""
    if callable(getattr(value, "to_dict", None)):
        value = value.to_dict()
    elif not isinstance(value, Mapping | type) and hasattr(value, "__dict__"):
        value = vars(value)
    if isinstance(value, Mapping):
        return _plain(value, MAX_DEPTH)
    raise _NotPlain


def _plain(value: Any, depth: int) -> Json:
    """`value` as JSON, without what is not plain in it."""
    if depth == 0:
        raise _NotPlain
    if isinstance(value, Mapping):
        pairs = []
        for key, item in value.items():
            if type(key) in (str, int) and not str(key).startswith("_") and key != "":
                try:
                    pairs.append((key, _plain(item, depth - 1)))
                except _NotPlain:
                    continue
        return dict(pairs) if all(isinstance(key, str) for key, _ in pairs) else {"": [list(pair) for pair in pairs]}
    if isinstance(value, list | tuple):
        return [_plain(item, depth - 1) for item in value]
    if isinstance(value, torch.dtype):
        return _dtype(value)
    return str(value) if isinstance(value, str) else _number(value)


def _read(value: Json, depth: int) -> Any:
    if isinstance(value, list) and depth:
        return [_read(item, depth - 1) for item in value]
    if isinstance(value, dict) and depth:
        match value:
            case {"": str(name)} if len(value) == 1 and name in DTYPES:
                return DTYPES[name]
            case {"": [*pairs]} if len(value) == 1 and all(_is_pair(pair) for pair in pairs):
                return {pair[0]: _read(pair[1], depth - 1) for pair in pairs}  # type: ignore[index]
            case _ if "" not in value:
                return Config({key: _read(item, depth - 1) for key, item in value.items()})
    if isinstance(value, list | dict):
        raise EngineFormatError("an attribute of the model is damaged")
    return value


def _is_pair(pair: Json) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int)
