"""Every operator that ONNX and onnxruntime define is declared, defined by others, or refused with a reason."""

from __future__ import annotations

import inspect
from collections import defaultdict
from functools import cache
from typing import Any

import pytest

pytest.importorskip("onnx_ir")

import onnx

from tests.onnx.operators import call
from torch_rtx.errors import OnnxError
from torch_rtx.onnx import host
from torch_rtx.onnx.plan import CONTROL
from torch_rtx.onnx.registry import REFUSED, find

OLDEST = 7  # opsets below are not claimed to be complete
# Take names off when there is a declaration; add none.
WITHOUT = {
    "": {"ImageDecoder", "RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit"},
    "ai.onnx.ml": {"CastMap", "CategoryMapper", "DictVectorizer", "LabelEncoder", "ZipMap"},
}


@cache
def schemas() -> list[tuple[str, Any]]:
    """The domain and the schema of each version of an operator that is in effect in a known opset."""
    versions = defaultdict(list)
    for schema in onnx.defs.get_all_schemas_with_history():
        versions[schema.domain, schema.name].append(schema)
    found = []
    for (domain, _), history in versions.items():
        history.sort(key=lambda schema: schema.since_version)
        ends = [*(schema.since_version for schema in history[1:]), OLDEST + 1]
        kept = [s for s, end in zip(history, ends, strict=True) if domain != "" or end > OLDEST]
        found += [(domain, schema) for schema in kept if not schema.deprecated]
    return found


def contributed() -> list[tuple[str, Any]]:
    """The operators of com.microsoft that onnxruntime has."""
    state = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    return [(s.domain, s) for s in state.get_all_operator_schema() if s.domain == "com.microsoft" and not s.deprecated]


def built_in(domain: str, name: str) -> bool:
    op = f"{domain}.{name}".lstrip(".")
    return op in CONTROL or op in host.OF_TENSORS or op == "Constant"


def has_definition(schema: Any) -> bool:
    return bool(schema.function_opset_versions or schema.context_dependent_function_opset_versions)


def test_every_operator_is_declared_or_refused() -> None:
    without = defaultdict(set)
    for domain, schema in schemas():
        known = find(domain, schema.name, schema.since_version) is not None or built_in(domain, schema.name)
        if not known and not has_definition(schema):
            without[domain].add(schema.name)
            assert (domain, schema.name) in REFUSED, (domain, schema.name, schema.since_version)
    assert without == WITHOUT


def test_every_contributed_operator_is_declared_or_refused() -> None:
    """Of onnxruntime's; at least 90 are declared, which may only grow."""
    known = {schema.name for _, schema in contributed()}
    declared = {name for name in known if find("com.microsoft", name, 1) is not None}
    refused = {name for domain, name in REFUSED if domain == "com.microsoft"}
    assert known - declared - refused == set()
    assert declared & refused == set()
    assert len(declared) >= 90


@pytest.mark.parametrize("domain", ["ai.onnx", "com.microsoft"])
def test_declarations_take_what_schemas_have(domain: str) -> None:
    """All attributes and inputs."""
    lacking = []
    for home, schema in schemas() if domain == "ai.onnx" else contributed():
        operator = find(home, schema.name, schema.since_version)
        if operator is None:
            continue
        parameters = inspect.signature(operator.function).parameters.values()
        kinds = {parameter.kind for parameter in parameters}
        names = {parameter.name for parameter in parameters}
        attributes = set() if inspect.Parameter.VAR_KEYWORD in kinds else {*schema.attributes} - names
        places = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        variadic = bool(schema.inputs) and "Variadic" in str(schema.inputs[-1].option)
        inputs = inspect.Parameter.VAR_POSITIONAL in kinds or (not variadic and len(schema.inputs) <= len(places))
        if attributes or not inputs:
            lacking.append((home, schema.name, schema.since_version, attributes))
    assert lacking == []


def test_the_error_says_why() -> None:
    with pytest.raises(OnnxError, match=r"operator StringSplit of version 20 .*\n.*no tensors of strings"):
        call("StringSplit", 20, outputs=2)
