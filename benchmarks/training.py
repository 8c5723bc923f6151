"""Models in training, as users' scripts have them: labels and losses, LoRA, activation checkpointing, right gradients.

The loss is computed in the model's forward, and so in the compiled callable, where that takes `labels`, as models of
`transformers` do: the cross entropy of language models, whose labels are their inputs, and of classifiers, whose labels
are random. Elsewhere it is computed after the call: the squared distance to noise of a denoiser, the mean square of
any other result.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel

from benchmarks import timing
from benchmarks.cases import Job
from benchmarks.models import Inputs
from benchmarks.numerics import tensors, widened
from benchmarks.peers import PEERS, Prepared, Subject
from benchmarks.suites import common
from torch_rtx.runtime.candidate_check import tolerance

CHECKPOINTED = frozenset({"llama"})
LOW_RANK = frozenset({"sd15_unet"})
RANK = 4  # the default of diffusers' scripts
GROSS = 0.5  # relative error of one parameter's gradient that is wrong, if eager's is not of this size
FAINT = 1e-3  # of the norm of all gradients: one with less, as of keys' biases, can be nothing but rounding errors


class LowRank(nn.Module):
    """A frozen linear layer with a trained low-rank term beside it (Hu et al., LoRA, 2021).

    The term is random and not zero as in a fresh adapter, where one of its two factors has no gradient.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        where = {"device": base.weight.device, "bias": False}
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, RANK, **where), nn.Linear(RANK, base.out_features, **where)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def _adapted(model: nn.Module) -> nn.Module:
    """LoRA of all attention projections, in float32. What is frozen is in bfloat16 on a GPU, where autocast uses it so
    in any case."""
    model.requires_grad_(False)
    if next(model.parameters()).is_cuda:
        model.to(torch.bfloat16)
    for module in list(model.modules()):
        for name in ("q", "k", "v", "out"):
            layer = getattr(module, name, None)
            if isinstance(layer, nn.Linear):
                setattr(module, name, LowRank(layer))
    return model


def _classifier(encoder: BertModel) -> nn.Module:
    with encoder.device:
        model = BertForSequenceClassification(encoder.config)
    model.bert = encoder
    return model


def learner(name: str, model: nn.Module) -> nn.Module:
    """The zoo's model `name` as it is trained: with a head, LoRA or activation checkpointing, but without dropout, so
    that its gradients can be compared."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(model, BertModel):
            model = _classifier(model)
        if name in LOW_RANK:
            model = _adapted(model)
    if name in CHECKPOINTED:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return traceable(without_dropout(model)).train()


def without_dropout(model: nn.Module) -> nn.Module:
    """The model, which drops nothing any more in training."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_prob"):  # of whole residual branches
            module.drop_prob = 0.0
    return model


def traceable(model: nn.Module) -> nn.Module:
    """The model, told what its first forward would find out with a side effect, which is no part of a graph."""
    if getattr(model, "loss_type", "") is None:
        model.loss_type = "ForCausalLM"
    if hasattr(model, "classifier") and hasattr(model, "config"):
        model.config.problem_type = "single_label_classification"
    return model


def labelled(model: nn.Module, inputs: Inputs, seed: int) -> Inputs:
    """Inputs of a call of a learner; with `labels` where it takes some."""
    args, kwargs = inputs
    if "labels" not in inspect.signature(model.forward).parameters:
        return inputs
    labels = kwargs.get("decoder_input_ids", kwargs.get("input_ids"))
    if hasattr(model, "classifier"):
        (first, *_) = tensors(inputs)
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(model.config.num_labels, first.shape[:1], generator=generator).to(first.device)
    return args, {**kwargs, "labels": labels}


def loss(result: Any, args: tuple[Any, ...] = ()) -> Tensor:
    """The loss of a call with `args`, a scalar; a denoiser's latents stand in for the noise that it looks for."""
    own = getattr(result, "loss", None)
    if own is not None:
        return own
    if isinstance(result, Tensor) and args and args[0].shape == result.shape:
        return F.mse_loss(_wide(result), _wide(args[0]))
    return sum(_wide(t).square().mean() for t in tensors(result) if t.requires_grad)  # type: ignore[return-value]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@contextmanager
def autocast(device: str) -> Iterator[None]:
    """As training scripts for GPUs have it; nothing on the CPU."""
    with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
        yield


class Lesson:
    """A workload in training: the model, sets of inputs with labels, and what gradients of the first set are right.

    Attributes:
        model: each peer trains a copy of it, see `pupil`.
    """

    def __init__(self, setup: common.Setup) -> None:
        self.setup, self.device = setup, setup.device
        self.model = learner(setup.workload.model, setup.subject.model)
        self.sets = [labelled(self.model, inputs, seed) for seed, inputs in enumerate(setup.sets)]
        self._expected: tuple[dict[str, Tensor], dict[str, float], float] | None = None

    def pupil(self, peer: str) -> tuple[Prepared, nn.Module]:
        """A copy of the model that a peer has prepared, and the copy."""
        own = copy.deepcopy(self.model)
        args, kwargs = self.sets[0]
        subject = Subject(own, args, kwargs, self.setup.subject.folder, self.device)
        return PEERS[peer].prepare(subject), own

    def loss(self, prepared: Prepared, index: int = 0) -> Tensor:
        """The loss of one set of inputs, under autocast."""
        args, kwargs = self.sets[index]
        with autocast(self.device):
            return loss(prepared(*args, **kwargs), args)

    def gradients(self, prepared: Prepared, model: nn.Module) -> dict[str, Tensor]:
        """The gradients of one step by parameter, none of which are left; running statistics end as they began."""
        state = [buffer.clone() for buffer in model.buffers()]
        self.loss(prepared).backward()
        return _taken(model, state)

    def check(self, found: dict[str, Tensor]) -> None:
        """Compare gradients with those of a wider dtype: all together by the criterion of `numerics`, and each for
        gross errors, which would not show among all the others.

        Raises:
            WrongResult: they are wrong, or others are there than eager's.
        """
        exact, eagers, eager = self.expected()
        each, together = errors(found, exact)
        limit = max(2 * eager, tolerance(torch.float32))
        if not together <= limit:
            raise common.WrongResult(f"wrong gradients: error {together:.2e}, eager's allows {limit:.2e}")
        for name, error in each.items():
            if not error <= max(4 * eagers[name], GROSS):
                raise common.WrongResult(f"wrong gradient of {name}: error {error:.2e}, eager's is {eagers[name]:.2e}")

    def expected(self) -> tuple[dict[str, Tensor], dict[str, float], float]:
        """The gradients in a wider dtype, and the errors of eager's as `errors` has them."""
        if self._expected is None:
            exact = self._exact()
            self._expected = exact, *errors(self.gradients(self.model, self.model), exact)
        return self._expected

    def _exact(self) -> dict[str, Tensor]:
        """Float64 on the CPU. On a GPU float32, whose errors are nothing beside those of bfloat16: float64 would take
        most of the time of all peers."""
        dtype = torch.float32 if self.device == "cuda" else torch.float64
        wide = copy.deepcopy(self.model).to(dtype)
        args, kwargs = widened(self.sets[0], dtype)
        cudnn = torch.backends.cudnn
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
            loss(wide(*args, **kwargs), args).backward()
        return _taken(wide, [])

    def step(self, prepared: Prepared, model: nn.Module) -> timing.Call:
        """A training step: forward, backward and AdamW, on the next set of inputs each time."""
        learned = [p for p in model.parameters() if p.requires_grad]
        # So small a rate that the numbers stay in their range however many steps are measured.
        optimizer = torch.optim.AdamW(learned, lr=1e-7, fused=self.device == "cuda")
        indices = itertools.cycle(range(len(self.sets)))

        def step() -> None:
            self.loss(prepared, next(indices)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


def _taken(model: nn.Module, state: list[Tensor]) -> dict[str, Tensor]:
    """The gradients of a model, which loses them; buffers get the values of `state`."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), state, strict=False):
            buffer.copy_(value)
    return found


@torch.no_grad()
def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[dict[str, float], float]:
    """The relative error of each gradient, and of all as one vector.

    Raises:
        WrongResult: parameters have a gradient in only one of the two.
    """
    if found.keys() != exact.keys():
        names = ", ".join(sorted(found.keys() ^ exact.keys())[:3])
        raise common.WrongResult(f"wrong gradients: only one of peer and reference has those of {names}")
    off = torch.stack([(found[name].double() - right.double()).norm() for name, right in exact.items()]).cpu()
    size = torch.stack([right.double().norm() for right in exact.values()]).cpu()
    each = off / size.clamp_min(FAINT * float(size.norm()))
    return dict(zip(exact, each.tolist(), strict=True)), float(off.norm() / size.norm())


@contextmanager
def set_up(job: Job) -> Iterator[Lesson]:
    """A `Lesson`, and its folder until the end."""
    with common.set_up(job) as setup, torch.enable_grad():
        yield Lesson(setup)
