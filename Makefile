# Two commands do everything on a machine with Python 3.11 or newer: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint format install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[dev]'
	touch $(STAMP)

# PGD-AT against PGD-AT + SGLR on real 8x8 digits: two short trainings on the CPU, a table, an HTML report. Side by
# side with one thread each: images this small are not worth dividing, and threads would wait for each other.
demo: install
	$(BIN)/softdefend compare --config digits_demo --presets pgd-at sglr-reference --folder demo \
		--parallel 2 --runtime.threads 1

lint: install
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

# Tests marked gpu skip themselves where there is no CUDA device. A file's tests stay in one process.
test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --cov --cov-report=term --cov-fail-under=90

format: install
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

clean:
	rm -rf $(VENV) demo .coverage .mypy_cache .ruff_cache .pytest_cache
