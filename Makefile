# Everything starts from Python 3.11 or newer and make: each target makes the environment that it needs.
# Variables, on the command line or in the environment:
#   PYTHON       the Python that makes the environment               (python3)
#   VENV         the environment's folder                            (.venv)
#   TORCH_INDEX  an index to take torch from first: on Linux the default index has the CUDA build, several GB;
#                the address of the CPU build's index is on torch's own installation page
#   PIP_FLAGS    more flags for pip install
#   FIGURES_FLAGS options and names for figures, such as "--force fig06_largest_singular_value"
#   BENCH_FLAGS  names and options for bench, such as "truth" or "products --quick"
#   PYTEST_FLAGS more flags for pytest, such as "-n 2" or "-k lanczos"

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PIP_FLAGS ?=
FIGURES_FLAGS ?=
BENCH_FLAGS ?=
PYTEST_FLAGS ?=

BIN := $(VENV)/bin
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-dev
EXTRAS := dataframe,docs,download,notebooks,optimizers,test,lint
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
SLOW_SUMMARY := benchmarks/results/test-slow.txt

.PHONY: help demo test test-slow test-lowest coverage dist dist-check lint types notebooks docs figures bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(BASE) ## condition numbers of a small network on real data, with and without BNP
	@mkdir -p demo
	$(BIN)/bnp-analysis condition --json demo/condition.json --figure demo/condition.png

test: $(DEV) ## the tests, but the slow ones
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-slow: $(DEV) ## the slow tests; writes benchmarks/results/test-slow.txt
	@mkdir -p $(dir $(SLOW_SUMMARY))
	@log=$(VENV)/test-slow.log; status=$(VENV)/test-slow.status; \
	{ $(BIN)/python -m pytest -m slow --durations=0 --durations-min=0.01 $(PYTEST_FLAGS) 2>&1; \
	  echo $$? > $$status; } | tee $$log; \
	{ date -u +%Y-%m-%d; \
	  $(BIN)/python -c 'import os; from bnp_analysis.results import package_versions as v; \
	print(", ".join(f"{k} {x}" for k, x in v().items()) + f"; {os.cpu_count()} processors")'; \
	  grep -E '^[0-9.]+s (setup|call|teardown) |^[0-9]+ [a-z]+.* in [0-9.]+s' $$log; } > $(SLOW_SUMMARY); \
	exit $$(cat $$status)

test-lowest: ## the tests with the lowest versions of pyproject.toml, in .venv-lowest (uv where it is present, else pip)
	$(MAKE) --no-print-directory .venv-lowest/.installed
	.venv-lowest/bin/python -m pytest $(PYTEST_FLAGS)

.venv-lowest/.installed: pyproject.toml constraints-lowest.txt
	@if command -v uv > /dev/null; then \
	  uv venv --quiet --clear --python 3.11 .venv-lowest && \
	  VIRTUAL_ENV=.venv-lowest uv pip install --resolution lowest-direct -c constraints-lowest.txt \
	    $(if $(strip $(TORCH_INDEX)),--extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match) -e ".[test]"; \
	else \
	  $(PYTHON) -m venv --clear .venv-lowest && \
	  $(if $(strip $(TORCH_INDEX)),.venv-lowest/bin/python -m pip install --index-url $(TORCH_INDEX) \
	    -c constraints-lowest.txt torch numpy &&) \
	  .venv-lowest/bin/python -m pip install -c constraints-lowest.txt $(PIP_FLAGS) -e ".[test]"; \
	fi
	@touch $@

coverage: $(DEV) ## the tests with the lines and branches that they reach, into .coverage
	$(BIN)/python -m pip install --disable-pip-version-check "coverage>=7.6"
	$(BIN)/python -m coverage run -m pytest $(PYTEST_FLAGS)
	$(BIN)/python -m coverage report

dist: $(DEV) ## the source distribution, and the wheel built from it, into dist/
	$(BIN)/python -m pip install --disable-pip-version-check "build>=1.2" "twine>=6"
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

dist-check: dist ## what an installed wheel and an unpacked source distribution can do
	$(BIN)/python tests/check_distributions.py dist

lint: $(DEV) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV) ## mypy, strict
	$(BIN)/mypy

notebooks: $(DEV) ## run notebooks/*.py and write them, with outputs, as notebooks/*.ipynb
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python notebooks/build.py

docs: $(DEV) ## the site, with the API reference, into docs/site; a warning is an error
	$(BIN)/python docs/build_site.py

figures: $(BASE) ## the figures of the theory, quick preset, into paper_figures/quick; FIGURES_FLAGS="--preset full" for more
	$(BIN)/python -m paper_figures $(FIGURES_FLAGS)

bench: $(DEV) ## products, Krylov methods and a part of the truth suite; BENCH_FLAGS="NAME ... --quick --gpu" for others
	$(BIN)/bnp-analysis bench $(BENCH_FLAGS)

clean: ## remove all that make made: environment, caches, builds, demo
	rm -rf $(VENV) .venv-lowest .coverage build dist demo docs/site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BASE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'make needs Python 3.11 or newer, and "$(PYTHON)" is not: name one with PYTHON=..., for example make PYTHON=python3.12' >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(if $(strip $(TORCH_INDEX)),$(PIP_INSTALL) --index-url $(TORCH_INDEX) torch)
	$(PIP_INSTALL) -e .
	@touch $@

$(DEV): $(BASE)
	$(PIP_INSTALL) -e ".[$(EXTRAS)]"
	@touch $@
