# Everything a newcomer needs. Each target makes its own environment first; the second call starts at once.
# Another Python: make demo PYTHON=python3.12. More test processes: make test JOBS=8.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Several threads per process only slow tiny models down (and each other).
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help demo test test-slow test-extras test-vllm check format bench clean

help:
	@echo "make demo       train, compare, quantise and serve tiny models (under 4 minutes after installation)"
	@echo "make test       fast tests"
	@echo "make test-slow  end-to-end and long tests"
	@echo "make test-extras  tests of torchao, in an environment of its own"
	@echo "make test-vllm  tests of vLLM, in its toolchain (installs it: 3 GB)"
	@echo "make check      format, lint, types, import rules, reference page"
	@echo "make bench      measure against TRL on the same work (some 15 minutes)"
	@echo "make format     format the code and apply safe lint fixes"
	@echo "make clean      delete the environment and what the demo and the tools left"

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found"; \
		echo "  fix: install one, or name it: make demo PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: $(PYTHON) cannot make virtual environments"; \
		echo "  fix: install its venv module (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	@echo "Installing into $(VENV) (once, a few minutes)..."
	@$(PIP) --editable '.[bnb]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	@$(PIP) --editable '.[bench]'
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/swift demo
	@echo "   (swift is $(BIN)/swift; to have it at hand: source $(BIN)/activate)"

test: $(VENV)/.installed-dev
	@$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu"

test-slow: $(VENV)/.installed-dev
	@$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) -m "slow and not gpu"

# Packages that cost every start a second, or that need compilers, have an environment of their own.
test-extras:
	@test -x .venv-extras/bin/python || $(PYTHON) -m venv .venv-extras
	@.venv-extras/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[dev,torchao]'
	@$(ONE_THREAD) .venv-extras/bin/python -m pytest tests/extras

test-vllm: $(VENV)/.installed-dev
	@$(BIN)/swift toolchain install vllm
	@$(ONE_THREAD) $(BIN)/python -m pytest tests/real_vllm

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/swift config reference --check

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/sft_vs_trl.py
	$(BIN)/python benchmarks/bare_loop.py

clean:
	rm -rf $(VENV) build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
