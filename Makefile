# Everything runs in .venv, installed from constraints.txt. `make` alone lists the targets.

PYTHON ?= python3
ENV ?= metaworld
JOBS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo finetune-demo test test-quick test-quick-data test-quick-rest test-nightly test-unit test-processes test-waiting mutants lint format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## make .venv and install the project into it

# The stamp is younger than what it was installed from: a second `make setup` does nothing.
# deepspeed and megatron-core ask for torch while they are built, and DS_BUILD_OPS=0 keeps deepspeed from compiling
# kernels: hence the order. openpi-client, with which the policy server is tested, asks for numpy 1 and works with 2.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $(PYTHON) is missing or older than 3.11; name one with make setup PYTHON=python3.11" >&2; exit 1; }
	@echo "installing into .venv: about 700 MB to download and 2 GB on disk with a CPU build of torch, several GB with"
	@echo "one for CUDA; 2 to 5 minutes on a fast connection"
	$(PYTHON) -m venv .venv
	$(PIP) setuptools wheel ninja packaging
	$(PIP) torch
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed megatron-core
	$(PIP) --no-build-isolation --editable '.[train,sim,serve,dev]'
	$(PIP) --no-deps openpi-client
	@touch $(STAMP)

demo: setup ## simulate, pack, train, export and evaluate: make demo ENV=metaworld or ENV=push2d
	$(BIN)/kairos-train demo --env $(ENV)

finetune-demo: setup ## published weights → joint training → export → closed loop: within half an hour on two cores
	$(BIN)/kairos-train finetune-demo

# Three streams at a time, about equally long: what computes in one process; what computes in several; and what mostly
# waits (for ranks to be missed, for jobs to be scheduled), with the data behind it, which is half of the first.
DATA := tests/unit/dataloaders
QUICK := -m "not (nightly or slow or waits)"
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test: lint ## lint, then all tests but the nightly ones: what continuous integration runs, 15 minutes on two cores
	$(MAKE) --no-print-directory --jobs 3 --keep-going test-unit test-processes test-waiting

test-quick: lint ## lint, then the tests that neither compute long nor wait
	$(MAKE) --no-print-directory --jobs 2 --keep-going test-quick-data test-quick-rest

test-quick-data: setup
	$(PYTEST) $(QUICK) $(DATA) tests/distributed

test-quick-rest: setup
	$(PYTEST) $(QUICK) tests/unit tests/e2e --ignore=$(DATA)

test-nightly: test mutants ## everything: full grids of layouts, parity of all of them, a hundred faults, files of strangers
	$(PYTEST) -m nightly --timeout 3600 tests
	$(BIN)/python benchmarks/parity.py
	$(BIN)/python benchmarks/chaos.py --faults 100 --seed 0
	$(BIN)/python benchmarks/attack.py

test-unit: setup
	$(PYTEST) tests/unit --ignore=$(DATA)

test-processes: setup
	$(PYTEST) -m "not (nightly or waits)" tests/distributed tests/e2e

test-waiting: setup
	$(PYTEST) -m "waits and not nightly" tests/distributed tests/e2e
	$(PYTEST) $(DATA)

mutants: setup ## break the code one line at a time, each must fail its test: make mutants ONLY=guard JOBS=2
	$(BIN)/python tests/mutants.py --only '$(ONLY)' --jobs $(JOBS)

lint: setup ## check rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what building and testing leave; .venv and runs stay
	rm -rf build dist *.egg-info .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
