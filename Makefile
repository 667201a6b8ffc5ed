# make train | test | test-all | parity | bench | accelerator | docs | lint | env.  `make train ARGS="--steps 20"` passes flags on.
.DEFAULT_GOAL := help
.PHONY: help train parity test test-all env bench accelerator docs lint clean
SHELL := /bin/sh
.DELETE_ON_ERROR:

VENV ?= .venv
ARGS ?=
# Test processes; each compiles on one core.
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# The newest of these that works: a name on the PATH may be a shim that only prints an error.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
# GPU support where an NVIDIA driver answers.
CUDA := $(shell nvidia-smi >/dev/null 2>&1 && echo cuda)
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt
PYTEST = $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile

help:
	@echo 'make train     train a character GPT on tinyshakespeare (ARGS="--steps 20" passes flags on)'
	@echo 'make test      the default tests: five minutes on two cores'
	@echo 'make test-all  all tests: every mutant, kills at random moments, the commands of the docs'
	@echo 'make parity    hold this machine against PyTorch, check by check (ARGS="--quick" for the core)'
	@echo 'make bench     time a step against PyTorch on this machine'
	@echo 'make accelerator   what a GPU or TPU can show: its tests, parity, speed and memory, in ten minutes'
	@echo 'make docs      build the site into docs/_build/html'
	@echo 'make lint      ruff, import contracts, pyright'
	@echo 'make env       build the complete environment in $(VENV) and stop'

train: $(VENV)/.core
	$(VENV)/bin/jaxgpt train --dataset tinyshakespeare,pydoc $(ARGS)

parity: $(VENV)/.test
	$(VENV)/bin/jaxgpt parity $(ARGS)

test: $(VENV)/.test
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.test
	$(PYTEST) $(ARGS)

env: $(VENV)/.test $(VENV)/.lint

bench: $(VENV)/.test
	$(VENV)/bin/jaxgpt bench $(ARGS)

accelerator: $(VENV)/.test
	$(VENV)/bin/python -m benchmarks.accelerator $(ARGS)

docs: $(VENV)/.docs
	$(VENV)/bin/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/basedpyright --warnings

$(VENV)/bin/python:
	@test -n '$(PYTHON)' || { echo 'error: no working Python 3.11 or newer with venv; install one, or make PYTHON=/path/to/python3' >&2; exit 2; }
	@echo 'creating $(VENV) with $(PYTHON)'
	@$(PYTHON) -m venv --clear $(VENV)

$(VENV)/.core: pyproject.toml .ci/constraints.txt | $(VENV)/bin/python
	@echo 'installing jaxgpt into $(VENV) (a few minutes the first time)'
	@$(PIP) -e '.$(CUDA:%=[%])'
	@touch $@

$(VENV)/.test: $(VENV)/.core
	@echo 'installing the test extra with PyTorch into $(VENV)'
	@$(PIP) -e '.[test$(CUDA:%=,%)]'
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	@$(PIP) -e '.[test,lint$(CUDA:%=,%)]'
	@touch $@

$(VENV)/.docs: $(VENV)/.test
	@$(PIP) -e '.[test,docs$(CUDA:%=,%)]'
	@touch $@

clean:
	rm -rf $(VENV) docs/_build
