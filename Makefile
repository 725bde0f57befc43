# `make demo` and `make test` are all the set-up there is: each makes .venv, installs what is missing
# and does its job.  A second run installs nothing.
#
#   PYTHON=python3.12 make test    another interpreter, for the first run

PYTHON ?= python3
VENV := .venv
# Files of tests run side by side (those of one file share captured models); PYTEST_ARGS="-n 0" runs
# all in a row.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# A stamp is newer than what it was made from, or the installation runs again.
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
SOURCES := pyproject.toml constraints.txt

.NOTPARALLEL:  # one installation at a time
.PHONY: help demo test lint clean

help:
	@echo "make demo    the main job on a small model that comes with the package"
	@echo "make test    the tests"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove .venv and every cache"

demo: $(INSTALLED)
	$(BIN)/modelathe demo

test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy takes a package's name from its folder: the checkout may be called anything, this link not
	@mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/modelathe
	MYPYPATH=$(VENV)/src $(BIN)/mypy -p modelathe

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): $(SOURCES) | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(INSTALLED_DEV): $(SOURCES) | $(BIN)/python
	$(PIP) --editable '.[dev]'
	@touch $(INSTALLED) $@

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || \
	  { echo "error: there is no $(PYTHON); install Python 3.11 or newer, or name it: PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: modelathe needs Python 3.11 or newer, and $(PYTHON) is" \
	    "$$("$(PYTHON)" -V 2>&1); name another one: PYTHON=python3.12 make ..." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
