# Plain make prints what each target does: the words after its ##.

PYTHON ?= python3
BIN := .venv/bin
CSRC := $(shell find csrc -name '*.*')

.DEFAULT_GOAL := help
.PHONY: help train test slow-test lint proof sanitize compile-check cuda-check floor floor-build floor-checkout bench \
	gpu-first gpu-cache gpu-rehearse clean

help: ## print these lines, as plain make does
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | expand --tabs 20

train: .venv/installed ## set up .venv and train on the built-in set: about five minutes on two CPU cores
	$(BIN)/fastp2p train

# Two processes share the tests, and no test measures. Each process has all threads, as a user has, so threads that wait
# must not spin: they would take the other process's core.
SHARED_OUT = --numprocesses 2 --dist worksteal
TESTS = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(SHARED_OUT)
# Interpreted kernels keep one core busy each.
INTERPRETED = TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ops tests/engine/test_kernels.py $(SHARED_OUT)

test: lint ## set up .venv, lint, and run the quick tests, the operators' twice
	$(TESTS) -m "not slow"
	$(INTERPRETED) -m "not slow"

# Those of the benchmarks have limits in seconds, and those of the CUDA sources are make cuda-check's.
slow-test: .venv/installed ## the slow tests, but those that measure and cuda-check's
	$(TESTS) -m slow --ignore tests/benchmarks --ignore tests/kernels/test_cuda_sources.py

lint: .venv/installed ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

# Everything, with what make test leaves out for time.
proof: compile-check ## all tests, the slow ones included, and compile-check
	$(BIN)/python -m pytest
	$(INTERPRETED)

# The operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer, on a build of its own: needs gcc and cmake.
# The sanitizers' libraries come before python's, and libstdc++ with them: they look for what throws as they start.
SANITIZERS = $(foreach name,libasan.so libubsan.so libstdc++.so,$(shell $${CXX:-c++} -print-file-name=$(name)))
sanitize: .venv/installed ## the operators' tests with the C++ under AddressSanitizer and UBSan
	cmake -B build/sanitize -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DFASTP2P_SANITIZE=address,undefined
	cmake --build build/sanitize --parallel 2
	LD_PRELOAD="$(SANITIZERS)" PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		PYTHONPATH=tests FASTP2P_EXTENSION=build/sanitize/_C.abi3.so \
		$(BIN)/python -m pytest -p helpers.load_extension --capture=sys tests/ops tests/nn tests/engine -m "not slow"

# Every Triton kernel and configuration, compiled without a GPU: registers, spills, shared memory. An hour on two slow
# cores for all six targets; TARGETS=90 names some.
compile-check: .venv/installed ## compile every Triton kernel without a GPU; TARGETS="80 90" for some targets alone
	$(BIN)/python -m fastp2p.kernels.compile_check $(TARGETS)

# Every CUDA C++ kernel the same way, where there is nvcc.
cuda-check: .venv/installed ## compile every CUDA kernel for every target, without a GPU
	$(BIN)/python -m pytest tests/kernels/test_cuda_sources.py -s

# The quick suite on the oldest PyTorch and Triton that pyproject.toml allows, with the CUDA kernels built and loaded.
# It needs Python 3.12, nvcc and 5 GB of disk, and no GPU. It works on a copy of this checkout, so that .venv keeps its
# extension.
FLOOR_PYTHON ?= python3.12
floor floor-build gpu-rehearse .floor/installed: BIN = $(CURDIR)/.floor/venv/bin
floor: floor-build ## the quick tests on the oldest PyTorch and Triton, with the CUDA extension
	cd .floor/checkout && $(BIN)/python -m pytest -m "not slow"
	cd .floor/checkout && $(INTERPRETED) -m "not slow"

# ninja compiles what changed: --force, since setuptools looks at no header.
floor-build: floor-checkout .floor/installed
	cd .floor/checkout && FASTP2P_BUILD=cuda $(BIN)/python setup.py --quiet build_ext --inplace --force
	$(BIN)/fastp2p info | grep "^C++ kernels .* and CUDA$$"

# Files keep their times and go where they are no longer in the checkout; what was built stays.
floor-checkout:
	mkdir -p .floor/checkout
	find .floor/checkout -type f ! -path '*/build/*' ! -path '*.egg-info/*' ! -name '*.so' -delete
	git ls-files -z --cached --others --exclude-standard | \
		tar --create --null --ignore-failed-read --files-from - | tar --extract --directory .floor/checkout
	test ! -d ../shared || ln -sfn $(abspath ../shared) .floor/shared

.floor/installed: pyproject.toml constraints-floor.txt | floor-checkout
	@$(FLOOR_PYTHON) -c "" || { echo "make floor: $(FLOOR_PYTHON) does not run; set FLOOR_PYTHON= to Python 3.12"; false; }
	@command -v nvcc || test -x $${CUDA_HOME:-/usr/local/cuda}/bin/nvcc || \
		{ echo "make floor: no nvcc on PATH or in CUDA_HOME; it comes with the CUDA toolkit"; false; }
	$(FLOOR_PYTHON) -m venv .floor/venv
	$(BIN)/python -m pip install --quiet --constraint constraints-floor.txt torch setuptools ninja
	FASTP2P_BUILD=none $(BIN)/python -m pip install --quiet --constraint constraints-floor.txt --no-build-isolation \
		--editable .floor/checkout pytest pytest-benchmark pytest-xdist
	touch $@

# Ours beside eager PyTorch, torch.compile and the rest: three minutes on two cores; ARGS="--out benchmarks/results" is
# all of it.
bench: .venv/installed ## ours beside the others, three minutes; ARGS="--out benchmarks/results" for all of it
	$(BIN)/python -m pytest benchmarks $(or $(ARGS),--quick)

# On a CUDA GPU, without a network: parity and time of the step first, then everything else, within nine minutes. Runs on
# $(PYTHON), which has torch and triton; .gpu-cache, which make gpu-cache fills elsewhere, brings the rest.
OUT ?= gpu-results
gpu-first: ## on a CUDA GPU: the step's parity and time, then everything else
	$(PYTHON) benchmarks/gpu_first.py --out $(OUT) $(ARGS)

# What such a machine lacks, made where there is a network and no GPU: Triton's programs compiled for sm_90, the CUDA
# extension, wheels. It takes minutes the first time, and then what has changed; made on the GPU machine's software.
FLOOR ?= .floor/venv/bin/python
gpu-cache: ## compile what a GPU machine runs, where there is no GPU
	$(FLOOR) benchmarks/gpu_cache.py make $(ARGS)

# Every stage of it on a CPU, tiny, then two runs that kill every other stage, on the floor's software.
gpu-rehearse: floor-build ## every stage of gpu-first on a CPU
	cd .floor/checkout && $(BIN)/python -m pytest tests/benchmarks/test_gpu_first.py

# Made anew when what is installed changes. PyTorch comes first: the extension is built against it.
.venv/installed: pyproject.toml setup.py constraints.txt $(CSRC)
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'fastp2p needs Python 3.11 or later; set PYTHON=')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	$(BIN)/fastp2p info | grep "^C++ kernels"
	touch $@

clean: ## remove .venv and what was built
	rm -rf .venv .gpu-cache build dist *.egg-info fastp2p/_C*.so .pytest_cache .mypy_cache .ruff_cache
