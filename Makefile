# A fresh machine needs Python and make only. `make demo TORCH=torch==2.13.0` pins torch.
PYTHON ?= python3
TORCH ?= torch
BIN := .venv/bin

.PHONY: demo test test-slow check

demo: .venv/.installed
	$(BIN)/sapwood compare --out runs/digits

test: .venv/.installed-dev
	$(BIN)/python -m pytest

test-slow: .venv/.installed-dev
	$(BIN)/python -m pytest -m slow

check: .venv/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry src

# torch and the project in one call of pip, so that the pin holds for everything that the project depends on.
.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install "$(TORCH)" -e .
	touch $@

.venv/.installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install "$(TORCH)" -e ".[dev]"
	touch $@
