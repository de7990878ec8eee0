# make train   set up and train on the built-in set (about two minutes on two CPU cores)
# make test    set up, then lint and test

PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint proof compile-check bench clean

train: .venv/installed
	$(BIN)/fastp2p train

test: lint
	$(BIN)/python -m pytest -m "not slow"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops -m "not slow"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Everything, with what make test leaves out for time.
proof: compile-check
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops

# Every Triton kernel and configuration, compiled for every target without a GPU: registers, spills, shared memory.
compile-check: .venv/installed
	$(BIN)/python -m fastp2p.kernels.compile_check

bench: .venv/installed
	$(BIN)/python -m pytest benchmarks

# Made anew when what is installed changes.
.venv/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'fastp2p needs Python 3.11 or later; set PYTHON=')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
