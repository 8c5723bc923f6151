"""Every model of the zoo through torch.compile(backend="rtx"), against eager, without any fallback; some of them again
from the engine cache."""

import pytest
import torch

from tests.helpers.caching import Traffic
from tests.helpers.compiled import counted, same

pytest.importorskip("transformers")

from benchmarks import models

TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}
# Capturing a graph of any batch size takes longest, so one model of images, text and sound each has one, and of these a
# hit of the cache, which needs it again, the one whose weights are tied and the one that has buffers: the others have
# the layers of these. tests/lowering/test_dynamic_models.py has more of them, ahead of time.
ANY_BATCH = {"resnet50", "gpt2", "whisper_encoder"}
AGAIN = {"resnet50", "gpt2"}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def tensors(result):
    """The tensors of a model's result, in order: transformers' result classes are dicts, and differ in nothing else."""
    leaves = torch.utils._pytree.tree_leaves(dict(result) if hasattr(result, "keys") else result)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


# What their engines compute is compared with eager's in tests/lowering/test_kernel_models.py.
ELSEWHERE = {"sd15_unet", "mobilenet_v2", "mobilenet_v3", "flux_dit", "qwen3", "swin_t"}


@pytest.mark.parametrize("name", [name for name in models.names() if name not in ELSEWHERE])
def test_model(name, caplog):
    """Two calls with other inputs; those of `ANY_BATCH` get two more batch sizes, in one more graph. Those of `AGAIN`
    get both graphs from the engine cache, whose results are the same bit for bit."""
    traffic = Traffic(caplog)
    model, args, kwargs = models.build(name)
    options = {"require_full_compilation": True}
    compiled, counter = counted(model, options=options)
    state = {key: tensor.clone() for key, tensor in model.named_buffers()}

    def results(call, args, kwargs):
        for key, buffer in model.named_buffers():
            buffer.copy_(state[key])
        return [*tensors(call(*args, **kwargs)), *(buffer.clone() for buffer in model.buffers())]

    def check(args, kwargs):
        same(results(compiled, args, kwargs), results(model, args, kwargs), **TOLERANCE)

    check(args, kwargs)
    check(*models.inputs(name, seed=1))
    assert counter.frame_count == 1
    calls = [(args, kwargs)]
    if name in ANY_BATCH:
        calls.append(models.inputs(name, batch=3, seed=2))
        check(*calls[-1])
        check(*models.inputs(name, batch=5, seed=3))
        assert counter.frame_count == 2
    assert traffic.counts == (0, len(calls))
    if name not in AGAIN:
        return

    built = [results(compiled, *call) for call in calls]
    torch._dynamo.reset()
    cached, _ = counted(model, options=options)
    for call, expected in zip(calls, built, strict=True):
        assert all(map(torch.equal, results(cached, *call), expected))
    assert traffic.counts == (len(built), len(calls))
