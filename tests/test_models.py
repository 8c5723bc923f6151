"""Every model of the zoo through torch.compile(backend="rtx"), against eager, without any fallback."""

import pytest
import torch

from tests.compiled import counted, same

pytest.importorskip("transformers")

from benchmarks import models

TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}


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


@pytest.mark.parametrize("name", models.names())
def test_model(name):
    """Two calls with other inputs; where the model takes any batch size, two more with others, in one more graph."""
    model, args, kwargs = models.build(name)
    compiled, counter = counted(model, options={"require_full_compilation": True})
    state = {key: tensor.clone() for key, tensor in model.named_buffers()}

    def check(args, kwargs):
        results = []
        for call in (model, compiled):
            for key, buffer in model.named_buffers():
                buffer.copy_(state[key])
            results.append(tensors(call(*args, **kwargs)))
            results.append([buffer.clone() for buffer in model.buffers()])
        same(results[2:], results[:2], **TOLERANCE)

    check(args, kwargs)
    check(*models.inputs(name, seed=1))
    assert counter.frame_count == 1
    if models.spec(name).dynamic_batch:
        check(*models.inputs(name, batch=3, seed=2))
        check(*models.inputs(name, batch=5, seed=3))
        assert counter.frame_count == 2
