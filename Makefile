# The README's two commands, `make demo` and `make test`, need Python 3.11 or newer, pip and make: nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all test-conformance lint format clean

## Fine-tune a real model on real data and see what came out (a few minutes).
demo: $(VENV)/.demo
	$(BIN)/leantune train recipes/banking77.yaml --overwrite
	$(BIN)/leantune predict runs/banking "my card still has not arrived"

## The tests that run on every change.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

## The long matrix as well.
test-all: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or not slow"

## PEFT's own test suite with LaMDA in place of LoRA (fetched with pip, about ten minutes).
test-conformance: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.conformance

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .conformance runs build dist .pytest_cache .mypy_cache .ruff_cache

# torch first and alone: pinned, so that no other package pulls the build with gigabytes of CUDA libraries.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.demo
