"""docs/ says what the code says: settings, public names, error messages, the IR example."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

import torch_rtx
from tests.helpers.sources import nodes
from tests.paths import ROOT
from torch_rtx import settings
from torch_rtx.ir import kernel_nodes, verify
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.lowering.kernels.region import region
from torch_rtx.lowering.pipeline import PASSES, PIPELINE
from torch_rtx.targets import ARCHES, PORTABLE, PTX, Arch, arch_of, by_age, lacks, parse_targets

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SHORT = 2500  # words that a newcomer reads in fifteen minutes


def table_in(page: str, heading: str = "") -> str:
    """The first table of a page, or of what follows a heading of it."""
    text = (DOCS / page).read_text()
    lines = text[text.index(heading) :].splitlines(keepends=True)
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    end = next(index for index in range(start, len(lines)) if not lines[index].startswith("|"))
    return "".join(lines[start:end])


def rows_of(table: str) -> list[list[str]]:
    """The cells of a table below its head, without quotes."""
    lines = table.splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.quick
def test_settings_table() -> None:
    assert table_in("settings.md") == settings.table(), "docs/settings.md: paste settings.table()"


def test_settings_name_modes_and_required_passes() -> None:
    text = (DOCS / "settings.md").read_text()
    required = ", ".join(f"`{step.name}`" for step in PIPELINE if step.required)
    assert f"{required} can't be skipped" in text, "docs/settings.md: name the passes that no option skips"
    assert [mode for mode in settings.MODES if f"`{mode}`" not in text] == [], "docs/settings.md: explain these modes"


@pytest.mark.quick
def test_passes_table() -> None:
    page = "architecture/ir-and-passes.md"
    named = [name for name, _ in rows_of(table_in(page, "## The passes"))]
    assert named == list(PASSES), f"docs/{page}: a row for each pass, in the order of pipeline.py"


def test_portable_gpus() -> None:
    """support.md says of which GPUs the portable set has kernels."""
    rows = rows_of(table_in("support.md", "| GPU |"))
    named = [target for _, name, marked in rows if marked == "yes" for target in parse_targets(name)]
    binaries = [target for target in PORTABLE if not target.ptx]
    assert by_age(named) == binaries, "docs/support.md: the rows of GPUs marked `yes` are those of the portable set"
    assert {name for _, name, _ in rows} == {f"sm_{sm}" for sm in ARCHES}
    for gpus, name, marked in rows:
        assert {target for gpu in gpus.split(", ") for target in parse_targets(gpu)} == set(parse_targets(name)), gpus
        sm = int(name.removeprefix("sm_"))
        family = [target.sm for target in binaries if target.sm // 10 == sm // 10 and target.sm < sm]
        runs = f"as sm_{family[-1]}" if family and not ARCHES[sm].exact else "as PTX" if sm >= PTX.sm else "no: name it"
        assert marked in ("yes", runs), gpus


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = (head, ("---",) * len(head), *rows)
    return "".join(f"| {' | '.join(cells)} |\n".replace("| --- ", "|---").replace("--- |", "---|") for cells in lines)


def dtypes_table() -> str:
    """How kernels of each SM version multiply, by its record in targets.py."""

    def multiplied(arch: Arch) -> Iterator[str]:
        cores = "tensor cores"
        yield cores  # f16 and int8, from Turing on
        yield "no" if lacks(arch, "bf16") else cores
        sums = "" if "fp8_in_f32" in arch.features else ", partial sums"
        yield "as float16" if lacks(arch, "f8e4m3fn") else f"{cores}{sums}"
        wide = "nvfp4 as float16" if lacks(arch, "bf16") else "as bfloat16 or float16"
        yield cores if "block_scale" in arch.features else wide

    head = ("target", "float16, int8", "bfloat16", "float8", "mxfp8, mxfp4, nvfp4")
    return table(head, ((f"`sm_{sm}`", *multiplied(arch)) for sm, arch in ARCHES.items()))


def features_table() -> str:
    """What kernels of each SM version use, by its record in targets.py."""
    named = {
        "cp_async": "asynchronous copies",
        "wgmma": "warpgroup products",
        "griddepcontrol": "programmatic dependent launch",
    }
    head = ("target", *named.values(), "shared memory of a block", "its binaries run on")
    marks = {True: "yes", False: "no"}
    rows = []
    for sm, arch in ARCHES.items():
        later = [one for one in ARCHES if one // 10 == sm // 10 and one > sm and not arch.exact]
        runs_on = ", ".join(f"`sm_{one}`" for one in (sm, *later)) if arch.like is None else "none: PTX"
        used = (marks[name in arch.features] for name in named)
        rows.append((f"`sm_{sm}`", *used, f"{arch.shared >> 10} KiB", runs_on))
    return table(head, rows)


@pytest.mark.parametrize("made", [dtypes_table, features_table])
def test_support_matrix(made: Callable[[], str]) -> None:
    assert made() in (DOCS / "support.md").read_text(), f"docs/support.md: put the result of {made.__name__}() there"


def test_extras() -> None:
    """install.md explains every extra, and lists the packages of those that users need."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = {name: packages for name, packages, _ in rows_of(table_in("install.md", "| extra |"))}
    named = {name for names in rows for name in names.split(", ")}
    assert set(extras) <= named, "docs/install.md: a row for each extra"
    for name, packages in extras.items():
        needed = [re.split(r"[<>=]", package)[0] for package in packages]
        assert name not in rows or all(package in rows[name] for package in needed), f"docs/install.md: {name}"
    shown = "\n".join(page.read_text() for page in (ROOT / "README.md", *PAGES))
    used = {name for names in re.findall(r"\.\[([\w,]+)\]'", shown) for name in names.split(",")}
    assert used <= named, "docs/install.md: a row for each extra that a command installs"


def test_defaults_in_prose() -> None:
    """Pages name defaults of options that they explain, and what the package needs."""
    engine, runtime = settings.CompilationSettings(), settings.RuntimeSettings()
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch = next(name for name in needs["dependencies"] if name.startswith("torch"))
    for page, text in (
        ("docs/caching.md", f"{engine.engine_cache_size >> 30} GiB by default"),
        ("docs/caching.md", f"{runtime.runtime_cache_size >> 20} MiB by default"),
        ("docs/dynamic-shapes.md", f"({runtime.specialized_shapes} combinations, `specialized_shapes`)"),
        ("docs/dynamic-shapes.md", f"({runtime.cuda_graph_pool_size}, `cuda_graph_pool_size`)"),
        ("README.md", f"Python {needs['requires-python'].removeprefix('>=')} or later"),
        ("docs/install.md", f"Python {needs['requires-python'].removeprefix('>=')} or later"),
        ("docs/install.md", f"PyTorch {torch.removeprefix('torch>=')} or later"),
        ("README.md", f"PyTorch {torch.removeprefix('torch>=')} or later"),
    ):
        assert text in " ".join((ROOT / page).read_text().split()), f"{page}: {text}"


def test_short_pages_are_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
    assert len((DOCS / "architecture.md").read_text().split()) <= SHORT


def test_index_names_every_page() -> None:
    index = (DOCS / "README.md").read_text()
    missing = [page for page in PAGES if f"({page.relative_to(DOCS)})" not in index and page.name != "README.md"]
    assert missing == [], "docs/README.md: link these pages"


def test_figures_of_a_device_are_in_performance_alone() -> None:
    """What was measured on a GPU goes stale in prose; results that a benchmark rewrites do not."""
    pages = [page for page in PAGES if page.name not in ("performance.md", "performance-details.md")]
    assert [page.name for page in pages if re.search(r"\b[AHB][1-3]00\b.*\d (us|ms|%)", page.read_text())] == []
    sources = (ROOT / "torch_rtx" / "lowering").rglob("*.py")
    assert [path.name for path in sources if re.search(r"\b[AHB][1-3]00\b", path.read_text())] == []


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_paths_exist(page: Path) -> None:
    """Files and folders of this repository that a page names are there."""
    named = re.findall(r"`((?:torch_rtx|tests|examples|benchmarks|docs)/[\w/.]*)`", page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == [], f"{page}: names what is not there"


@pytest.mark.quick
@pytest.mark.parametrize("page", ["ir-and-passes.md", "fusion-and-kernels.md", "tactics-and-tuning.md"])
def test_ir_example(page: str) -> None:
    """The graph in a page is valid, and is written as the text form writes it."""
    graph = parse(ir_example(page))
    verify(graph)
    assert str(graph) == ir_example(page)


def test_kernel_example() -> None:
    """Kernel IR and source in fusion-and-kernels.md are what is made of a kernel of the graph there."""
    text = (DOCS / "architecture" / "fusion-and-kernels.md").read_text()
    sources = re.findall(r"^```py\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    node = next(kernel_nodes(parse(ir_example("fusion-and-kernels.md"))))
    assert node.body is not None
    kernel = generate(node.body, "softmax", arch_of(89), 0)
    assert kernel is not None
    page = "docs/architecture/fusion-and-kernels.md"
    assert sources == [kernel.source], f"{page}: replace the source by what generate() gives"
    assert f"```\n{region(node.body)}```\n" in text, f"{page}: replace the kernel IR by str(region(body))"


def ir_example(page: str) -> str:
    """The one graph that a page of the architecture shows."""
    text = (DOCS / "architecture" / page).read_text()
    (example,) = re.findall(r"^```\n(graph .*?)^```$", text, re.MULTILINE | re.DOTALL)
    return str(example)


@pytest.mark.quick
@pytest.mark.parametrize("name", torch_rtx.__all__)
def test_public_name(name: str) -> None:
    """A public name has a docstring of its own and typed arguments, and docs/api.md speaks of it."""
    found = getattr(torch_rtx, name)
    assert found.__doc__
    assert not isinstance(found, type) or "__doc__" in vars(found)
    functions = [found]
    if isinstance(found, type):
        functions = [f for n, f in vars(found).items() if inspect.isfunction(f) and not n.startswith("_")]
    for function in functions:
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, function
        for parameter in list(signature.parameters.values())[isinstance(found, type) :]:
            assert parameter.annotation is not inspect.Parameter.empty, f"{function}: {parameter}"
    assert f"`{name}" in (DOCS / "api.md").read_text(), f"docs/api.md: explain {name}"


def messages() -> str:
    """Every text in the package's code; what is put in at run time is a line end."""
    found = []
    for path in (ROOT / "torch_rtx").rglob("*.py"):
        for node in nodes(path):
            if isinstance(node, ast.JoinedStr):
                found.append("\n".join(str(p.value) for p in node.values if isinstance(p, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sd]", "\n", node.value))
    return "\n".join(found)


def headings() -> list[str]:
    """The messages that troubleshooting.md explains."""
    return re.findall(r"^#+ `(.*)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


def test_messages_exist() -> None:
    """What troubleshooting.md explains is what the code says: each part between the places that vary."""
    source = messages()
    parts = [(heading, part.strip()) for heading in headings() for part in heading.split("…") if part.strip()]
    assert len(headings()) > 20
    stale = [(heading, part) for heading, part in parts if part not in source]
    assert stale == [], "docs/troubleshooting.md: no code says this; … stands for what varies"


def test_every_error_is_explained() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    errors = [name for name in torch_rtx.__all__ if isinstance(getattr(torch_rtx, name), type)]
    errors = [name for name in errors if issubclass(getattr(torch_rtx, name), torch_rtx.RtxError)]
    missing = [name for name in errors if name != "Unsupported" and f"## {name}" not in text]
    assert missing == [], "docs/troubleshooting.md: a heading for each of these errors"
