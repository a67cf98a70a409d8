# make install, make quickstart, make test: each sets up what it needs; a second call reuses it.
# Another build of torch: make quickstart TORCH="torch --index-url https://download.pytorch.org/whl/cu128"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
# tests that run at once; those of the sandbox, which load the machine themselves, run one by one
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# the lowest versions that pyproject.toml allows, laid over the packages of $(VENV)
LOWEST ?= transformers==5.0.0 tokenizers==0.22.0 huggingface-hub==1.3.0 httpx==0.28.1 httpcore==1.0.9 h11==0.16.0 anyio==4.9.0 sniffio==1.3.1 idna==3.10 certifi
LOW := $(VENV)-lowest
LOW_TESTS ?= tests/laws/test_prompts.py tests/laws/test_masking.py tests/oracles/test_metrics.py tests/sources/test_jsonl.py

.PHONY: install quickstart test lowest models lint check fix examples docs clean
install: $(READY)

quickstart: $(READY)
	$(BIN)/potstill quickstart

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --ignore tests/sandbox
	$(BIN)/python -m pytest tests/sandbox

# real pretrained models for the tests marked `real`: export POTSTILL_REAL_MODELS=$PWD/.models before make test
models: $(READY)
	$(BIN)/python tools/smollm2.py .models

lowest: $(LOW)/.ready
	$(LOW)/bin/python -m pytest $(LOW_TESTS)

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
	rm -rf $(VENV) $(LOW) dist .pytest_cache .ruff_cache

# compressed-tensors, by which tests load exported folders, asks for a newer torch than TORCH may be, and needs none
$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --constraint $(VENV)/constraints.txt compressed-tensors loguru
	touch $(READY)

$(LOW)/.ready: $(READY) Makefile
	$(PYTHON) -m venv $(LOW)
	$(BIN)/python -c "import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"purelib\")!r})')" > \
		$$($(LOW)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/beneath.pth
	$(LOW)/bin/pip install --quiet --disable-pip-version-check --no-deps --ignore-installed $(LOWEST)
	touch $@
