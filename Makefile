# Everything a person types first. Needs Python 3.11 or newer, with venv, and nothing else.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: help install demo demo-search evidence test test-long test-cluster fast bench-ingest bench-bounded bench-executor bench-step bench-guide bench-sharing bench-ledger bench-plan format lint types check clean

help:
	@echo "make install         only the environment, in .venv (everything below makes it, too)"
	@echo "make demo    pre-train on embedded photographs, in three to four minutes"
	@echo "make demo-search     try eight settings on them, and report which is best, in ten minutes"
	@echo "make test    run all tests but those that take minutes each (make test-long)"
	@echo "make test-cluster    launch on machines of our own and lose one; as root, in minutes"
	@echo "make test-long       run those tests"
	@echo "make fast    run the tests that take seconds"
	@echo "make bench-ingest    pictures per core-second beside the usual ways (PICTURES=photographs)"
	@echo "make bench-bounded   what prepare --short-side costs and saves (PICTURES=folder of yours)"
	@echo "make bench-executor  what Ray Data's executor takes of the CPU, with and without rests"
	@echo "make bench-step      time of a training step beside a plain one, in a few minutes"
	@echo "make bench-guide     what cheaper attentive guides cost, and how alike their weights are"
	@echo "make bench-sharing   what trials of a search read when they share one stream"
	@echo "make bench-ledger    take MLflow away from a run and kill its driver: what does the history lack?"
	@echo "make bench-plan      what a plan's simulation says beside what happens, in a quarter of an hour"
	@echo "make evidence        train DropPos and its controls on CIFAR-10; hours, and it goes on where it was"
	@echo "make check   format, lint and types, as CI does before the tests"

install: $(READY)

demo: $(READY)
	@$(BIN)/droppos demo

demo-search: $(READY)
	@$(BIN)/droppos demo-search

evidence: $(READY)
	@$(BIN)/droppos evidence

# Clusters and training runs take all CPUs, one at a time; all other tests share them.
test: $(READY)
	$(BIN)/python -m pytest -m "not long and (shares or not slow)" -n auto --dist loadfile
	$(BIN)/python -m pytest -m "slow and not long and not shares"

test-long: $(READY)
	$(BIN)/python -m pytest -m long

test-cluster: $(READY)
	@$(BIN)/python -m tests.hosts.proof

fast: $(READY)
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile

bench-ingest: $(READY)
	@$(BIN)/python -m tests.benchmarks.ingest $(if $(PICTURES),--photographs $(PICTURES))

bench-bounded: $(READY)
	@$(BIN)/python -m tests.benchmarks.bounded_copies $(PICTURES)

bench-executor: $(READY)
	@$(BIN)/python -m tests.benchmarks.executor

bench-step: $(READY)
	@$(BIN)/python -m tests.benchmarks.step

bench-guide: $(READY)
	@$(BIN)/python -m tests.benchmarks.guide

bench-sharing: $(READY)
	@$(BIN)/python -m tests.benchmarks.sharing $(if $(PICTURES),--photographs $(PICTURES))

bench-ledger: $(READY)
	@$(BIN)/python -m tests.benchmarks.ledger

bench-plan: $(READY)
	@$(BIN)/python -m tests.benchmarks.plan $(if $(PICTURES),--photographs $(PICTURES))

check: lint types

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/basedpyright

format: $(READY)
	$(BIN)/ruff format .

# The lock pins every version; uv installs it in a fraction of pip's time. Without bytecode, the
# first run of everything would compile a gigabyte of Python in each of Ray's processes.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "droppos needs Python 3.11 or newer; set PYTHON=python3.11, say" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { echo "Python's venv module is missing; on Debian: apt install python3-venv" >&2; exit 1; }
	@echo "installing about 7 GB into .venv, once (torch brings CUDA)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.8"
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

clean:
	rm -rf .venv build *.egg-info
