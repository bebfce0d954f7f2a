# Everything from a bare machine: python3 with venv, make and a C compiler are enough.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help quickstart test test-python test-slurm stress coverage lint benchmark clean

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do \
		printf '%-12s %s\n' "$$target" "$$text"; done

quickstart: .venv/installed  ## the whole workflow on a CPU: corpus, tokenizer, preparation, pretraining, resume, conversion
	@bash scripts/quickstart.sh

test: .venv/installed  ## the tests that need neither a GPU nor Slurm, in minutes
	$(BIN)/pytest -n 2 --dist loadfile

test-python:  ## the tests on another Python, in a clone with an environment of its own: make test-python PYTHON=python3.13
	rm -rf out/test-python
	git clone --quiet . out/test-python
	$(MAKE) -C out/test-python test

SLURM_TESTS := slurm
test-slurm: .venv/installed  ## on a real Slurm of two nodes in network namespaces of this machine; needs root
	@command -v slurmctld slurmd munged ip >/dev/null || \
		(apt-get update --quiet && \
		apt-get install --yes --no-install-recommends slurmctld slurmd slurm-client munge iproute2 procps)
	$(BIN)/pytest tests/slurm -m '$(SLURM_TESTS)' --tb short

export STRESS_DISTURBANCES ?= 60
export STRESS_SEED ?= 0
stress: .venv/installed  ## a run that is killed, stopped, without room or damaged 60 times: STRESS_DISTURBANCES= STRESS_SEED=
	$(BIN)/pytest tests/test_stress.py -m slow -s

TOKENIZER := data/quickstart/tokenizer.model
benchmark: .venv/installed  ## how fast this machine encodes, reads and trains, after make quickstart or with TOKENIZER=
	$(BIN)/python scripts/benchmark_data.py --tokenizer $(TOKENIZER)
	$(BIN)/python scripts/benchmark_step.py

# TESTS= measures what some of the tests reach: make coverage TESTS=tests/data
coverage: .venv/installed  ## which lines the tests run, in the processes that they start too; html in out/coverage
	mkdir -p out/coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 --dist loadfile $(TESTS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage html --quiet --directory out/coverage/html
	$(BIN)/coverage report

lint: .venv/installed  ## ruff, mypy and shellcheck
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/shellcheck scripts/*.sh scripts/slurm/*.sbatch tests/slurm/*.sh .ci/run

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "installing the package and its development tools into .venv, which takes a few minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:  ## remove the environment, the coverage report and what make quickstart wrote
	rm -rf .venv out/coverage out/quickstart data/quickstart
