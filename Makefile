# Two commands do everything: `make demo` and `make test`. Both make `.venv` first, when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help venv demo test check audit docs bench clean

help:  ## list the commands
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

venv: $(STAMP)  ## make .venv with the pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Vouch needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	@echo "Installing into $(VENV): PyTorch for the CPU (about 200 MB) and about 60 small packages. This happens once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[1/3] pip"; $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip setuptools
	@echo "[2/3] PyTorch"; $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt torch
	@echo "[3/3] Vouch and its tools"; $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $(STAMP)
	@echo "Done: $(BIN)/vouch --help"

demo: venv  ## train, compare and explain on the embedded world; writes demo/report.html
	@$(BIN)/vouch demo --out demo

test: check  ## lint, types, layers, docs, then every test
	@$(BIN)/python -m pytest -rs

check: venv  ## lint, types, layers and docs, without the tests
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-cache > .lint.tmp 2>&1 || (cat .lint.tmp; rm -f .lint.tmp; exit 1)
	@rm -f .lint.tmp
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir site
	@echo "ruff, mypy, import layers and docs: clean"

audit: venv  ## look for known vulnerabilities in the pinned packages, where advisories are at hand
	@$(BIN)/python tools/audit.py

docs: venv  ## build the manual into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: venv  ## run every benchmark (each peer in its own environment; needs an hour)
	@for file in benchmarks/[a-oq-z]*.py benchmarks/prepare.py; do $(BIN)/python $$file || exit 1; done

clean:  ## remove everything that was made
	rm -rf $(VENV) site demo runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
