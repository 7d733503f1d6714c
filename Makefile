PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STREAM ?= jobs/configs/demo.yaml

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast lint format

help: ## What there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(BIN)/.installed: pyproject.toml
	@command -v g++ > /dev/null || { echo "g++ is missing: apt-get install g++ (DeepSpeed compiles with it)"; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

install: $(BIN)/.installed ## Environment in .venv (about 2 minutes)

demo: install ## Learn six tasks, compare with the alternatives, say where to look
	$(BIN)/pointsman compare $(STREAM)

test: install test-fast ## All tests (real Ray, DeepSpeed, MLflow; no network)
	$(BIN)/python -m pytest -m ray

test-fast: install ## Tests without Ray, what to run while editing (two to three minutes)
	$(BIN)/python -m pytest -n logical -m 'not ray'

lint: install ## ruff, mypy, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
