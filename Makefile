# Everything a fresh machine needs is set up by the first target that needs it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test test-all rehearse least mutations lint bench lock clean

demo: $(READY)  ## see what it does
	$(BIN)/flexreason demo

test: $(READY)  ## what CI runs, with lint
	$(BIN)/pytest -q -n 2

test-all: $(READY)  ## also the slow, exhaustive tests, and many more random examples
	HYPOTHESIS_PROFILE=thorough $(BIN)/pytest -q -n 2 -m "not gpu"
	$(BIN)/pytest -q -n 2 -m gpu --rehearse
	$(BIN)/python tests/mutations.py

rehearse: $(READY)  ## the tests for GPUs, on the CPU at small sizes: that they run, nothing about a GPU
	$(BIN)/pytest -q -n 2 -m gpu --rehearse

least:  ## the tests under the least versions declared, in an environment of its own: torch 2.11 brings CUDA, gigabytes
	$(PYTHON) -m venv .venv-least
	.venv-least/bin/pip install --quiet --disable-pip-version-check -r requirements-least.txt
	PYTHONPATH=. .venv-least/bin/python -m pytest -q -n 2

mutations: $(READY)  ## break each promise in a place or two, and see which test notices
	$(BIN)/python tests/mutations.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## tables on this machine; about ten minutes
	$(BIN)/python benchmarks/layout.py
	$(BIN)/python benchmarks/step.py --repeats 3 --shapes 8 16

lock: $(READY)  ## write down what is installed now
	$(BIN)/pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+cpu//' > requirements-dev.txt

clean:
	rm -rf $(VENV) .venv-least build dist *.egg-info

$(READY): requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(READY)
