# Everything runs in .venv, made once and brought up to date when pyproject.toml or constraints.txt change.
#
#   make tour                   the whole life of a model on this machine, offline once installed, in minutes
#   make test                   the test suite without its long loops
#   make test-all lint bench    the rest; `make help` lists it
#   make bench-quality ROW=masked SEED=0    what models learn: one cell, or the table of what is stored
#   make ... TORCH_INDEX=URL    take PyTorch (and nothing else) from another index, e.g. one with CPU builds
#   make ... PYTHON=python3.12  make .venv with another Python (3.11 or later)

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
NEWEST := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
PYTHON ?= $(or $(NEWEST),python3)
BUDGET ?= 3min
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install tour test test-all lint types bench bench-quality clean

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

tour: $(VENV)/.installed
	$(BIN)/threefold tour --budget $(BUDGET) $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto -m "not slow" $(ARGS)

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: types
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy threefold

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks $(ARGS)

bench-quality: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.quality $(or $(ROW),table) --seed $(or $(SEED),0) $(ARGS)

install: $(VENV)/.installed

clean:
	rm -rf $(VENV)

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "error: \`$(PYTHON)\` is not installed, and threefold needs Python 3.11 or later"; \
	  echo "hint: Debian, Ubuntu: sudo apt install python3 python3-venv; macOS: brew install python"; exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: \`$(PYTHON)\` is $$($(PYTHON) -V 2>&1), and threefold needs Python 3.11 or later"; \
	  echo "hint: install a newer one and name it: make PYTHON=python3.12 ..."; exit 1; } >&2
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "error: \`$(PYTHON)\` has no venv module, which makes the folder $(VENV)"; \
	  echo "hint: Debian, Ubuntu: sudo apt install python3-venv"; exit 1; } >&2
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "installing threefold into $(VENV) with $$($(BIN)/python -V); PyTorch is large, this can take some minutes" >&2
	@$(if $(TORCH_INDEX),$(PIP) install --no-deps --index-url $(TORCH_INDEX) -c constraints.txt torch,:)
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the test tools into $(VENV)" >&2
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	@echo "installing the peers of the benchmarks into $(VENV)" >&2
	@$(PIP) install -c constraints.txt -e '.[bench]'
	@touch $@
