"""torch.compile(optimizer.step, backend="rtx") for what torch.optim has: parameters are eager's after each step."""

import inspect

import pytest
import torch

from tests.helpers.compiled import compile_rtx, same

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
IN_PYTORCH = {"Adafactor", "LBFGS", "SparseAdam"}  # Dynamo finds nothing to compile in their steps


def variants():
    """Each optimizer, for-loop and foreach, and whether its learning rate is a tensor, which a scheduler changes."""
    found = []
    for name, kind in OPTIMIZERS.items():
        known = inspect.signature(kind.__init__).parameters
        for foreach in (False, True) if "foreach" in known else (None,):
            given = {} if foreach is None else {"foreach": foreach}
            refused = name in ("Adam", "AdamW") and foreach  # unless capturable, which needs a GPU
            tensor = not refused and name not in ("Muon", *IN_PYTORCH)  # Muon computes in bfloat16: steps differ more
            found.append(pytest.param(kind, given, tensor, id=f"{name}{'-foreach' * bool(foreach)}"))
    return found


def trained(kind, given, tensor, compiles):
    torch.manual_seed(0)
    sparse = kind is torch.optim.SparseAdam
    model = torch.nn.Embedding(3, 2, sparse=True) if sparse else torch.nn.Linear(3, 2, bias=False)
    x = torch.tensor([0, 2, 2]) if sparse else torch.randn(2, 3)
    optimizer = kind(model.parameters(), lr=torch.tensor(0.01) if tensor else 0.01, **given)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) if tensor else None

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    step = compile_rtx(optimizer.step, fullgraph=False) if compiles else optimizer.step
    for _ in range(2):
        if kind is torch.optim.LBFGS:
            step(closure)
        else:
            closure()
            step()
        if scheduler is not None:
            scheduler.step()
    return dict(model.named_parameters())


@pytest.mark.parametrize(("kind", "given", "tensor"), variants())
def test_steps(kind, given, tensor, recorder):
    expected = trained(kind, given, tensor, False)
    same(trained(kind, given, tensor, True), expected, atol=1e-6, rtol=1e-5)
    assert recorder.fallbacks == []
    assert bool(len(recorder)) == (kind.__name__ not in IN_PYTORCH)
