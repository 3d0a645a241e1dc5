# make demo | test | test-slow | lint | bench | setup. Everything needed is installed into .venv by `make setup`.
#
#   make setup TORCH="torch==2.13.0"        another build: give any pip requirement or wheel
#   make demo ARGS="sft.train.max_steps=50" pass overrides on to the pipeline

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= $(shell grep '^torch==' constraints.txt)
ARGS ?=
# The repository root on sys.path would hide Hugging Face's `kernels` package behind ours.
export PYTHONSAFEPATH := 1
export TOKENIZERS_PARALLELISM := false
# Another build of torch is another installation.
STAMP := $(VENV)/.seedling-$(shell echo '$(TORCH)' | cksum | cut -d ' ' -f 1)

.PHONY: help setup demo test test-slow lint bench clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -4

# Torch first: a resolver that meets it late may replace a CPU build by gigabytes of CUDA.
$(STAMP): constraints.txt setup.py pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e ".[gpu,demo,dev]"
	@touch $@

setup: $(STAMP)

demo: setup
	$(BIN)/seedling pipeline configs/pipelines/demo.yaml $(ARGS)

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

# Real Slurm, machines that are lost, hundreds of faults: as root on Debian, see docs/clusters.md; else these skip.
test-slow: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/features.py
	$(BIN)/python benchmarks/encoder_step.py
	$(BIN)/python benchmarks/long_form.py
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/rl_step.py

clean:
	rm -rf build dist runs .pytest_cache .ruff_cache
