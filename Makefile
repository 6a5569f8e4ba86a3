# Lorica: the commands of a newcomer and of CI. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
STAGE ?= 2
ARGS ?=
PYTEST_ARGS ?=

ifeq ($(strip $(VENV)),)
# VENV= : the given interpreter as it is, with whatever it has; nothing is installed.
PY := $(PYTHON)
STAMP :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
endif

# Asked only by the recipe that needs it: one process for each GPU, or two on a machine without.
NUM_GPUS = $(shell $(PY) -c 'import torch; print(torch.cuda.device_count() or 2)')

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|' 2>/dev/null \
		|| grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST)
	@echo
	@echo "  make demo STAGE=3 ARGS='--minutes 10 --data_path my/texts'    another ZeRO stage, more options (ARGS=--help)"
	@echo "  make demo PYTHON=python3 VENV=                                with this interpreter, nothing is installed"
	@echo "  make install PIP_FLAGS='--extra-index-url URL'                more options for pip"

install: $(STAMP) ## make .venv and install Lorica in it, with the versions of constraints.txt

ifneq ($(STAMP),)
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard native/*.*)
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("Python is too old: expected 3.10 or newer, got %d.%d. Fix: make PYTHON=/path/to/a/newer/python" % v[:2])'
	@echo "Installing into $(VENV): a few minutes the first time, for torch is large."
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet $(PIP_FLAGS) --upgrade --constraint constraints.txt pip
	$(PY) -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --build-constraint constraints.txt --editable '.[demo,test]'
	@touch $@
endif

demo: install ## pretrain a GPT on Python's standard library for about five minutes, with ZeRO-2 and bf16
	@echo "A GPT learns to write Python from the sources of Python's standard library: ZeRO-$(STAGE), bf16, one process for"
	@echo "each GPU or two on the CPU. First the text is tokenised (once), then training takes about five minutes."
	@echo "Watch the loss: it begins where blind guessing is (8 to 9 nats per token) and falls. Ctrl-C ends it at any time."
	$(PY) -m lorica --num_gpus=$(NUM_GPUS) examples/gpt/train.py --deepspeed \
		--deepspeed_config examples/gpt/ds_config_zero$(STAGE).json $(ARGS)

test: lint ## lint, then the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -m 'not slow' $(PYTEST_ARGS)

test-all: lint ## lint, then all tests, those that take minutes too
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_ARGS)

lint: install ## ruff (check and format) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m mypy --strict --follow-imports=silent examples/gpt/*.py

clean: ## remove .venv, caches and the results of demos
	rm -rf $(VENV) build dist *.egg-info runs lorica/kernels/_native.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find lorica native tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
