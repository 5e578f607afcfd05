# make demo    train the quickstart example: a table and a figure, in minutes
# make test    lint, types, tests and doctests
# make bench   time the methods against the plain sum and installed peers
# make docs    build the documentation: docs/_build/html/index.html
# make notebooks  run all notebooks in full size, and keep their figures in them
# make lint    format check, lint and types only
# make clean   remove environment, caches and results
#
# Each target sets itself up. PYTHON=python3.12 selects the interpreter (3.11 or newer).

SHELL := /bin/sh
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
VERSION := -c 'import sys; print(*sys.version_info[:2])'

ifeq ($(origin PYTHON), undefined)
# The first interpreter that is new enough and can make a virtual environment.
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && echo $$p && break; done)
else ifneq ($(wildcard $(BIN)/python),)
# Chosen by the user: an environment of another version is made again.
ifneq ($(shell $(BIN)/python $(VERSION)), $(shell $(PYTHON) $(VERSION)))
.PHONY: $(BIN)/python
endif
endif

.PHONY: demo test bench docs notebooks lint clean

demo: $(VENV)/.examples
	$(BIN)/python -m examples.quickstart.train

test: lint
	$(BIN)/python -m pytest --quiet --numprocesses 2 --dist worksteal

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.resolve

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --builder html --nitpicky --fail-on-warning --quiet docs docs/_build/html
	@echo 'the pages: docs/_build/html/index.html'

notebooks: $(VENV)/.docs $(VENV)/.examples
	$(BIN)/python -m docs.run_notebooks

lint: $(VENV)/.test
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy --no-error-summary

# One stamp for each extra; made again when the dependencies change.
$(VENV)/.%: pyproject.toml $(BIN)/python
	$(PIP) install --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo 'Python 3.11 or newer with venv is needed:' \
		'install it, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python'; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

clean:
	rm -rf docs/_build docs/generated docs/methods docs/gallery
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache build dist runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
