# make train   set up and train on the built-in set (about two minutes on two CPU cores)
# make test    set up, then lint and test

PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint proof compile-check cuda-check bench gpu-check gpu-rehearse gpu-wheels clean

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
proof: compile-check cuda-check
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops

# Every Triton kernel and configuration, compiled for every target without a GPU: registers, spills, shared memory.
compile-check: .venv/installed
	$(BIN)/python -m fastp2p.kernels.compile_check

# Every CUDA C++ kernel the same way, where there is nvcc.
cuda-check: .venv/installed
	$(BIN)/python -m pytest tests/test_cuda_sources.py -s

bench: .venv/installed
	$(BIN)/python -m pytest benchmarks

# On a CUDA GPU: the parity suite, then the operator benchmarks, into benchmarks/results/. Runs on $(PYTHON) as it is, with
# torch, triton, numpy and pillow alone; pytest and setuptools come from .gpu-wheels, so it needs no network.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

# The same path in a minute on the CPU, with interpreted kernels and tiny shapes.
gpu-rehearse:
	$(PYTHON) benchmarks/gpu_check.py --rehearse

# What gpu-check lacks on such a machine, fetched where there is a network.
gpu-wheels:
	rm -rf .gpu-wheels
	$(PYTHON) -m pip download --quiet --no-deps --only-binary :all: --constraint constraints.txt --dest .gpu-wheels \
		pytest iniconfig pluggy pygments packaging "setuptools>=77"

# Made anew when what is installed changes. PyTorch comes first: the extension is built against it.
.venv/installed: pyproject.toml setup.py constraints.txt $(shell find csrc -name '*.*')
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'fastp2p needs Python 3.11 or later; set PYTHON=')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv .gpu-wheels build dist *.egg-info fastp2p/_C*.so .pytest_cache .mypy_cache .ruff_cache
