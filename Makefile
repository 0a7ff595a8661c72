# Two commands matter: `make quickstart` and `make test`. Both set the environment up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two processes of one thread each: on two cores one works while the other waits for ranks to start.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: help setup quickstart control test test-slow test-all combinations lint hooks format types gpu gpu-wheels bench mutants clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## create the virtual environment

# torch first and by its constraint: see constraints.txt.
$(READY): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "megagrin: error: $(PYTHON) must be Python 3.11 or newer"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; a few minutes)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

quickstart: setup  ## real text in, a trained GRIN model out: curves, sample, Hugging Face export
	@launch/quickstart.sh

control: setup  ## the quickstart's training on shuffled labels: the loss must not fall
	@launch/quickstart.sh --shuffle-labels

test: setup  ## the fast suite, under 10 minutes on 2 cores
	@$(PYTEST) --dist loadfile -m 'not slow and not gpu' --ignore=tests/kernels_interpret
	@TRITON_INTERPRET=1 $(PYTEST) --dist worksteal tests/kernels_interpret

test-slow: setup  ## the slow suites
	@$(PYTEST) --dist loadfile -m 'slow and not long and not gpu' --ignore=tests/kernels_interpret --timeout 900

test-all: test test-slow  ## everything that needs no GPU
	@$(PYTEST) --dist loadfile -m 'long and not gpu' --ignore=tests/kernels_interpret --timeout 900

combinations: setup  ## every case of README's table, and the table from those that passed; half an hour
	@mkdir -p runs; $(BIN)/python -m pytest -m 'not gpu' tests/parallel tests/engines --timeout 900 --junitxml=runs/combinations.xml; \
	  $(BIN)/python tests/parallel/combinations.py runs/combinations.xml

lint: setup  ## ruff and shellcheck
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/shellcheck launch/*.sh launch/*.sbatch .ci/run tests/launch/*.sh

hooks: setup  ## the hooks of pre-commit, lint and types among them, on every file
	@$(BIN)/pre-commit run --all-files

format: setup  ## rewrite files in the project's format
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format --quiet .

types: setup  ## mypy
	@$(BIN)/mypy

gpu:  ## everything that needs a GPU, in two HALFs (first: 5 minutes, second: 6; default both), into OUT (runs/gpu); installs nothing
	@launch/gpu.sh

gpu-wheels:  ## pytest and its needs for a machine with a GPU and no network, into WHEELS (wheels/), which must travel along
	@launch/gpu_wheels.sh

bench: setup  ## CPU benchmark against transformers
	@$(BIN)/python benchmarks/cpu_vs_transformers.py

# Not part of CI: a full pass has 18,000 mutants. FILES="megagrin/rng.py", SAMPLE=50 (per file), SEED=1, OUTPUT=file.jsonl, AGAIN=file.jsonl.
mutants: setup  ## what the fast tests cannot see: mutation testing of FILES, or of SAMPLE mutants per file
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mutants]'
	@nice -n 15 $(BIN)/python tests/mutants/run.py $(FILES) $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(SEED),--seed $(SEED)) \
		$(if $(OUTPUT),--output $(OUTPUT)) $(if $(AGAIN),--again $(AGAIN))

clean:  ## remove runs and caches, keep the environment
	@rm -rf runs .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
