"""Kernel replay: every kernel that the model zoo generates, before and after a change, compared byte for byte.

    python -m benchmarks.replay record before                     captures the zoo
    python -m benchmarks.replay record after --graphs before      generates from the graphs of a record; faster
    python -m benchmarks.replay diff before after                 exit status 1 where anything differs

A record is a folder with one file per case: a model of a size in a dtype, some also with a batch size that is known
only at run time. It holds the fused graph and, for every kernel of it and every SM version, the text of each form that
code generation offers, best first. Equal texts are stored once. No GPU and no compiler is used; `--graphs` needs no
torch.
"""

from __future__ import annotations

import argparse
import difflib
import gzip
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, Node, kernel_nodes
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.generate import forms
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.tactics import OWN
from torch_rtx.targets import arch_of

SMS = (75, 80, 86, 89, 90, 120)
DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
# Every model in f16, small and at full size; small ones of these also in the other dtypes, and with a symbolic batch.
OTHER_DTYPES = ("bert_base", "gpt2", "llama_decode", "mobilenet_v3", "resnet50", "whisper_encoder")
SYMBOLIC = ("bert_base", "gpt2", "resnet50", "swin_t", "vit_b_16")
SUFFIX = ".json.gz"
SHOWN = 3


@dataclass(frozen=True)
class Case:
    """One model of a size, "small" or "full", in a dtype, as `DTYPES` names it; `batch`: its batch size is a symbol."""

    model: str
    dtype: str
    size: str = "small"
    batch: bool = False

    @property
    def name(self) -> str:
        """The name of its file, without the suffix."""
        return f"{self.model}-{self.dtype}-{self.size}{'-batch' * self.batch}"


@dataclass(frozen=True)
class Record:
    """What one case generates.

    Attributes:
        graph: the text of the fused graph, without locations.
        forms: digests of texts; by op, SM version ("sm_80") and kind of form, best first.
        texts: by digest.
    """

    graph: str
    forms: dict[str, dict[str, dict[str, list[str]]]]
    texts: dict[str, str]

    def flat(self) -> dict[tuple[str, str, str, int], str]:
        """The digest of each form, by op, SM version, kind and index."""
        return {
            (op, sm, kind, index): digest
            for op, sms in self.forms.items()
            for sm, kinds in sms.items()
            for kind, digests in kinds.items()
            for index, digest in enumerate(digests)
        }


# ---- what code generation offers -------------------------------------------------------------------------------------


def offered(node: Node, sm: int) -> Iterator[tuple[str, Kernel | Graph | str]]:
    """The forms of a kernel node on an SM version, each with its kind, best first: nothing else here asks code
    generation. A graph is a body with kernels of its own, whose forms follow by themselves; a string is a remark."""
    assert node.body is not None
    found = forms(node.body, node.op, arch_of(sm))
    whole = next(((head, rest) for head, rest in found if OWN in head.kernels), None)
    own_us = inf if whole is None else whole[0].expected_us
    for tactic in () if whole is None else chain((whole[0],), whole[1]):
        yield "kernel", tactic.kernels[OWN]
    calls = [head.expected_us for head, _ in found if not head.kernels and head.body is None]
    yield "library", "none" if not calls else "faster" if calls[0] < own_us else "slower"
    for head, _ in found:
        if head.body is not None and (not head.kernels or head.expected_us <= own_us):
            yield head.kind, head.body


def text_of(form: Kernel | Graph | str) -> str:
    """All that a form is, as text: of a kernel its launch and its source."""
    if not isinstance(form, Kernel):
        return str(form).rstrip("\n") + "\n"
    flags = [name for name, is_set in (("wide", form.wide), ("early", form.trigger_early)) if is_set]
    launch = {
        "pointers": ", ".join(form.pointers),
        "scalars": ", ".join(map(str, form.scalars)),
        "grid": ", ".join(map(str, form.grid)),
        "options": ", ".join([f"{form.num_warps} warps", f"{form.num_stages} stages", *flags]),
    }
    return "".join(f"# {name}: {value}\n" for name, value in launch.items()) + form.source


# ---- recording -------------------------------------------------------------------------------------------------------


def cases(models: Sequence[str], dtypes: Sequence[str]) -> list[Case]:
    """The cases of some models; without `dtypes` those that a full record has."""
    if dtypes:
        return [Case(model, dtype) for model in models for dtype in dtypes]
    found = [Case(model, "f16", size) for size in ("full", "small") for model in models]  # what takes longest first
    found += [Case(model, dtype) for model in models if model in OTHER_DTYPES for dtype in ("bf16", "f32")]
    return found + [Case(model, "f16", batch=True) for model in models if model in SYMBOLIC]


def captured(case: Case) -> Graph:
    """The fused graph of a case, for a GPU."""
    import torch

    import torch_rtx
    from benchmarks import models

    dtype = getattr(torch, DTYPES[case.dtype])
    args, kwargs = models.inputs(case.model, case.size, dtype=dtype)
    model = models.without_weights(case.model, case.size, dtype=dtype)
    shapes = None
    if case.batch:
        dim = torch.export.Dim("batch", min=1, max=64)
        by_leaf = torch.utils._pytree.tree_map_only(torch.Tensor, lambda _: {0: dim}, (args, kwargs))
        shapes = dict(by_leaf[1]) if kwargs and not args else by_leaf[0]
    settings = torch_rtx.CompilationSettings(
        device="cuda", targets="later", cache_built_engines=False, reuse_cached_engines=False
    )
    return torch_rtx.compile(model, args, kwargs, dynamic_shapes=shapes, settings=settings).engine.graph


def unlocated(graph: Graph) -> Graph:
    """A graph without the places in the model that its nodes come from: these change with any line above them."""
    nodes = tuple(
        replace(node, loc=None, body=None if node.body is None else unlocated(node.body)) for node in graph.nodes
    )
    return replace(graph, nodes=nodes)


def record(graph: Graph, sms: Iterable[int] = SMS) -> Record:
    """What code generation offers for the kernels of a fused graph."""
    graph = unlocated(graph)
    found = Record(str(graph), {}, {})
    nodes = {node.op: node for node in kernel_nodes(graph)}
    for op in sorted(nodes):
        for sm in sms:
            _add(found, nodes[op], sm)
    return found


def _add(found: Record, node: Node, sm: int) -> None:
    kinds = found.forms.setdefault(node.op, {}).setdefault(f"sm_{sm}", {})

    def add(kind: str, text: str) -> None:
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        found.texts[digest] = text
        kinds.setdefault(kind, []).append(digest)

    try:
        for kind, form in offered(node, sm):
            add(kind, text_of(form))
            for inner in kernel_nodes(form) if isinstance(form, Graph) else ():
                _add(found, inner, sm)
    except Unsupported as error:
        add("unsupported", text_of(str(error)))


def write(found: Record, path: Path) -> None:
    """Writes a record; equal ones are equal files."""
    data = json.dumps(vars(found), sort_keys=True, indent=0)
    path.write_bytes(gzip.compress(data.encode(), mtime=0))


def read(path: Path) -> Record:
    """Reads what `write` wrote."""
    return Record(**json.loads(gzip.decompress(path.read_bytes())))


def _record_case(case: Case | Path, folder: Path) -> str:
    """Records a case, or the graph of a file of another record, in `folder`."""
    start = time.perf_counter()
    name = case.name.removesuffix(SUFFIX)
    found = record(parse(read(case).graph) if isinstance(case, Path) else captured(case))
    write(found, folder / (name + SUFFIX))
    return (
        f"{name:32} {len(found.forms):4} kernels {len(found.flat()):6} forms {len(found.texts):5} texts "
        f"{time.perf_counter() - start:6.1f} s"
    )


def record_all(wanted: Sequence[Case | Path], folder: Path, workers: int) -> None:
    """Records cases, or graphs of another record, in `folder`, in place of what it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*" + SUFFIX):
        old.unlink()
    write_one = partial(_record_case, folder=folder)
    if workers == 1:
        for line in map(write_one, wanted):
            print(line, flush=True)
        return
    # Workers start with nothing: torch has threads, which a fork would lose.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for line in pool.map(write_one, wanted):
            print(line, flush=True)


# ---- comparing -------------------------------------------------------------------------------------------------------


def difference(before: Record, after: Record) -> tuple[list[str], list[tuple[str, str, str]]]:
    """A line for each kernel and SM version that differs; and the texts, before and after, of the forms that do, equal
    pairs once, each with where it was met first."""
    lines = [] if before.graph == after.graph else ["the fused graph differs"]
    pairs = {} if before.graph == after.graph else {("graph", "graph"): ("graph", before.graph, after.graph)}
    old, new = before.flat(), after.flat()
    places: dict[tuple[str, str], list[str]] = {}
    for key in dict.fromkeys((*old, *new)):
        one, two = old.get(key, ""), new.get(key, "")
        if one != two:
            op, sm, kind, index = key
            mark = "added" if not one else "removed" if not two else "differs"
            places.setdefault((op, sm), []).append(f"{kind} {index} {mark}")
            where = f"{op} {sm} {kind} {index}"
            pairs.setdefault((one, two), (where, before.texts.get(one, ""), after.texts.get(two, "")))
    lines += [f"{op} {sm}: {', '.join(what)}" for (op, sm), what in places.items()]
    return lines, list(pairs.values())


def diff_all(before: Path, after: Path, shown: int = SHOWN) -> int:
    """Prints how two records differ, and returns the exit status."""
    names = sorted({path.name for folder in (before, after) for path in folder.glob("*" + SUFFIX)})
    if not names:
        print(f"error: neither {before} nor {after} holds a record", file=sys.stderr)
        return 2
    kernels = forms = differing = 0
    for name in names:
        case = name.removesuffix(SUFFIX)
        missing = [folder for folder in (before, after) if not (folder / name).exists()]
        if missing:
            print(f"{case}: not in {missing[0]}")
            differing += 1
            continue
        one, two = read(before / name), read(after / name)
        kernels, forms = kernels + len(two.forms), forms + len(two.flat())
        lines, pairs = difference(one, two)
        differing += len(lines)
        for line in lines:
            print(f"{case}: {line}")
        for where, *texts in pairs[:shown]:
            old, new = (text.splitlines(keepends=True) for text in texts)
            sys.stdout.writelines(difflib.unified_diff(old, new, f"before/{where}", f"after/{where}"))
        shown = max(0, shown - len(pairs))
    print(f"{len(names)} cases, {kernels} kernels, {forms} forms: {differing or 'no'} differences")
    return int(differing > 0)


# ---- the command line ------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        "python -m benchmarks.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    make = commands.add_parser("record", help="record what the zoo generates")
    make.add_argument("folder", type=Path)
    make.add_argument("--graphs", type=Path, help="a record whose fused graphs are taken, and its cases")
    make.add_argument("--models", help="comma-separated; default: all")
    make.add_argument("--dtypes", help=f"comma-separated, of {', '.join(DTYPES)}; default: f16, and some in all")
    make.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    show = commands.add_parser("diff", help="compare two records")
    show.add_argument("before", type=Path)
    show.add_argument("after", type=Path)
    show.add_argument("--shown", type=int, default=SHOWN, help="how many texts are shown as unified diffs")
    return top


def _cases(options: argparse.Namespace) -> Sequence[Case | Path]:
    models = options.models.split(",") if options.models else []
    dtypes = options.dtypes.split(",") if options.dtypes else []
    if options.graphs is None:
        from benchmarks.models import names

        return cases(models or names(), dtypes)
    # Cases of other makers too: a name begins with model and dtype.
    words = {path: path.name.removesuffix(SUFFIX).split("-") for path in sorted(options.graphs.glob("*" + SUFFIX))}
    return [
        path
        for path, (model, dtype, *_) in words.items()
        if (not models or model in models) and (not dtypes or dtype in dtypes)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    options: Any = parser().parse_args(arguments)
    if options.command == "diff":
        return diff_all(options.before, options.after, options.shown)
    if not (wanted := _cases(options)):
        print("error: no case has this name", file=sys.stderr)
        return 2
    record_all(wanted, options.folder, options.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
