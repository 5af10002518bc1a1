# Every target sets itself up on a fresh machine with Python 3.11+ and make.
PYTHON ?= python3
# A smaller CPU build of torch: make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
FUZZ_SECONDS ?= 60

VENV := .venv
BIN := $(VENV)/bin
BUF := .tools/buf
MEASURED := --cov --cov-report=term:skip-covered --cov-fail-under=90
NODE_CLIENT := examples/clients/node/node_modules/.package-lock.json
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help install check test test-all test-compose test-gpu fuzz demo starter scores up up-compose bench bench-peers bench-gpu proto clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## Make .venv with everything Hocket needs

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Hocket needs Python 3.11 or newer: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): 6 GB and a few minutes where torch comes with CUDA (TORCH_INDEX in the Makefile is smaller)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PIP) --editable '.[all,examples,dev]'
	@touch $@

$(BUF): proto/tools.sh $(VENV)/.installed
	@proto/tools.sh $(BIN)/python

$(NODE_CLIENT): examples/clients/install.sh examples/clients/node/package-lock.json $(VENV)/.installed
	@examples/clients/install.sh $(BIN)/python

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

test: $(VENV)/.installed $(BUF) $(NODE_CLIENT) ## The fast tests; COVERAGE=1 takes twice as long and fails below 90 % of lines
	@$(BIN)/pytest -q -m "not long and not gpu and not compose" -n 2 --dist loadfile $(if $(COVERAGE),$(MEASURED))

test-all: $(VENV)/.installed $(BUF) $(NODE_CLIENT) ## Everything that needs no GPU, long proofs included
	@$(BIN)/pytest -q -m "not gpu and not compose" -n 2 --dist loadfile

test-compose: $(VENV)/.installed ## docker-compose.yml for real; needs a Docker engine, or root to start one
	@$(BIN)/pytest -q -m compose tests/compose

test-gpu: $(VENV)/.installed ## What only a CUDA device can show
	@$(BIN)/pytest -q -m gpu tests/gpu

fuzz: $(VENV)/.fuzz ## Change package bytes until a reader breaks: FUZZ_SECONDS (60) for each reader
	@for harness in archive manifest weights adapter apr header metadata payload quantized; do \
		echo "fuzzing $$harness"; $(BIN)/python -m tests.fuzz $$harness --seconds $(FUZZ_SECONDS) || exit 1; done

$(VENV)/.fuzz: $(VENV)/.installed
	@$(PIP) --editable '.[fuzz]'
	@touch $@

demo: $(VENV)/.installed ## Ask the starter kit; then train, sign, publish and ask a mixture of digit experts
	@$(BIN)/python -m examples.starter.demo
	@$(BIN)/python -m examples.digits.demo

starter: $(VENV)/.installed ## Make what is missing of the starter kit: base, experts, signatures
	@$(BIN)/python -m training.starter.build

scores: $(VENV)/.installed ## What the starter kit is worth on held-out questions; the tables of README.md and docs/starter.md
	@$(BIN)/python -m benchmarks.starter --write README.md docs/starter.md

up: $(VENV)/.installed ## Run the four services in one process
	@$(BIN)/hocket up

up-compose: ## Run the four services in containers, with two workers
	@deploy/prepare.sh
	@$$(docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose) up --build --detach

bench: $(VENV)/.installed ## Measure against bare gRPC; results go to benchmarks/results/
	@$(BIN)/python -m benchmarks.serving
	@$(BIN)/python -m benchmarks.split
	@$(BIN)/python -m benchmarks.catalogue
	@$(BIN)/python -m benchmarks.gate
	@$(BIN)/python -m benchmarks.routing
	@$(BIN)/python -m benchmarks.breakdown
	@$(BIN)/python -m benchmarks.packages
	@$(BIN)/python -m benchmarks.engine
	@$(BIN)/python -m benchmarks.decoding
	@$(BIN)/python -m benchmarks.expert_memory
	@$(BIN)/python -m benchmarks.prefixes

bench-peers: $(VENV)/.installed .venv-mlserver/.installed .venv-ray/.installed ## Measure beside MLServer and Ray Serve
	@$(BIN)/python -m benchmarks.peers

.venv-mlserver/.installed .venv-ray/.installed: .venv-%/.installed: benchmarks/peers/%.txt
	@$(PYTHON) -c 'import sys; sys.exit("the peers need Python 3.11 or 3.12: make bench-peers PYTHON=python3.12" if sys.version_info[:2] not in ((3, 11), (3, 12)) else 0)'
	@test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	@echo "installing $* into .venv-$* (about 400 MB)"
	@.venv-$*/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	@touch $@

bench-gpu: $(VENV)/.installed ## The same on one CUDA device
	@$(BIN)/python -m benchmarks.serving --device cuda
	@$(BIN)/python -m benchmarks.engine --device cuda
	@$(BIN)/python -m benchmarks.decoding --device cuda
	@$(BIN)/python -m benchmarks.expert_memory --device cuda
	@$(BIN)/python -m benchmarks.prefixes --device cuda

clean: ## Remove what the targets made
	rm -rf $(VENV) .venv-mlserver .venv-ray .tools .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	rm -rf build/fuzz examples/clients/*/build examples/clients/node/node_modules
