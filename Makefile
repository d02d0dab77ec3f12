# make demo: the whole pipeline on the embedded model.  make test: linters, types and the fast tests.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
NATIVE := $(wildcard native/*.cpp native/*.h native/*.inc native/tests/*.cpp native/tests/*.h)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo docs test test-all test-gguf test-coreai sanitize wheels lint format clean

$(VENV)/installed: pyproject.toml constraints.txt CMakeLists.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/wf fairy2 -m tiny --mode w2 --budget 3m --force

lint: docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy

# A dead link is an error. Zensical ends with a traceback then, behind the list of links.
docs: $(VENV)/installed-dev
	@rm -rf build/docs
	$(BIN)/python docs/build_site.py build/docs
	$(BIN)/zensical build --strict
	@echo "built build/site/index.html"

# One thread a process: two processes with two threads each on two cores stall one another.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 WF_ISA=avx2

# Sums in another order round otherwise, so what holds with one instruction set need not hold with another.
define numeric_tests_again
@if grep -qwE 'avx512f|avx_vnni' /proc/cpuinfo 2> /dev/null; then \
	echo "the numeric tests again, as a machine with AVX2 and no more runs them:"; \
	$(AVX2) $(PYTEST) -n 2 -m 'numeric and not slow and not llamacpp'; \
else echo "not an x86-64 with more than AVX2: the numeric tests have run as they run on this machine"; fi
endef

test: lint
	$(PYTEST) -n 2 -m 'not slow and not llamacpp'
	$(numeric_tests_again)

test-all: lint
	$(PYTEST) -n 2 -m 'not llamacpp'
	$(numeric_tests_again)

# Builds llama.cpp (minutes; needs cmake and a C++ compiler) and runs the exported files with it.
test-gguf: $(VENV)/installed-dev
	$(PIP) 'llama-cpp-python>=0.3.36'
	$(PYTEST) -m llamacpp

# Installs Apple's converter and runtime (wheels for Linux and macOS), writes assets and runs them on this CPU.
test-coreai: $(VENV)/installed-dev
	$(PIP) --editable '.[coreai]'
	$(PYTEST) tests/export/test_coreai.py

# The native library's own tests under the address and undefined-behaviour sanitizers, with the fastest and the plainest kernels.
sanitize: $(VENV)/installed-dev
	$(PIP) cmake
	$(BIN)/cmake -S . -B build/sanitized -DWF_TESTS=ON -DWF_SANITIZE=ON > /dev/null
	$(BIN)/cmake --build build/sanitized --target wf_random_shapes wf_decoder
	build/sanitized/wf_random_shapes
	build/sanitized/wf_decoder
	WF_ISA=generic build/sanitized/wf_random_shapes
	WF_ISA=generic build/sanitized/wf_decoder

# Wheels for five platforms into dist/, their libraries built by clang (in the package ziglang, some 400 MB). Editable as
# the rest of the environment: a copy of the package in it would hide the sources from then on.
wheels: $(VENV)/installed-dev
	$(PIP) --editable '.[wheels]'
	$(BIN)/python native/wheels.py dist

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

clean:
	rm -rf $(VENV) outputs build src/*.egg-info
