"""The manifest: metadata and format version of an engine file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch_rtx.errors import EngineFormatError, EngineVersionError
from torch_rtx.profiles import Profile, read_profiles
from torch_rtx.targets import EXACT, HIGH, HIGHEST, Float32

# Raise FORMAT_VERSION with every change of the format. Raise the `min_reader` of a file, too, if older releases would
# misread its content or refuse it: they ignore unknown fields and refuse unknown tensors. The digests and the two
# version fields of the manifest never change, so that every release can say why it can't read a file.
#   1: the first format
#   2: kernels
#   3: typical values of symbols, profiles
#   4: updates in place, split bodies of kernels
#   5: tactics in place of launches and split bodies
#   6: kernels that write to an operand in memory, control flow, kernels that others wrote, and how to find weights in
#      ONNX models
#   7: the program compressed, as a tensor; binaries in packs
FORMAT_VERSION = 7
MIN_READER = 7  # the oldest reader of files that this release writes
COMPRESSED = 7  # the first format whose header has only these fields of the manifest; the others are in the program
IN_HEADER = ("format_version", "min_reader", "producer")
OLDEST_READABLE = 1

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True)
class Manifest:
    """Metadata of an engine, serializable as JSON.

    `save` fills in the version fields, `stripped` and `digests["graph"]` (SHA-256 of the graph's text).

    Attributes:
        device: the device of the capture: "cpu" or "cuda".
        inputs: the names of the flat inputs, in order.
        signature: the call signature in the JSON of `runtime.signature`; opaque here.
        producer: versions of the libraries that built the engine, by name.
        platform: "any", or the only platform that can run the engine.
        unused_names: parameters of the model that the engine does not need; refit ignores them.
        profiles: see `profiles.profiles_of`.
        stripped: whether the file has no weights.
        products: see `backend.products.products_of`.
        onnx: for an engine built from an ONNX model: see `onnx.weights.program_of`.
        groups: by name of a process group that the engine needs: its `size`, and the `rank` in it that the engine was
            built for; None: any.
        shards: by name of a parameter of which each rank has a part: see `runtime.shards`.
        model: what the engine has of its model beside the program: see `runtime.attributes.facts_of`.
        float32: how exact products of float32 in kernels are that are compiled where the engine runs, as in its own.
        format_version, min_reader: the format of the file, and the oldest reader that understands it.
    """

    device: str
    inputs: tuple[str, ...] = ()
    signature: Json = None
    producer: Mapping[str, str] = field(default_factory=dict)
    platform: str = "any"
    unused_names: tuple[str, ...] = ()
    profiles: tuple[Profile, ...] = ()
    stripped: bool = False
    products: Mapping[str, Any] = field(default_factory=dict)
    onnx: Mapping[str, Any] | None = None
    groups: Mapping[str, Any] = field(default_factory=dict)
    shards: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    float32: Float32 = EXACT
    digests: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    min_reader: int = MIN_READER


def exactly(kind: type) -> Callable[[Any], Any]:
    """A function that returns a value of exactly this type, and raises TypeError for others."""

    def check(value: Any) -> Any:
        if type(value) is not kind:  # isinstance would accept a bool as an int
            raise TypeError(f"expected {kind.__name__}")
        return value

    return check


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(map(exactly(str), exactly(list)(value)))


def _string_map(value: Any) -> dict[str, str]:
    return {key: exactly(str)(item) for key, item in exactly(dict)(value).items()}


def _device(value: Any) -> str:
    if exactly(str)(value) not in ("cpu", "cuda"):
        raise TypeError(f"no engine is built for {value[:100]!r}")
    return str(value)


def _products(value: Any) -> dict[str, Any]:
    for fact in exactly(dict)(value).values():
        if exactly(int)(exactly(dict)(fact).get("axis")) not in (0, 1):
            raise TypeError("expected an axis")
        if any(type(fact.get(key)) not in (str, type(None)) for key in ("bias", "module")):
            raise TypeError("expected the names of a bias and a module")
    return {name: {key: fact.get(key) for key in ("axis", "bias", "module")} for name, fact in value.items()}


def _onnx(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    fields: dict[str, Any] = {name: exactly(dict)(value).get(name) for name in ("frame", "structure")}
    fields |= {name: exactly(list)(value.get(name)) for name in ("weights", "initializers", "numbers")}
    expected = {"weights": (str, type(None)), "initializers": (int, type(None)), "numbers": (str,)}
    if any(type(one) not in kinds for name, kinds in expected.items() for one in fields[name]):
        raise TypeError("expected names, indexes and digests")
    if type(fields["structure"]) is not str or type(fields["frame"]) not in (str, type(None)):
        raise TypeError("expected digests")
    if len(fields["weights"]) != len(fields["initializers"]):
        raise TypeError("expected an index for each name")
    return fields


def _model(value: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if "buffers" in exactly(dict)(value):
        fields["buffers"] = list(_strings(value["buffers"]))
    if "attributes" in value:
        fields["attributes"] = exactly(dict)(value["attributes"])
        if not all(name.isidentifier() and not name.startswith("_") for name in fields["attributes"]):
            raise TypeError("expected names of public attributes")
    return fields


def _groups(value: Any) -> dict[str, Any]:
    for fact in exactly(dict)(value).values():
        if exactly(int)(exactly(dict)(fact).get("size")) < 1 or type(fact.get("rank")) not in (int, type(None)):
            raise TypeError("expected a size and a rank")
    return {name: {"size": fact["size"], "rank": fact.get("rank")} for name, fact in value.items()}


def _float32(value: Any) -> Float32:
    found = [exactly(dict)(value).get(name) for name in ("products", "convolutions")]
    if any(one not in (HIGHEST, HIGH) for one in found):
        raise TypeError(f"expected {HIGHEST} or {HIGH}")
    return Float32(*found)


def _shards(value: Any) -> dict[str, Any]:
    found = {}
    for name, fact in exactly(dict)(value).items():
        shape = list(map(exactly(int), exactly(list)(exactly(dict)(fact).get("shape"))))
        splits = [exactly(list)(pair) for pair in exactly(list)(fact.get("splits"))]
        if any(len(pair) != 2 or type(pair[0]) is not str for pair in splits) or min(shape, default=0) < 0:
            raise TypeError("expected a shape, and pairs of a group and a dimension")
        if any(not 0 <= exactly(int)(dim) < len(shape) for _, dim in splits):
            raise TypeError("expected dimensions of the shape")
        found[name] = {"shape": shape, "splits": splits}
    return found


_FIELDS: dict[str, Callable[[Any], Any]] = {
    "format_version": exactly(int),
    "min_reader": exactly(int),
    "device": _device,
    "platform": exactly(str),
    "producer": _string_map,
    "inputs": _strings,
    "signature": lambda value: value,
    "unused_names": _strings,
    "profiles": read_profiles,
    "stripped": exactly(bool),
    "products": _products,
    "onnx": _onnx,
    "groups": _groups,
    "shards": _shards,
    "model": _model,
    "float32": _float32,
    "digests": _string_map,
}
# The first format with the field, and its value in older ones.
_SINCE: Mapping[str, tuple[int, Any]] = {"profiles": (3, ()), "products": (6, {}), "onnx": (6, None)}

_OPTIONAL = ("float32", "groups", "model", "shards")  # files of every format may lack these


def read_manifest(value: Any) -> Manifest:
    """Read the manifest from the JSON of a header.

    Raises:
        EngineVersionError: this release can't read the format of the file.
        EngineFormatError: a field is missing or has the wrong type.
    """
    fields: dict[str, Any] = {"format_version": read_versions(value)}
    for name, check in _FIELDS.items():
        if name in _SINCE and fields["format_version"] < _SINCE[name][0]:
            fields[name] = _SINCE[name][1]
            continue
        if name not in value and name in _OPTIONAL:
            continue
        if name not in value:
            raise EngineFormatError(f"the manifest has no field {name!r}")
        try:
            fields[name] = check(value[name])
        except TypeError as error:
            raise EngineFormatError(f"field {name!r} of the manifest: {error}") from None
    return Manifest(**fields)


def read_versions(value: Any) -> int:
    """The format of a file, from the JSON of its header.

    Raises:
        EngineVersionError, EngineFormatError: as `read_manifest`.
    """
    if not isinstance(value, dict):
        raise EngineFormatError("the header has no manifest")
    for name in ("format_version", "min_reader"):
        if name not in value:
            raise EngineFormatError(f"the manifest has no field {name!r}")
        if type(value[name]) is not int:
            raise EngineFormatError(f"field {name!r} of the manifest: expected int")
    _check_version(value["format_version"], value["min_reader"], value.get("producer"))
    return int(value["format_version"])


def _check_version(version: int, min_reader: int, producer: Any) -> None:
    if min_reader > FORMAT_VERSION:
        raise EngineVersionError(
            f"the engine has format {version} and needs a reader of format {min_reader} or later; this one reads "
            f"{FORMAT_VERSION}",
            hint=f"update torch_rtx{_release(producer)}, or rebuild the engine with this release",
        )
    if version < OLDEST_READABLE:
        raise EngineVersionError(
            f"the engine has format {version}; this release reads {OLDEST_READABLE} to {FORMAT_VERSION}",
            hint="rebuild the engine with this release",
        )


def _release(producer: Any) -> str:
    """The release that wrote a file, as far as its format is still understood."""
    version = producer.get("torch_rtx") if isinstance(producer, dict) else None
    return f" to {version}" if isinstance(version, str) and re.fullmatch(r"[\w.+-]{1,40}", version) else ""
