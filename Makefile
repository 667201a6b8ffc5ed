# make train | make parity | make test | make env | make bench.  `make train ARGS="--steps 20"` passes flags on.
.DEFAULT_GOAL := help
.PHONY: help train parity test env bench lint clean
SHELL := /bin/sh
.DELETE_ON_ERROR:

VENV ?= .venv
ARGS ?=
# The newest of these that works: a name on the PATH may be a shim that only prints an error.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
# GPU support where an NVIDIA driver answers.
CUDA := $(shell nvidia-smi >/dev/null 2>&1 && echo cuda)
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt

help:
	@echo 'make train   train a character GPT on tinyshakespeare (ARGS="--steps 20" passes flags on)'
	@echo 'make parity  hold this machine against PyTorch, rung by rung (ARGS="--quick" for the core)'
	@echo 'make test    run every test, those against PyTorch included'
	@echo 'make env     build the complete environment in $(VENV) and stop'
	@echo 'make bench   time a step against PyTorch on this machine'
	@echo 'make lint    ruff'

train: $(VENV)/.core
	$(VENV)/bin/python scripts/train.py --dataset tinyshakespeare,pydoc $(ARGS)

parity: $(VENV)/.test
	$(VENV)/bin/python scripts/parity.py $(ARGS)

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest $(ARGS)

env: $(VENV)/.test

bench: $(VENV)/.test
	$(VENV)/bin/python scripts/bench.py $(ARGS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

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

clean:
	rm -rf $(VENV)
