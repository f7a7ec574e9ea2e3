# Two commands for users (quickstart, test) and the parts they are made of. GNU make 4.3 or newer.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed

# The first Python that is new enough; `make PYTHON=/path/to/python3.12 ...` chooses another.
PYTHON ?= $(shell for candidate in python3 python3.13 python3.12 python3.11 python3.10; do \
	"$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo "$$candidate" && break; done)

# What DeepSpeed compiles when a setting needs it (Adam on the CPU, for offload) belongs to this environment's torch.
export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/torch_extensions

# pytest keeps the files of tests as it has prepared them, six seconds of work for each of its processes.
unexport PYTHONDONTWRITEBYTECODE

# Tests run on the CPU wherever they are started, with one thread a process, so that their figures do not depend on the machine.
TEST_ENV := DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
# Test files that run side by side; more than the cores helps little, because some start two ranks of their own.
TEST_WORKERS ?= 2

.PHONY: help venv quickstart chain test test-all unit check benchmark-host baseline clean

help: ## Shows this list.
	@grep -E '^[a-z-]+: .*## ' Makefile | sed -E 's/^([a-z-]+): .*## (.*)/  make \1 \t\2/' | expand -t 24

venv: $(STAMP) ## Makes the virtual environment in .venv and installs everything.

quickstart: $(STAMP) ## Trains a tiny video VAE on the shipped samples through three phases and says where the report is.
	@VENV="$(VENV)" launch/quickstart.sh

chain: $(STAMP) ## Trains tiny video and audio VAEs, encodes with them, trains a diffusion transformer and samples clips with sound.
	@VENV="$(VENV)" launch/chain.sh

# pytest-xdist would begin with the files of most tests, and those of few tests take longest here: they would come last, one alone.
PYTEST := $(TEST_ENV) PATH="$(BIN):$$PATH" "$(BIN)/python" -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test: $(STAMP) ## Runs the tests that this machine can run, of long sweeps one case of each kind.
	@$(PYTEST) -m "not exhaustive"

test-all: $(STAMP) ## Runs every test that this machine can run, before a release.
	@$(PYTEST)

unit: $(STAMP) ## Runs the fast tests only.
	@$(PYTEST) -m "not slow and not exhaustive" tests/unit tests/contracts

check: $(STAMP) ## Runs the linter, the formatter, the type checker and the import contracts.
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .
	@"$(BIN)/mypy"
	@"$(BIN)/lint-imports" --no-cache --no-logo

benchmark-host: $(STAMP) ## Compares the host's time of an update through the trainer with bare loops; takes minutes.
	@$(TEST_ENV) "$(BIN)/python" benchmarks/host_time.py --output runs/host_time.json

baseline: $(STAMP) ## Writes down what an update costs now, which `make test` compares with; commit it with what made it dearer.
	@$(TEST_ENV) "$(BIN)/python" benchmarks/slowdown.py --renew

clean: ## Removes the virtual environment and the caches; runs/ stays.
	rm -rf "$(VENV)" build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	@if [[ -z "$(PYTHON)" ]]; then \
		echo "make: Python 3.10 or newer is needed and none was found. Install one, or name it: make PYTHON=/path/to/python3 venv" >&2; \
		exit 1; \
	fi
	@echo "Installing into $(VENV) with $$("$(PYTHON)" --version); PyTorch with CUDA takes about 5 GB of disk and some minutes the first time."
	@"$(PYTHON)" -m venv "$(VENV)" || { \
		echo "make: cannot create $(VENV). On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@"$(BIN)/python" -m pip install --quiet --upgrade pip
	@PYTHONWARNINGS=ignore::UserWarning "$(BIN)/python" -m pip install --quiet --constraint constraints.txt --editable '.[test,dev,tensorboard,storage]' || { \
		echo "make: the installation failed; pip's message is above. Check network and disk space, then run the same command again." >&2; \
		exit 1; }
	@rm -rf "$(TORCH_EXTENSIONS_DIR)"
	@touch "$@"
	@echo "Installed."
