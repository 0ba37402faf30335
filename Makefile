# make demo   sets up everything and runs the quickstart comparison on real data
# make test   sets up everything and passes the tests
# make test-slow  the tests that take minutes each
# make test-deploy  the tests that run a SuperLink and SuperNodes: some minutes
# make test-browser  the page of a report in Debian's chromium, driven by chromium-driver
# make mistakes   puts known privacy mistakes into a copy of the code; each must fail a test
# make lint   style, types and the floors of the house

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow test-deploy test-browser mistakes lint setup data clean

demo: setup
	$(BIN)/fedlora fetch vader
	$(BIN)/fedlora fetch minilm
	$(BIN)/fedlora compare quickstart

test: data
	$(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS)

test-slow: data
	$(BIN)/python -m pytest -m slow

test-deploy: data
	$(BIN)/python -m pytest -m deploy

test-browser: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]'
	$(BIN)/python -m pytest -m browser -rs

mistakes: data
	$(BIN)/python -m tests.mistakes

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

data: setup
	$(BIN)/fedlora fetch vader
	$(BIN)/fedlora fetch minilm
	$(BIN)/fedlora fetch digits

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Fedlora needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "Setting up $(VENV): about 1.5 GB and a few minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data,dev]'
	$(BIN)/python -m compileall -q fedlora strategies clients simulations
	@touch $@

clean:
	rm -rf $(VENV) build dist
