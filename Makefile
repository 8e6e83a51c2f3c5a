# A fresh machine needs Python and make only. `make demo TORCH=torch==2.13.0` pins torch, `VENV=FOLDER` installs elsewhere,
# `make test ONLY=tests/test_masks.py` runs a part.
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
ONLY ?=
BIN := $(VENV)/bin

.PHONY: demo test test-slow check

demo: $(VENV)/.installed
	$(BIN)/sapwood compare --out runs/digits

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ONLY)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow $(ONLY)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry src

# torch and the project in one call of pip, so that the pin holds for everything that the project depends on.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$(TORCH)" -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$(TORCH)" -e ".[dev]"
	touch $@
