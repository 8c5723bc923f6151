"""Environment variables are the defaults of options, read when settings are made."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

import pytest

from torch_rtx import settings
from torch_rtx.errors import SettingsError
from torch_rtx.settings import CompilationSettings, RuntimeSettings, from_options

# Variable, text, the option that it sets, the value that it gets.
READ: list[tuple[str, str, str, Any]] = [
    ("TORCH_RTX_EXECUTED_OPS", "aten.exp, aten.sin.default", "torch_executed_ops", {"aten.exp", "aten.sin.default"}),
    ("TORCH_RTX_FALLBACK_ON_ERROR", "1", "fallback_on_error", True),
    ("TORCH_RTX_DISABLED_PASSES", "cse", "disabled_passes", {"cse"}),
    ("TORCH_RTX_TARGETS", "portable", "targets", "portable"),
    ("TORCH_RTX_TARGETS", "RTX 4090, sm_120,ptx", "targets", ("RTX 4090", "sm_120", "ptx")),
    ("TORCH_RTX_TARGETS", "none", "targets", None),
    ("TORCH_RTX_DUMP", "dumps", "dump_dir", "dumps"),
    ("TORCH_RTX_OVERRIDE", "edited", "override_dir", "edited"),
    ("TORCH_RTX_ENGINE_CACHE", "off", "cache_built_engines", False),
    ("TORCH_RTX_ENGINE_CACHE", "0", "reuse_cached_engines", False),
    ("TORCH_RTX_CACHE_DIR", "caches", "engine_cache_dir", "caches"),
    ("TORCH_RTX_ENGINE_CACHE_SIZE", "2GiB", "engine_cache_size", 2 << 30),
    ("TORCH_RTX_CUDA_GRAPHS", "0", "cuda_graph_strategy", "disabled"),
    ("TORCH_RTX_CUDA_GRAPHS", "On", "cuda_graph_strategy", "whole_graph_capture"),
    ("TORCH_RTX_CUDA_GRAPHS", "disabled", "cuda_graph_strategy", "disabled"),
    ("TORCH_RTX_TACTICS", "split,kernel", "tactics", "split,kernel"),
    ("TORCH_RTX_SPECIALIZATION", "eager", "specialization_strategy", "eager"),
    ("TORCH_RTX_TUNING_SECONDS", "2.5", "tuning_seconds", 2.5),
    ("TORCH_RTX_WATCH_WEIGHTS", "false", "watch_weights", False),
    ("TORCH_RTX_WEIGHT_STREAMING_BUDGET", "50%", "weight_streaming_budget", "50%"),
    ("TORCH_RTX_WEIGHT_STREAMING_BUDGET", "4000", "weight_streaming_budget", 4000),
    ("TORCH_RTX_RUNTIME_CACHE", "off", "runtime_cache", "off"),
    ("TORCH_RTX_RUNTIME_CACHE_SIZE", "1048576", "runtime_cache_size", 1 << 20),
]
UNREADABLE = {
    "TORCH_RTX_FALLBACK_ON_ERROR": "maybe",
    "TORCH_RTX_TARGETS": "RTX 4090, nonsense",
    "TORCH_RTX_ENGINE_CACHE": "2",
    "TORCH_RTX_ENGINE_CACHE_SIZE": "50%",
    "TORCH_RTX_CUDA_GRAPHS": "sometimes",
    "TORCH_RTX_TACTICS": "split kernel",
    "TORCH_RTX_SPECIALIZATION": "1",
    "TORCH_RTX_TUNING_SECONDS": "nan",
    "TORCH_RTX_WATCH_WEIGHTS": "-1",
    "TORCH_RTX_WEIGHT_STREAMING_BUDGET": "half",
    "TORCH_RTX_RUNTIME_CACHE_SIZE": "0",
}
ANY_TEXT = {"DUMP", "OVERRIDE", "CACHE_DIR", "RUNTIME_CACHE", "EXECUTED_OPS", "DISABLED_PASSES"}
VARIABLES = {item.metadata["env"] for kind in (CompilationSettings, RuntimeSettings) for item in fields(kind)} - {""}


def made() -> dict[str, Any]:
    """The options without any that is given, by name."""
    return {item.name: getattr(found, item.name) for found in from_options() for item in fields(found)}


def test_every_variable_is_tested_here() -> None:
    assert {row[0] for row in READ} == VARIABLES
    assert UNREADABLE.keys() == VARIABLES - {f"TORCH_RTX_{name}" for name in ANY_TEXT}


@pytest.mark.quick
@pytest.mark.parametrize(("variable", "text", "option", "value"), READ)
def test_a_variable_is_a_default(
    variable: str, text: str, option: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_RTX_CACHE_DIR")  # of the test run
    before = made()
    monkeypatch.setenv(variable, text)
    after = made()
    assert after[option] == value
    same_variable = {row[2] for row in READ if row[0] == variable}
    assert {name for name in after if after[name] != before[name]} <= same_variable
    kind = CompilationSettings if option in [item.name for item in fields(CompilationSettings)] else RuntimeSettings
    assert getattr(kind(**{option: before[option]}), option) == before[option]  # what is given is stronger
    monkeypatch.setenv(variable, "")
    assert made() == before


@pytest.mark.parametrize(("variable", "text"), UNREADABLE.items())
def test_text_that_means_nothing(variable: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(SettingsError, match=f"environment variable {variable} is '{text}', which can't be read") as got:
        made()
    assert got.value.hint is not None
    assert got.value.hint.startswith("it must be ")


def test_misspelt_variables_are_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("TORCH_RTX_CUDA_GRAPH", "0")
    monkeypatch.setenv("TORCH_RTX_OF_AN_APPLICATION", "1")
    settings._warn_of_variables.cache_clear()
    with caplog.at_level(logging.WARNING, "torch_rtx"):
        made()
        made()
    assert caplog.messages == [
        "environment variable TORCH_RTX_CUDA_GRAPH has no effect: did you mean TORCH_RTX_CUDA_GRAPHS?"
    ]
    settings._warn_of_variables.cache_clear()
