# Two commands do everything on a machine with Python 3.11 or newer: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DOCS := $(VENV)/docs
STAMP := $(VENV)/.installed

.PHONY: demo test lint format docs linkcheck dist lock install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[dev]'
	touch $(STAMP)

# PGD-AT against PGD-AT + SGLR on real 8x8 digits: two short trainings on the CPU, a table, an HTML report.
demo: install
	$(BIN)/softdefend demo

lint: install
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

# Tests marked gpu skip themselves where there is no CUDA device. A file's tests stay in one process, and files
# begin in the order of tests/conftest.py. COVERAGE=yes counts the lines that run, which takes half as long again
# on Python 3.11.
COVERAGE ?=
COUNTED := $(if $(COVERAGE),--cov --cov-report=term --cov-fail-under=90)
test: lint
	COVERAGE_CORE=$$($(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")') \
		$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(COUNTED)

$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[docs,analysis]'
	touch $@

# The site, in build/site. Its tutorials are run, for some minutes; their results are kept in build/notebooks.
docs: $(DOCS)/.installed
	$(DOCS)/bin/sphinx-build --fail-on-warning --keep-going docs build/site

# Links to pages of others; those between our own are checked by the build.
linkcheck: $(DOCS)/.installed
	$(DOCS)/bin/sphinx-build --builder linkcheck -D nb_execution_mode=off docs build/links

dist: install
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# Hashes of every file on PyPI, for any platform. torch and what only torch needs stand apart: on Linux PyPI has its CUDA
# build alone, and who wants the CPU's brings it from elsewhere.
lock: install
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
		--constraint constraints.txt pyproject.toml --output-file requirements-all.lock
	awk '/^[a-z]/ {part = /^(torch|triton|nvidia|cuda)/ ? "requirements-torch.lock" : "requirements.lock"} \
		{print > part}' requirements-all.lock
	rm requirements-all.lock

format: install
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

clean:
	rm -rf $(VENV) build demo dist .coverage .mypy_cache .ruff_cache .pytest_cache
