# Everything a newcomer needs; `make help` lists it. PYTHON=... picks the interpreter for .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu lint format protos train-tiny clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Make .venv with Baton, its dependencies and the test tools
	@$(PYTHON) tools/setup.py --venv $(VENV)

demo: setup ## Run the whole path on this machine: router, prefill, decode, one prompt
	@$(BIN)/baton demo

test: setup ## Run style, types, layers and all tests
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-gpu: setup ## Run the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

lint: setup ## Check style, types and layers alone
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup ## Format the code and fix what can be fixed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

protos: setup ## Generate the Python code of protos/baton/v1/*.proto
	@$(BIN)/python tools/generate_protos.py

train-tiny: setup ## Train the embedded model anew
	@tools/train_tiny/run.sh

clean: ## Remove .venv and every cache
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
