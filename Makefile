# What a newcomer guesses: demo, test, lint, bench, docs, clean, help. Needs Python 3.11 or newer and nothing else.
# All of it lives in .venv; a second run of a target installs nothing.

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && exit; done)
VENV := .venv
BIN := $(VENV)/bin
# More arguments for pip (for example where torch's wheels are) and for pytest (for example tests/unit -k batch).
PIP_ARGS ?=
ARGS ?=
# Tests side by side; they wait for servers and workers more than they compute.
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test chaos lint bench docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed-all ## install everything for development into .venv

demo: $(VENV)/.installed-demo ## train a small model and run 1,797 pictures through the queue
	$(BIN)/torchrelay demo

test: $(VENV)/.installed-all ## run all tests and report coverage; ARGS="tests/unit -k ids" runs some
	@rm -f .coverage .coverage.*
	HF_HUB_OFFLINE=1 $(BIN)/coverage run -m pytest -n $(JOBS) --dist worksteal $(ARGS); code=$$?; \
	$(BIN)/coverage combine -q && $(BIN)/coverage report --skip-covered --sort=cover; exit $$code

# A fresh seed is drawn and printed; SEED=17 replays a run. DATABASE is postgresql or sqlite.
DATABASE ?= postgresql
chaos: $(VENV)/.installed-all ## attack a whole system for minutes and check that nothing was lost; SEED=17 replays
	HF_HUB_OFFLINE=1 PYTHONPATH=tests $(BIN)/python -m chaos --database $(DATABASE) $(if $(SEED),--seed $(SEED)) $(ARGS)

lint: $(VENV)/.installed-all ## style, formatting, types, and who may import whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# The peers are installed into environments of their own, at the first run.
BENCH ?= full
bench: $(VENV)/.installed-bench ## measure us beside our peers and the limit (50 minutes; BENCH=quick three): docs/performance.md
	HF_HUB_OFFLINE=1 $(BIN)/python bench $(if $(filter quick,$(BENCH)),--quick) $(ARGS)

docs: $(VENV)/.installed-all ## check the documentation: its links lead somewhere, its code runs as written
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/acceptance/test_readme.py

clean: ## remove .venv, caches and build outputs; your data in .torchrelay stay
	rm -rf $(VENV) build dist htmlcov .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the virtual environment ----------------------------------------------------------------------------------------
# A stamp is written after its install ended well, so an interrupted one is taken up again.

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "torchrelay needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }

$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing torchrelay and PyTorch into $(VENV) (once; a minute or two) ..."
	@$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.installed-all: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing torchrelay, PyTorch and the test tools into $(VENV) (once; a minute or two) ..."
	@$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt -e '.[test,lint]'
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-bench: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing torchrelay, PyTorch and what the benchmarks need into $(VENV) (once; a minute or two) ..."
	@$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt -e '.[bench]'
	@touch $@ $(VENV)/.installed-demo
