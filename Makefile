# make setup demo test test-all check bench: everything runs in .venv, made by `setup` when it is missing or stale.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BENCHES := $(wildcard benchmarks/bench_*.py)

.PHONY: help setup demo test test-all check bench clean
.DEFAULT_GOAL := help

help: ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(STAMP) ## make .venv and install coresift with the versions it was tested with

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "coresift needs Python 3.11 or newer; pass PYTHON=python3.11" >&2; exit 2; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## embed, select, evaluate and compare on scikit-learn's handwritten digits
	$(VENV)/bin/coresift demo --out coresift-demo

test: $(STAMP) ## the tests, without the slow ones
	$(VENV)/bin/python -m pytest

test-all: $(STAMP) ## all tests
	$(VENV)/bin/python -m pytest -m ''

check: $(STAMP) ## ruff and strict mypy
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: $(STAMP) ## every benchmark, at a size for a laptop
	@for bench in $(BENCHES); do echo "== $$bench"; $(VENV)/bin/python $$bench || exit 1; done

clean: ## remove what setup and the tools made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis coresift-demo *.egg-info
