# Every target sets up what it needs from a fresh clone: Python 3.11 and a package index are enough.
.DEFAULT_GOAL := help
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed
# uv does not read pip's settings: a wheel folder configured for pip (a CPU build of torch, say) is handed on to it.
PIP_FIND_LINKS ?= $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)
export UV_FIND_LINKS ?= $(strip $(PIP_FIND_LINKS))
export DO_NOT_TRACK := 1

.PHONY: help demo test check fix bench bench-gpu clean

help:  ## Show these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

# Packages are compiled here once: where the environment forbids Python to keep bytecode, every command would do it anew.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)  ## Set up and run the whole job on generated data: about four minutes, no GPU, key or server
	$(BIN)/qlora init demo --if-missing
	$(BIN)/qlora run demo/pipeline.yaml

test: $(STAMP)  ## Set up and run every test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(STAMP)  ## Lint, format check, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

fix: $(STAMP)  ## Mend what the linter can mend, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## Run the benchmarks side by side with their peers
	$(BIN)/python -m benchmarks

bench-gpu: $(STAMP)  ## Run the tests that need a CUDA GPU, and the benchmark of the Llama-3-8B shape on it
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/python -m benchmarks gpu

clean:  ## Remove the environment, the demo and every cache
	rm -rf .venv demo .qlora dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
