# Every target sets itself up on a fresh machine with Python 3.11+ and make.
PYTHON ?= python3
# A smaller CPU build of torch: make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
BUF := .tools/buf
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help install check test test-all test-gpu demo up bench bench-gpu proto clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## Make .venv with everything Hocket needs

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Hocket needs Python 3.11 or newer: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (torch is the largest part; a few minutes the first time)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PIP) --editable '.[all,examples,dev]'
	@touch $@

$(BUF): proto/tools.sh $(VENV)/.installed
	@proto/tools.sh $(BIN)/python

proto: $(VENV)/.installed ## Regenerate the committed stubs
	@PATH="$(CURDIR)/$(BIN):$$PATH" proto/generate.sh

check: $(VENV)/.installed $(BUF) ## Lint, types, contracts, layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BUF) lint proto
	@$(BUF) format --diff --exit-code proto
	@if [ -f proto/released.binpb ]; then $(BUF) breaking proto --against proto/released.binpb; \
	else echo "no released contracts yet (proto/released.binpb): the breaking check begins with the first release"; fi
	@$(BIN)/pytest -q tests/shape

test: $(VENV)/.installed $(BUF) ## The fast tests, with coverage
	@$(BIN)/pytest -q -m "not long and not gpu" -n 2 --cov --cov-report=term:skip-covered --cov-fail-under=90

test-all: $(VENV)/.installed $(BUF) ## Everything that needs no GPU, long proofs included
	@$(BIN)/pytest -q -m "not gpu" -n 2

test-gpu: $(VENV)/.installed ## What only a CUDA device can show
	@$(BIN)/pytest -q -m gpu tests/gpu

demo: $(VENV)/.installed ## Train, sign, publish and ask a mixture of digit experts
	@$(BIN)/python -m examples.digits.demo

up: $(VENV)/.installed ## Run the four services in one process
	@$(BIN)/hocket up

bench: $(VENV)/.installed ## Measure against bare gRPC; results go to benchmarks/results/
	@$(BIN)/python -m benchmarks.serving
	@$(BIN)/python -m benchmarks.gate
	@$(BIN)/python -m benchmarks.breakdown

bench-gpu: $(VENV)/.installed ## The same on one CUDA device
	@$(BIN)/python -m benchmarks.serving --device cuda

clean: ## Remove what the targets made
	rm -rf $(VENV) .tools .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
