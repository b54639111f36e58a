# `make` lists what there is. PYTHON is the interpreter the environments are made from (3.11 or newer, with pip).
PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := .venv-peers
# pip from outside installs into the environment: a system without ensurepip (Debian without python3-venv) will do.
PIP = $(PYTHON) -m pip --disable-pip-version-check --python

.DEFAULT_GOAL := help
.PHONY: help setup demo test claims bench tables lint format docs constraints

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## the environment .venv, with everything but the docs and the peers

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv --without-pip $(VENV)
	$(PIP) $(BIN)/python install --quiet --constraint constraints.txt pip --editable '.[dev,gguf]'
	touch $@

demo: setup ## prune SmolLM2-135M to half, win it back, report: about six minutes
	$(BIN)/overhaul run recipes/quickstart.yaml

test: setup ## the tests that need neither network nor patience
	@$(BIN)/pytest -n $(WORKERS)

claims: $(VENV)/.peers ## the papers' claims and the agreement with peers: about an hour, into docs/results.json
	$(BIN)/python -c "from overhaul import pretrained; pretrained.resolve(pretrained.DEFAULT)"
	$(BIN)/pytest -m slow tests
	$(BIN)/python -m bench.tables

$(VENV)/.peers: $(READY)
	$(PIP) $(BIN)/python install --quiet --constraint constraints.txt --editable '.[peers]'
	touch $@

bench: setup $(PEERS)/.ready ## speed and memory against peers, as ratios, into docs/results.json
	$(BIN)/python -m bench.run
	$(BIN)/python -m bench.tables

$(PEERS)/.ready: requirements-peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv --without-pip $(PEERS)
	$(PIP) $(PEERS)/bin/python install --quiet --requirement requirements-peers.txt
	touch $@

tables: setup ## the tables of README.md and docs/, from docs/results.json
	$(BIN)/python -m bench.tables

lint: setup ## ruff, pyright, the layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: setup ## ruff's layout and its safe repairs
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: setup ## the documentation site, into site/
	$(PIP) $(BIN)/python install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python docs/settings.py
	$(BIN)/python -m bench.tables
	$(BIN)/zensical build --clean --strict

constraints: setup ## pin what is installed now (torch without its local suffix, so that pip finds it anywhere)
	{ echo '# The versions everything was tested with: written by `make constraints`, read by `make setup`.'; \
	  $(PIP) $(BIN)/python freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt
