"""What an installation needs and takes: an application that loads engines has PyTorch, safetensors and this package."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import torch_rtx
from tests.helpers.sources import nodes
from tests.paths import ENGINES, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Loads, runs, refits and saves engines of which one has kernels, one profiles, and one was an ONNX model, where
# packages are missing. Prints the files of the modules that it imported, by their names.
LOAD_ONLY = """
import json, sys, warnings
from importlib.machinery import PathFinder

missing, (folder, where) = set(sys.argv[3:]), sys.argv[1:3]

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing or name.startswith(("torch._dynamo", "torch._inductor")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
warnings.simplefilter("ignore")  # PyTorch's, of numpy
import torch
from safetensors.torch import load_file

import torch_rtx

for name, more in (("kernel", 2), ("profiles", 2), ("onnx", 1)):
    path, weights = f"{folder}/{name}.rtx", f"{folder}/{name}.weights.safetensors"
    assert torch_rtx.check_engine(path, "RTX 4090").validity == "VALID"
    module = torch_rtx.load(path, weights=weights)
    module.refit(weights)
    torch_rtx.save(module, f"{where}/{name}.rtx")
    again = torch_rtx.load(f"{where}/{name}.rtx", weights=load_file(weights))
    call = load_file(f"{folder}/{name}.calls.safetensors")
    given = [call[f"0/in/{position}"] for position in range(more)]
    for one in (module, again):
        torch.testing.assert_close(one(*given), call["0/out/0"])
try:
    torch_rtx.load(path, weights=f"{where}/none.onnx")
except torch_rtx.IntegrationError as error:
    assert str(error).startswith("ONNX models need the package ")
else:
    raise AssertionError("read without onnx_ir")
own = [module for name, module in sys.modules.items() if name.startswith(("torch_rtx", "safetensors"))]
print(json.dumps({module.__name__: [module.__file__, getattr(module, '__cached__', None)] for module in own}))
"""


def needed_by_torch() -> set[str]:
    """The distributions that PyTorch brings along, itself and safetensors."""
    found, left = {"safetensors"}, ["torch"]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            lines = metadata.requires(name) or []
            left += [re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in lines if "extra" not in line]
    return found


@pytest.mark.quick
def test_load_only(tmp_path_factory: pytest.TempPathFactory) -> None:
    """It takes less than 5 MB beside PyTorch, and imports neither the compiler nor any other package."""
    kept = needed_by_torch() - {"triton"}
    homes = metadata.packages_distributions()
    missing = {
        name for name, dists in homes.items() if not {dist.lower().replace("_", "-") for dist in dists} & kept
    } - {"torch_rtx"}
    assert {"numpy", "typer", "rich", "triton", "onnx_ir", "transformers"} <= missing
    command = [sys.executable, "-c", LOAD_ONLY, str(ENGINES / "v6"), str(tmp_path_factory.mktemp("saved"))]
    done = subprocess.run([*command, *missing, "cuda"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    compiler = ("backend", "lowering", "cli", "quantization", "integrations")
    assert not [name for name in used if name.startswith(tuple(f"torch_rtx.{part}" for part in compiler))]
    paths = [Path(file) for files in used.values() for file in files if file is not None]
    total = sum(path.stat().st_size for path in paths if path.exists())
    print(f"{len(used)} modules, {total / 1e6:.2f} MB")
    assert total < 5e6


def test_the_import_loads_no_more_than_it_needs() -> None:
    """Neither torch nor `typing`, which alone takes longer."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import torch_rtx; print(*sys.modules)"
    command = [sys.executable, "-I", "-S", "-c", code, str(ROOT)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in loaded if name.startswith("torch")} == {"torch_rtx", "torch_rtx.version"}
    assert "typing" not in loaded


def test_metadata() -> None:
    assert PROJECT["version"] == torch_rtx.__version__
    assert (ROOT / PROJECT["readme"]).is_file()
    for key in ("description", "keywords", "classifiers", "license", "maintainers", "requires-python"):
        assert PROJECT[key], key
    cited = (ROOT / "CITATION.cff").read_text()
    for line in (f"version: {PROJECT['version']}", f'abstract: "{PROJECT["description"]}"', "license: Apache-2.0"):
        assert f"\n{line}\n" in cited
    assert (ROOT / "SECURITY.md").is_file()
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert form.name == "config.yml" or "torch-rtx doctor" in form.read_text() or form.name == "wish.yml"


def test_a_wheel_holds_sources_alone() -> None:
    """Of other files setuptools takes those that are declared, and leaves the rest out without a word."""
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "torch_rtx").rglob("*.*") if path.is_file()}
    assert {name for name in files if not name.endswith((".py", ".pyc"))} == {"torch_rtx/py.typed"}
    folders = {path.parent for path in (ROOT / "torch_rtx").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []  # packages.find skips these


def test_imports_are_declared() -> None:
    """Each package that the code imports is required, or in an extra, or optional by its nature."""
    declared = [
        *PROJECT["dependencies"],
        *(line for lines in PROJECT["optional-dependencies"].values() for line in lines),
    ]
    names = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in declared}
    names |= {"cuda", "onnx", "click"}  # cuda-bindings; onnx_ir and typer bring these
    found = set()
    for path in (ROOT / "torch_rtx").rglob("*.py"):
        for node in nodes(path):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
    assert found - names - sys.stdlib_module_names <= {"torch_rtx"}
