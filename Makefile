# Everything a newcomer needs; `make help` lists it. PYTHON=... picks the interpreter for .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2
EXAMPLES ?= 100000
# A file stays together: its tests share their clusters. Files go in the order of tests/conftest.py.
IN_PARALLEL := -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
export PYTHONUNBUFFERED := 1
# Empty: off. Tests start many interpreters, and each would compile Baton's own modules again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long test-gpu test-soak test-compose test-helm test-k8s chart docs lock lint format protos train-tiny clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Make .venv with Baton, its dependencies and the test tools
	@$(PYTHON) tools/setup.py --venv $(VENV)

demo: setup ## Run the whole path on this machine: router, prefill, decode, one prompt
	@$(BIN)/baton demo

test: setup ## Run style, types, layers and all tests (TEST_PROCESSES=2 at a time)
	@PYTHONHASHSEED=0 $(BIN)/python -m pytest $(IN_PARALLEL) $(PYTEST_ARGS)

test-long: setup ## Run the scheduler's state machine on 100,000 random examples (EXAMPLES=...)
	@HYPOTHESIS_PROFILE=thorough MACHINE_EXAMPLES=$(EXAMPLES) \
		$(BIN)/python -m pytest tests/engine/scheduler/test_machine.py $(PYTEST_ARGS)

test-gpu: setup ## Run the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

test-soak: setup ## Send 10,000 short requests, a fifth of them aborted (SOAK_REQUESTS=...)
	@$(BIN)/python -m pytest -s -m soak tests/e2e/test_soak.py $(PYTEST_ARGS)

test-compose: setup ## Build the images and break their containers (root starts an engine if need be)
	@$(BIN)/python -m pytest -m containers tests/deploy $(PYTEST_ARGS)

test-helm: setup ## Render the chart with Helm 3 and 4, lint and validate it
	@$(BIN)/python -m pytest -m helm tests/helm $(PYTEST_ARGS)

test-k8s: setup ## Install the chart in a real Kubernetes control plane, pods played by the tests (root)
	@$(BIN)/python -m tests.kubernetes.build
	@$(BIN)/python -m pytest -m kubernetes tests/kubernetes $(PYTEST_ARGS)

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

chart: setup ## Write the chart's README, schema and dashboard anew from values and settings
	@$(BIN)/python tools/chart.py

docs: setup ## Write docs/api.md anew from the protos and the HTTP bodies
	@$(BIN)/python tools/api_reference.py

lock: setup ## Lock what the images install (deploy/requirements) anew
	@$(BIN)/python tools/lock_images.py

train-tiny: setup ## Train the embedded model anew
	@tools/train_tiny/run.sh

clean: ## Remove .venv and every cache
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
