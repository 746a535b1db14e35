# The course's commands; all they need is Python 3.11 or newer. `make` alone lists them.
#
#   PYTHON=python3.12      the interpreter for .venv, if `python3` is not the right one
#   TORCH_INDEX=URL        one more package index. On Linux PyPI's torch brings gigabytes of CUDA; the build for CPUs is at
#                          https://download.pytorch.org/whl/cpu
#   LAB=--allow-root       options for JupyterLab, in `make lab`; root needs this one
#   LESSON="00 03"         the lessons for `make course` and `make outputs` (default: all)
#   FUZZ_SECONDS=300       for each target of `make fuzz`; FUZZ_SEED=5 repeats what a seed found
#   PROFILE=gpu            laptop (default), smoke or gpu, for `make course`
# On Windows use WSL, or conda with environment.yml and the commands below each target.

PYTHON  ?= python3
PROFILE ?= laptop
BIN     := .venv/bin
READY   := .venv/lorakit-is-installed
LESSONS  = $(shell ls -r notebooks/[0-9][0-9]_*.ipynb)
INDEX    = $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# two workers with one thread each do more than one with two threads; the tests of a file, or a lesson's cells, stay together
# the lessons come in reverse order: the last takes longest, and begun first it does not run on alone
PYTEST   = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# what lorakit gives its kernels (lorakit/course/runner.py), for JupyterLab and nbval
export HF_DATASETS_DISABLE_PROGRESS_BARS := 1
export TOKENIZERS_PARALLELISM := false
export PYTHONHASHSEED := 0
export GOMP_SPINCOUNT := 3000

.DEFAULT_GOAL := help
.PHONY: help start course lab test quick fuzz lint drift outputs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

start: $(READY) ## set up, then run lesson 00: a language model learns to write SQL
	@$(BIN)/lorakit run 00

course: $(READY) ## run all lessons in order and print a table of their results
	@$(BIN)/lorakit run $(LESSON) --profile $(PROFILE)

lab: $(READY) ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab notebooks $(LAB)

test: lint ## all tests: the package, each lesson on a tiny model, and the lessons' committed outputs
	@$(PYTEST) tests
	@$(PYTEST) $(LESSONS) --nbval --nbval-current-env --nbval-cell-timeout 1200 --no-loadscope-reorder

quick: lint ## in about two minutes what breaks most often: neither lessons nor the base model nor what takes long
	@$(PYTEST) tests -m "not slow and not long"

fuzz: $(READY) ## random plans, configs, queries, adapters and kills, each for FUZZ_SECONDS (20), from FUZZ_SEED (a new one)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz -q -s

lint: $(READY) ## check style and format, notebooks included, and the package's types
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check . && $(BIN)/mypy --no-error-summary

drift: $(READY) ## what the newest transformers, peft, trl, bitsandbytes and datasets would break; it only warns
	@$(BIN)/python tests/drift.py --newest

outputs: $(READY) ## run lessons and solutions, and refresh the outputs that are committed with them
	@$(BIN)/lorakit run $(LESSON) --in-place && $(BIN)/lorakit exercises --refresh

clean: ## remove what the commands above made, except .venv
	@rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find lorakit tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# The mark is made last, so that a setup that was interrupted starts again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: Python 3.11 or newer is needed as '$(PYTHON)'; name another: make PYTHON=python3.12"; exit 1; }
	@echo "Setting up .venv (about 2 minutes, 2 GB) ..."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || { \
		echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs: sudo apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(INDEX) -c constraints.txt -e '.[test]'
	@touch $@
