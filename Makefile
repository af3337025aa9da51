# Everything a newcomer needs: `make demo` and `make test`. Both build .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CLICKS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test chaos check format bench pins clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

setup: $(READY)  ## build .venv with every pinned dependency, hashes verified

# uv only speeds pip's own job up; its version and hashes come from the same pinned file as everything else.
$(READY): requirements/dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "stream-app needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another with: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sed -n '/^uv==/,/[^\\]$$/p' requirements/dev.txt > $(VENV)/uv.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $(VENV)/uv.txt
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements/dev.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

demo: $(READY)  ## real Kafka, real clicks, live recommendations; CLICKS=5000 ends after that many
	@exec $(BIN)/stream-app demo $(if $(CLICKS),--clicks $(CLICKS))

# A third process has work for two cores while tests of the others wait.
test: $(READY)  ## every test, the fast ones first; T=tests/lrurec/test_model.py runs one file
	$(BIN)/python -m pytest $(if $(T),$(T),--numprocesses 3 --dist worksteal)

chaos: $(READY)  ## 200 kills and other accidents, then the proof. A="--seed 7" replays one
	$(BIN)/python -m tests.chaos $(A)

check: $(READY)  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## apply the formatter and the safe fixes
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

bench: $(READY)  ## every benchmark but the long ones, ratios against named alternatives
	$(BIN)/python -m benchmarks

pins: $(READY)  ## compile requirements/*.txt again from pyproject.toml
	PATH="$(CURDIR)/$(BIN):$$PATH" requirements/compile.sh

clean:  ## remove what was built; the downloads' cache stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
