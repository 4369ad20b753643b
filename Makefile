# Every target sets itself up: `make quickstart` and `make test` work in a fresh clone with nothing but Python.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-faults lint bench clean

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

quickstart: .venv/ready
	$(BIN)/dino-sd quickstart

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Thirty kills, hanging and unlike ranks, restarts: a quarter of an hour on two cores.
test-faults: .venv/ready
	DINO_SD_FAULTS=whole DINO_SD_KILLS=30 $(BIN)/python -m pytest tests/faults

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/ready
	$(BIN)/dino-sd bench step

clean:
	rm -rf .venv runs build dist *.egg-info
