# make demo      the fused LSTM on this machine: accuracy, a language model trained for a minute, timing, one report
# make test      the test suite: without a GPU in Triton's interpreter, and on code compiled for TARGET=sm_90, executed on the CPU
# make sweep     without a GPU: random problems on compiled code, for BUDGET seconds
# make quick     a short test suite, for use between changes
# make check     ruff, formatting, types
# make gpu       on an NVIDIA GPU: its tests, benchmarks (BUDGET=300 seconds) and their report, compute-sanitizer, resumable
# make mutants   removes synchronisation from the compiled kernels, one piece at a time, and prints what the executor misses (minutes)
# make sanitize  on an NVIDIA GPU: the kernels under compute-sanitizer, of the CUDA toolkit
# make matrix    the test suite with the oldest and with the newest torch and Triton: prints a table
# make clients   other packages with converted LSTMs, in an environment of their own: prints a table
# make step-model  cycles of a step of the sequence kernels, by a model of their compiled code: no GPU needed
#
# Each sets up what it needs: a virtual environment in .venv, from Python 3.10+ and pip alone. PYTHON=python3 VENV=
# uses that Python as it is, with nothing installed and no network. ARGS is passed on: make test ARGS="-k cell -m slow".

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= auto
BUDGET ?= 300
TARGET ?= sm_90

.DEFAULT_GOAL := help

CACHE := .ci-cache

ifeq ($(strip $(VENV)),)

PY := $(PYTHON)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

# The folders kernels/ and bench/ are sub-packages of lstm_triton; links show them to Python where an install would.
ready-%:
	@ln -sfn ../kernels lstm_triton/kernels
	@ln -sfn ../bench lstm_triton/bench

else

PY := $(VENV)/bin/python

ready-%: $(VENV)/.installed-% ;

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; PYTHON=... names one")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Each extra holds the ones before it.
includes-demo := demo
includes-test := demo test
includes-dev := demo test dev

.PRECIOUS: $(VENV)/.installed-%
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $(foreach extra,$(includes-$*),$(VENV)/.installed-$(extra))

endif

# One thread each: where pytest-xdist is at hand, several workers share the cores, and the tests' tensors are small.
PYTEST = if $(PY) -c 'import xdist' 2>/dev/null; then workers="-n $(JOBS) --dist worksteal"; fi; OMP_NUM_THREADS=1 \
         $(PY) -m pytest $$workers

# A run starts dozens of processes, which import the same modules.
unexport PYTHONDONTWRITEBYTECODE

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: ready-demo
	@$(PY) -m lstm_triton.demo $(ARGS)

# Interpreted and compiled kernels need a process each (tests/conftest.py). Status 5 of pytest: ARGS selects none of the one kind.
test: ready-test
	@$(PYTEST) $(ARGS); interpreted=$$?; [ $$interpreted = 0 ] || [ $$interpreted = 5 ] || exit $$interpreted; \
	export COMPILED_FOR=$(TARGET); $(PYTEST) $(ARGS); compiled=$$?; [ $$compiled = 5 ] && exit $$interpreted || exit $$compiled

sweep: ready-test
	@$(PY) tests/sweep.py $(BUDGET) $(ARGS)

quick: ready-test
	@$(PYTEST) -m "not slow and not long" --ignore-glob="*/test_bench_*" --ignore-glob="*/test_demo*" $(ARGS)

gpu: ready-test
	@$(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make gpu: no NVIDIA GPU here; make test runs in the interpreter")'
	@.ci/gpu $(PY) $(BUDGET)

matrix:
	@PYTHON="$(PYTHON)" ARGS="$(ARGS)" .ci/matrix

mutants: ready-test
	@OMP_NUM_THREADS=1 $(PY) tests/mutants.py $(ARGS)

sanitize: ready-test
	@$(PY) tests/sanitize.py $(ARGS)

step-model: ready-test
	@$(PY) tests/step_model.py $(ARGS)

CLIENTS := $(CACHE)/clients

clients: $(CLIENTS)/.installed
	@$(CLIENTS)/bin/python tests/clients.py $(ARGS)

$(CLIENTS)/.installed: tests/clients.txt constraints.txt pyproject.toml
	@rm -rf $(CLIENTS) && mkdir -p $(CACHE)
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -r tests/clients.txt -e .
	@touch $@

# mypy does not follow the mapping of folders to sub-packages: it reads a copy laid out as an install would be.
check: ready-dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@rm -rf $(CACHE)/types && mkdir -p $(CACHE)/types
	@cp -rL lstm_triton $(CACHE)/types/ && cp -rL kernels bench $(CACHE)/types/lstm_triton/
	@cd $(CACHE)/types && $(if $(findstring /,$(PY)),$(abspath $(PY)),$(PY)) -m mypy --config-file $(CURDIR)/pyproject.toml \
	    --cache-dir $(CURDIR)/$(CACHE)/mypy -p lstm_triton

.PHONY: help demo test quick sweep check gpu sanitize matrix mutants step-model clients clean

clean:
	rm -rf $(VENV) $(CACHE) build dist demo-report *.egg-info lstm_triton/kernels lstm_triton/bench
