# Everything is done in .venv, which is made on the first call. PYTHON=python3.12 make … chooses another Python.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q install -c constraints.txt

.PHONY: help demo up down test test-documents compose-test faults chaos multihost check bench docs screenshots lint format install clean

help:
	@echo "make demo    install, and train and probe a small encoder on this machine"
	@echo "make up      install, and start the service on this machine; make down stops it"
	@echo "make test    install, and run the tests, but for those of the documents"
	@echo "make test-documents  install, and run every block of code in the documents; real trainings, some of them long"
	@echo "make compose-test  install what the Dockerfiles install, and run docker-compose.yml without Docker"
	@echo "make faults  install, and run the whole table of faults, whose outcome it writes to tests/faults/outcome.md"
	@echo "make chaos   install, and run 1,000 jobs against a stand-in of Ray and 100 on Ray under seeded faults"
	@echo "make multihost  install, and as root run a training over network namespaces as machines: one is cut off, one killed"
	@echo "make bench   install, and run the benchmarks"
	@echo "make screenshots  install, and take pictures of every view of the dashboard, into docs/screenshots"
	@echo "make docs    write docs/reference anew from the code"
	@echo "make check   format, lint, types, architecture and unit tests"

demo: .venv/installed
	$(BIN)/maestro demo

up: .venv/installed
	$(BIN)/maestro up --detach

down: .venv/installed
	$(BIN)/maestro down

# The browser's tests in a process of their own: Playwright keeps an event loop running in it.
test: .venv/installed-dev
	$(BIN)/python -m pytest -q --ignore=tests/browser --ignore=tests/documents
	$(BIN)/python -m pytest -q tests/browser

# Every block of the documents, the tutorial word by word: real trainings, too long for each change.
test-documents: .venv/installed-dev
	$(BIN)/python -m pytest -q tests/documents

compose-test: .venv/installed-dev
	$(BIN)/python -m pytest -q -s tests/deploy/live.py

faults: .venv/installed-dev
	$(BIN)/python -m pytest -q tests/faults --faults --outcome tests/faults/outcome.md

chaos: .venv/installed-dev
	$(BIN)/python -m tests.faults.chaos

multihost: .venv/installed-dev
	$(BIN)/python -m tests.multihost

check: lint
	$(BIN)/python -m pytest -q tests/unit tests/test_architecture.py tests/test_documentation.py

# Each prints one JSON line or more; benchmarks/README.md has the last ones. Some minutes each; cifar10 and cifar10_table take hours and run by hand.
bench: .venv/installed-dev
	@for name in train_step images start_up export embed checkpoint_stall cheap_pretraining recover reattach dispatch watchers ingest series list_jobs submit packed stream resume_at hour first_paint; do $(BIN)/python -m benchmarks.$$name || exit 1; done

screenshots: .venv/installed-dev
	$(BIN)/python -m tests.browser.screenshots

docs: .venv/installed-dev
	$(BIN)/python -m docs.generate

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: .venv/installed-dev

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "MAEstro needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 …")'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing into .venv (about 2 GB; a few minutes) …"
	$(PIP) -e '.[local]'
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing into .venv with the tools for tests (about 2 GB; a few minutes) …"
	$(PIP) -e '.[dev]'
	@touch .venv/installed $@
