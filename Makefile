# Everything a fresh machine needs is set up by the first target that needs it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= benchmarks/results/here
READY := $(VENV)/ready
DOCS := .venv-docs

.PHONY: demo docs test test-browser test-all rehearse least package mutations lint bench bench-all lock clean

demo: $(READY)  ## see what it does
	$(BIN)/flexreason demo

test: $(READY)  ## what CI runs, with lint and test-browser; it says what it skips
	$(BIN)/pytest -q -n 2 --dist worksteal -rs

test-browser: $(READY)  ## pages in a real headless Chromium: Debian's, which is installed where it is missing
	@command -v chromium > /dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -qq --no-install-recommends chromium fonts-noto-core fonts-noto-color-emoji > /dev/null; } || \
	  { echo "test-browser: there is no chromium here, and apt-get cannot install it (as root, on Debian);"; \
	    echo "install it, and fonts for emoji and Arabic, so that the command chromium is found"; exit 1; }
	$(BIN)/pytest -q --in-browser tests/test_browser.py

test-all: $(READY)  ## also the slow, exhaustive tests, and many more random examples
	HYPOTHESIS_PROFILE=thorough $(BIN)/pytest -q -n 2 -m "not gpu"
	$(BIN)/pytest -q -n 2 -m gpu --rehearse
	$(BIN)/python tests/mutations.py

rehearse: $(READY)  ## what is for GPUs, on the CPU at small sizes: that it runs, nothing about a GPU
	$(BIN)/pytest -q -n 2 -m gpu --rehearse
	$(BIN)/pytest -q tests/test_benchmarks.py -m slow

least:  ## the tests under the least versions declared, in an environment of its own: torch 2.11 brings CUDA, gigabytes
	$(PYTHON) -m venv .venv-least
	.venv-least/bin/pip install --quiet --disable-pip-version-check -r requirements-least.txt
	PYTHONPATH=. .venv-least/bin/python -m pytest -q -n 2 --dist worksteal

package: $(READY)  ## wheel and source distribution, installed in an empty environment with and without extras: minutes
	$(BIN)/pytest -q tests/test_package.py -m "slow or not slow"

mutations: $(READY)  ## break each promise in a place or two, and see which test notices
	$(BIN)/python tests/mutations.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS)/ready  ## the site, in build/site. Warnings are errors, which they would not be under --quiet
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	$(DOCS)/bin/pytest -q --noconftest -o addopts= -p no:cacheprovider tests/test_site.py

bench: $(READY)  ## tables and plots of this machine, in OUT; under ten minutes on two cores
	$(BIN)/python benchmarks/steps.py --out $(OUT) --repeats 3 --shapes "8 x 64/256/64"
	$(BIN)/python benchmarks/masks.py --out $(OUT) --repeats 3 --shapes chat agent --lengths 1024 4096 16384 --lists
	$(BIN)/python benchmarks/growth.py --out $(OUT) --repeats 3 --turns 1 2 4 8 16 32 --steps-to 16
	$(BIN)/python benchmarks/where.py --out $(OUT) --repeats 3 --shapes "8 x 64/256/64"
	$(BIN)/python benchmarks/long.py --out $(OUT) --lengths 8192
	$(BIN)/python benchmarks/counts.py --out $(OUT) --lengths 8192 32768
	$(BIN)/python benchmarks/data.py --out $(OUT) --repeats 3 --steps 75 --tokens 50000 250000

bench-all: $(READY)  ## all of them: hours. Stopped, it goes on where it was; what is done is kept in OUT
	for name in steps masks growth where long counts data; do $(BIN)/python benchmarks/$$name.py --out $(OUT) || exit 1; done

lock: $(READY) $(DOCS)/ready  ## write down what is installed now
	$(BIN)/pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+cpu//' > requirements-dev.txt
	head -1 requirements-docs.txt > $(DOCS)/lock && $(DOCS)/bin/pip freeze >> $(DOCS)/lock && mv $(DOCS)/lock requirements-docs.txt

clean:
	rm -rf $(VENV) .venv-least $(DOCS) build dist *.egg-info

$(READY): requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(READY)

$(DOCS)/ready: requirements-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $(DOCS)/ready
