# `make train` and `make test` need Python >= 3.11 and nothing else; both make .venv first.
# make train ARGS="--train.epochs 5"      make test ARGS="tests/test_plan.py -x"

PYTHON ?= $(shell command -v python3 || command -v python)
BIN := .venv/bin
PACKAGES := benchmarks blocks cluster runtime schedulers
# setuptools comes first, pinned, and builds without isolation: constraints do not reach an isolated build
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help train test lint format types contracts check audit clean

help:
	@echo "make train      train the default network on two local workers"
	@echo "make test       run every test"
	@echo "make check      formatting, lint, strict types, import contracts"
	@echo "make format     format and fix what can be fixed"
	@echo "make audit      look the pinned dependencies up for known vulnerabilities"
	@echo "make clean      remove .venv, build products and caches"

train: .venv/train.stamp
	$(BIN)/anabranch train $(ARGS)

test: .venv/test.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: lint types contracts

lint: .venv/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: .venv/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: .venv/test.stamp
	$(BIN)/mypy

contracts: .venv/test.stamp
	PYTHONPATH=.typing $(BIN)/lint-imports

# --strict: an index without the data (a mirror) would leave every package out and pass. Findings are written to the
# file, what went wrong is not.
audit: .venv/audit.stamp
	@found=$$(mktemp); errors=$$(mktemp); trap 'rm -f "$$found" "$$errors"' EXIT; \
	for service in pypi osv; do \
		if $(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict \
			--vulnerability-service $$service --progress-spinner off --output "$$found" 2> "$$errors"; then \
			echo "audit: no known vulnerability ($$service)"; exit 0; \
		elif [ -s "$$found" ]; then cat "$$found"; exit 1; fi; \
		echo "audit: $$service: $$(tail -n 1 "$$errors")" >&2; \
	done; \
	echo "audit: NOTHING was audited: neither service has the data here; run it where pypi.org or api.osv.dev answers" >&2; \
	exit 2

.venv/train.stamp: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "anabranch needs Python >= 3.11, $(PYTHON) is older: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear .venv
	$(PIP_INSTALL) setuptools
	$(PIP_INSTALL) --no-build-isolation --editable .
	@$(BIN)/python -m compileall -q $(PACKAGES)  # else every process of the first run compiles them
	@touch $@

.venv/test.stamp: .venv/train.stamp
	$(PIP_INSTALL) --no-build-isolation --editable '.[test]'
	@touch $@

.venv/audit.stamp: .venv/train.stamp
	$(BIN)/python -m pip install --disable-pip-version-check pip-audit
	@touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
