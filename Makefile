# make quickstart, make test: each sets up what it needs; a second call reuses it.
# Another build of torch: make quickstart TORCH="torch --index-url https://download.pytorch.org/whl/cu128"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: quickstart test lint check fix examples docs clean
quickstart: $(READY)
	$(BIN)/potstill quickstart

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

check: lint test

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

examples: $(READY)
	$(BIN)/python -m pytest tests/examples

docs: $(READY)
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) dist .pytest_cache .ruff_cache

$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint $(VENV)/constraints.txt
	touch $(READY)
