"""Notices that tensors changed, however they were written.

Every in-place operation on a tensor moves its version counter. Writes through `.data`, through NumPy, through a buffer
that the tensor is a part of, or by another process do not. So some words of each tensor are compared as well: all of a
small one, else a sample that is spread evenly over its memory. Tensors on CUDA are compared there, by a kernel before
the work of the call.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from operator import attrgetter

import torch

from torch_rtx import aten
from torch_rtx.runtime.driver import driver
from torch_rtx.runtime.words import Words

# Words in the sample of all tensors together, and of each at least. A word that is read takes 32 bytes of traffic.
HOST_WORDS, DEVICE_WORDS, LEAST_WORDS = 1 << 13, 1 << 16, 32
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_VERSION, _HOST = attrgetter("_version"), torch.device("cpu")


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equality of values that takes NaN for equal to itself, and zeros of both signs for different."""
    return torch.equal(_words(one), _words(other))


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of `tensor` as integers."""
    tensor = tensor.resolve_conj().resolve_neg()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.view(_WORDS[tensor.element_size()])


class Watch:
    """Follows named tensors.

    Args:
        sampled: compare values, too, and not version counters alone.
        beside: compare those in host memory beside a call, too, which then runs on a device.

    Attributes:
        partial: values are compared, but not all words of all tensors.
        late: what is compared between `launch` and `wait`.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], sampled: bool, beside: bool = False) -> None:
        self._names, self._tensors = tuple(tensors), tuple(tensors.values())
        self._stamps = _stamps(self._tensors)
        groups: dict[torch.device, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items() if sampled else ():
            if _has_words(tensor):
                groups.setdefault(tensor.device, {})[name] = tensor
        host: list[Sample] = [Sample(groups.pop(_HOST), HOST_WORDS)] if _HOST in groups else []
        # Without the driver API, the host waits for the device.
        kind = Sample if driver() is None else DeviceSample
        devices: list[Sample] = [kind(found, DEVICE_WORDS) for found in groups.values()]
        self.late, self._early = ([*devices, *host], []) if beside else (devices, host)
        exact = sum(sample.count for sample in (*devices, *host) if sample.exact)
        self.partial = sampled and exact < len(tensors)

    def changed(self) -> bool:
        """Whether a tensor may have changed since `take`, as far as can be told before the call."""
        return _stamps(self._tensors) != self._stamps or any(sample.differs() for sample in self._early)

    def take(self, everything: bool = False) -> set[str]:
        """The names of the tensors that changed, whose present values are now taken for known.

        A write that no counter tells of rarely comes alone, so that it counts for all tensors.
        """
        stamps = _stamps(self._tensors)
        names = {n for n, now, before in zip(self._names, stamps, self._stamps, strict=True) if now != before}
        self._stamps = stamps
        self._sample(names)
        if everything or any(sample.differs() for sample in self._early):
            names = set(self._names)
            self._sample(names)
        return names

    def _sample(self, names: Collection[str]) -> None:
        for sample in (*self.late, *self._early):
            sample.take(names)

    def launch(self) -> None:
        """Begin the late comparisons; on a device after what is queued on its current stream."""
        for sample in self.late:
            sample.launch()

    def wait(self) -> bool:
        """End the late comparisons; True if a tensor changed since `take`."""
        found = [sample.wait() for sample in self.late]  # for all of them: they still read the tensors
        return any(found)

    def late_differs(self) -> bool:
        """Do the late comparisons now; True if a tensor changed since `take`."""
        self.launch()
        return self.wait()

    def differs(self) -> bool:
        """Compare everywhere now."""
        return self.late_differs() or self.changed()


class Sample:
    """Known values of words of tensors on one device.

    Attributes:
        count: how many tensors.
        exact: these are all their words.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], words: int) -> None:
        self.count, self.device = len(tensors), next(iter(tensors.values())).device
        parts = {name: _comb(tensor, max(LEAST_WORDS, words // len(tensors))) for name, tensor in tensors.items()}
        self.exact = all(part.stride() == (1,) for part in parts.values())
        self._keep(parts)

    def _keep(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Take the present values of the sampled parts of all tensors for known."""
        # By dtype of the words: the parts of tensors, and their known values, as one tensor and for each.
        self._groups: list[tuple[list[torch.Tensor], torch.Tensor]] = []
        self._kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        with torch.inference_mode(False):
            for dtype in dict.fromkeys(part.dtype for part in parts.values()):
                group = {name: part for name, part in parts.items() if part.dtype == dtype}
                kept = torch.cat(list(group.values()))
                self._groups.append((list(group.values()), kept))
                pieces = kept.split([part.numel() for part in group.values()])
                self._kept |= {name: (k, p) for (name, p), k in zip(group.items(), pieces, strict=True)}

    def take(self, names: Collection[str]) -> None:
        """Take the present values of these tensors for known."""
        if len(self._kept.keys() & names) == self.count:
            for parts, kept in self._groups:
                torch.cat(parts, out=kept)
            return
        for name in self._kept.keys() & names:
            known, now = self._kept[name]
            known.copy_(now)

    def differs(self) -> bool:
        """Compare now. A tensor of its own for each comparison, as several threads may compare."""
        return not all(torch.equal(torch.cat(parts), kept) for parts, kept in self._groups)

    def launch(self) -> None:
        """Begin a comparison."""

    def wait(self) -> bool:
        """End it; True if a word differed."""
        return self.differs()


class DeviceSample(Sample):
    """A sample on a CUDA device, by kernels; the host waits only in `wait`. The caller keeps the tensors."""

    def _keep(self, parts: Mapping[str, torch.Tensor]) -> None:
        addresses = [_addresses(part) for part in parts.values()]
        self._words = Words(torch.cat(addresses), self.device)
        ends = list(accumulate(map(len, addresses), initial=0))
        self._ranges = {name: (end, len(own)) for name, end, own in zip(parts, ends, addresses, strict=False)}
        self.take(parts)

    def take(self, names: Collection[str]) -> None:
        """Take the present values of these tensors for known."""
        taken = [span for name, span in self._ranges.items() if name in names]
        if len(taken) == self.count:
            taken = [(0, sum(count for _, count in taken))]
        with _current(self.device):
            for start, count in taken:
                self._words.record(start, count)

    def differs(self) -> bool:
        """Compare now."""
        self.launch()
        return self.wait()

    def launch(self) -> None:
        """Let a comparison be after what is queued on the current stream."""
        with _current(self.device):
            self._words.mark()

    def wait(self) -> bool:
        """Compare, beside what was queued since the last launch of this thread; True if a word differed."""
        with _current(self.device):
            return self._words.differ()


def captures(device: torch.device) -> bool:
    """Whether the caller captures what is queued on `device`, where nothing can be compared then."""
    if device.type != "cuda":
        return False
    with _current(device):
        return torch.cuda.is_current_stream_capturing()


def _current(device: torch.device) -> AbstractContextManager[object]:
    return nullcontext() if torch._C._cuda_getDevice() == device.index else torch.cuda.device(device)


def _addresses(part: torch.Tensor) -> torch.Tensor:
    """The addresses of words of 4 bytes that `part` has elements in: all if it is contiguous, else one per element."""
    start, size = part.data_ptr(), part.element_size()
    if part.stride() == (1,):
        return torch.arange(start // 4 * 4, start + size * len(part), 4)
    index = torch.arange(len(part))
    within = index * 4 % size if size > 4 else 0  # each word of large elements in turn
    return (start + index * (part.stride(0) * size) + within) // 4 * 4


def _has_words(tensor: torch.Tensor) -> bool:
    """A plain tensor with values in memory. Version counters say nothing of inference tensors, which are always taken
    for changed."""
    if type(tensor) is not torch.Tensor or tensor.is_inference() or tensor.device.type not in ("cpu", "cuda"):
        return False
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return False
    return tensor.numel() > 0 and tensor.element_size() in _WORDS


def _comb(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """About `count` words, at equal distances from the first to the last element in memory. No dim of the tensor
    divides the distance: a comb of a matrix is not one of its columns."""
    extent = aten.extent(tensor.shape, tensor.stride())
    step = max(1, extent // count)
    while math.gcd(step, extent) > 1:
        step -= 1
    return tensor.as_strided((-(-extent // step),), (step,)).view(_WORDS[tensor.element_size()])


def _stamps(tensors: Sequence[torch.Tensor]) -> list[object]:
    """A stamp per tensor that changes with its contents: the version counter. An inference tensor has none, and its
    stamp always changes."""
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:
        return [object() if tensor.is_inference() else tensor._version for tensor in tensors]
