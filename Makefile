# make demo, test, lint, test-data or clean. The first four make .venv with the tested versions (constraints.txt).
# make PYTHON=python3.12 ... names its interpreter; to change it later, make clean first.

suitable = import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for python in python3.11 python3.12 python3 python; do \
	if $$python -c '$(suitable)' 2>/dev/null; then echo $$python; break; fi; done)

VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test lint test-data clean

demo: $(INSTALLED)
	$(BIN)/ttc run -m experiment=demo
	$(BIN)/ttc table demo
	$(BIN)/ttc figures demo

# One process per core; the tests of a file share fixtures, and so a process. The order of files is that of tests/conftest.py.
test: lint
	$(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Fetches every corpus for real; registries can be down, so this is not part of `test`.
test-data: $(INSTALLED)
	$(BIN)/python -m pytest -m network

# Studies (runs/) and prepared corpora (cache/) stay.
clean:
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c '$(suitable)' 2>/dev/null || { \
		echo "error: PYTHON=$(PYTHON): Python 3.11 or 3.12 with venv and pip is needed" \
			"(Debian, Ubuntu: apt install python3.11-venv); make PYTHON=/path/to/python3.11 names one" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
