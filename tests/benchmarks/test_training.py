"""Models in training: their labels and losses, and wrong gradients, which are no result."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from benchmarks import cases, models, training
from benchmarks.cases import Job, Workload
from benchmarks.suites import train
from benchmarks.suites.common import WrongResult, of_best

SMALL = {w.model: replace(w, dtype="float32") for w in cases.workloads([], "small", "cpu", cases.TRAINED)}


@pytest.fixture(scope="module")
def lesson() -> Iterator[training.Lesson]:
    with training.set_up(Job("train", SMALL["bert_base"], ("eager",), "cpu", 1)) as found:
        yield found


def learner(workload: Workload) -> tuple[nn.Module, models.Inputs]:
    model, args, kwargs = models.build(workload.model, "small")
    model = training.learner(workload.model, model)
    return model, training.labelled(model, (args, kwargs), 0)


@pytest.mark.parametrize("name", ["gpt2", "vit_b_16", "bert_base", "llama"])
def test_cross_entropy(name: str) -> None:
    """Of the next token, or of a class; the model itself computes it."""
    model, (args, kwargs) = learner(SMALL[name])
    result = model(*args, **kwargs)
    logits, labels = result.logits, kwargs["labels"]
    if logits.dim() == 3:
        assert labels is kwargs["input_ids"]
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(training.loss(result), expected)


def test_low_rank() -> None:
    """Only the adapters learn, four in each attention, and all of them do."""
    model, (args, kwargs) = learner(SMALL["sd15_unet"])
    assert "labels" not in kwargs
    training.loss(model(*args, **kwargs), args).backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {name for name, module in model.named_modules() if isinstance(module, training.LowRank)}
    assert len(learned) == 2 * len(adapters) == 2 * 4 * sum(name.endswith(".q") for name in adapters)


def test_checkpointing() -> None:
    """Llama's layers keep their inputs alone."""
    model, (args, kwargs) = learner(SMALL["llama"])
    kept: dict[bool, int] = {}
    for enabled in (True, False):
        found: list[torch.Tensor] = []
        if not enabled:
            model.gradient_checkpointing_disable()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, found=found: found.append(t) or t, lambda t: t):
            model(*args, **kwargs)
        kept[enabled] = len(found)
    assert kept[True] < kept[False] / 2


def test_wrong_gradients(lesson: training.Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    own = copy.deepcopy(lesson.model)
    right = lesson.gradients(own, own)
    lesson.check(right)
    assert all(p.grad is None for p in own.parameters())
    bias = "classifier.bias"
    with pytest.raises(WrongResult, match=r"error 1.00e-03, eager's allows"):
        lesson.check({name: 1.001 * gradient for name, gradient in right.items()})
    with pytest.raises(WrongResult, match=f"only one of peer and reference has those of {bias}"):
        lesson.check({name: gradient for name, gradient in right.items() if name != bias})
    with pytest.raises(WrongResult, match="error nan"):
        lesson.check({**right, bias: torch.full_like(right[bias], torch.nan)})
    # With the errors of half precision one small gradient does not show among all, but by itself.
    exact, each, _ = lesson.expected()
    monkeypatch.setattr(lesson, "expected", lambda: (exact, dict.fromkeys(each, 0.02), 0.02))
    lesson.check({name: 1.01 * gradient for name, gradient in right.items()})
    with pytest.raises(WrongResult, match=f"wrong gradient of {bias}: error 1.00e"):
        lesson.check({**right, bias: torch.zeros_like(right[bias])})


@pytest.mark.gpu
def test_peak_of_a_graph() -> None:
    """Memory that only a graph's pool can use is a peer's, though PyTorch takes none of it for allocated."""
    held = train.reserved("cuda")
    x, pool, graph = torch.ones(16 << 20, device="cuda"), torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        x.copy_((x + 1) * 2)
    found = train.peak(graph.replay, held, "cuda")
    assert found["allocated_peak_bytes"] < 1.1 * x.nbytes
    assert found["peak_bytes"] >= 2.9 * x.nbytes


def test_best_other_peer() -> None:
    assert of_best({"eager": 4.0, "inductor": 2.0, "rtx": 1.0}) == {"eager": 2.0, "inductor": 1.0, "rtx": 0.5}
    assert of_best({"rtx": 1.0}) == {}
