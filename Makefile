# Everything runs in .venv, installed from constraints.txt. `make` alone lists the targets.

PYTHON ?= python3
ENV ?= metaworld
JOBS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo finetune-demo test test-unit test-processes mutants lint format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## make .venv and install the project into it

# The stamp is younger than what it was installed from: a second `make setup` does nothing.
# deepspeed and megatron-core ask for torch while they are built, and DS_BUILD_OPS=0 keeps deepspeed from compiling
# kernels: hence the order. openpi-client, with which the policy server is tested, asks for numpy 1 and works with 2.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $(PYTHON) is missing or older than 3.11; name one with make setup PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) setuptools wheel ninja packaging
	$(PIP) torch
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed megatron-core
	$(PIP) --no-build-isolation --editable '.[sim,serve,dev]'
	$(PIP) --no-deps openpi-client
	@touch $(STAMP)

demo: setup ## simulate, pack, train, export and evaluate: make demo ENV=metaworld or ENV=push2d
	$(BIN)/kairos-train demo --env $(ENV)

finetune-demo: setup ## published weights → joint training → export → closed loop: within half an hour on two cores
	$(BIN)/kairos-train finetune-demo

# Two at a time, about equally long: the tests of one process, with those of several that mostly wait (for ranks to be
# missed, for jobs to be scheduled); and the other tests of several processes.
WAITING := tests/distributed/test_liveness.py tests/e2e/test_launcher.py tests/e2e/test_slurm.py

test: lint ## lint, then all tests
	$(MAKE) --no-print-directory --jobs 2 --keep-going test-unit test-processes

test-unit: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit $(WAITING)

test-processes: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed tests/e2e $(WAITING:%=--ignore=%)

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
