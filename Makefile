# Two commands: `make demo` runs the main job, `make test` the checks. Each sets up .venv by itself.
#
#   make demo                                     a simulated drive -> node -> recorder over DDS, scored live, under
#                                                 several latency budgets; film and pictures in demo_output/latest
#   make demo SOURCE=<folder|video|/dev/video0>   the same chain on your own pictures; VIEW=1 opens a window
#   make test                                     lint, types, tests
#   make test-oldest                              networks, engines and policy with the oldest releases that setup.py
#                                                 promises, on Python 3.10 (PYTHON310 chooses it); not part of `make test`
#   make train DATA=<folder>                      train camvid_tiny again, in its six stages; MODEL=<recipe>: another
#   make overhead                                 the node's own cost per frame
#   make reference                                write docs/reference.md and the viewers' configurations again
#
# PYTHON chooses the interpreter (3.10 to 3.13), TORCH the PyTorch requirement, e.g. TORCH=torch for the newest build,
# TORCH_INDEX where it comes from, e.g. https://download.pytorch.org/whl/cpu for a machine without an NVIDIA GPU.

SHELL := /bin/bash
VENV := .venv
# What was said once holds until something else is said, which takes effect at once.
SAID := $(filter-out undefined,$(origin TORCH) $(origin PYTHON) $(origin TORCH_INDEX))
TORCH ?= $(or $(shell cat $(VENV)/.torch 2>/dev/null),torch==2.13.0)
PYTHON ?=
TORCH_INDEX ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.test-installed
SOURCE ?=
MODEL ?=
VIEW ?=
DATA ?= ../shared/data/camvid
PYTEST_ARGS ?=

.PHONY: demo test test-oldest lint train overhead reference clean

demo: $(STAMP)
	@$(BIN)/clustvit-ros demo $(if $(MODEL),--model "$(MODEL)") $(if $(SOURCE),--source "$(SOURCE)") $(if $(VIEW),--view)

# Each core runs tests, and then, one by one, those that want the machine to themselves. 5: PYTEST_ARGS left none of a kind.
test: lint $(TEST_STAMP)
	@$(BIN)/python -m pytest -n logical -m "not slow and not gpu and not alone" $(PYTEST_ARGS); beside=$$?; \
	 $(BIN)/python -m pytest -m "not slow and not gpu and alone" $(PYTEST_ARGS); alone=$$?; \
	 [[ $$beside$$alone =~ ^(00|05|50)$$ ]]

# JetPack 6's: Ubuntu 22.04's NumPy and OpenCV, NVIDIA's first PyTorch for it.
PYTHON310 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python) python3.10)
OLDEST := torch==2.3.0 numpy==1.21.5 opencv-python-headless==4.5.4.60 safetensors==0.4.0 pyyaml
OLDEST_STAMP := .venv-oldest/.installed

test-oldest: $(OLDEST_STAMP)
	PYTHONPATH=. .venv-oldest/bin/python -m pytest -p no:cacheprovider test/networks test/engine test/policy $(PYTEST_ARGS)

$(OLDEST_STAMP): Makefile
	$(PYTHON310) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check $(OLDEST) "pytest>=7" pytest-timeout pytest-rerunfailures hypothesis
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

train: $(STAMP)
	set -e; for recipe in $(or $(MODEL),camvid_tiny_stage1 camvid_tiny_stage2 camvid_tiny_stage3 \
	    camvid_tiny_stage4 camvid_tiny_stage5 camvid_tiny); do \
	  $(BIN)/clustvit-ros train config/train/$$recipe.yaml --data "$(DATA)"; done

overhead: $(STAMP)
	$(BIN)/python scripts/node_overhead.py

# What is written from the code: docs/reference.md, RViz configuration, Foxglove layout.
reference: $(STAMP)
	$(BIN)/python scripts/write_reference.py
	$(BIN)/python scripts/write_views.py

$(STAMP): setup.py Makefile scripts/set_up.sh scripts/find_python.sh $(if $(SAID),FORCE)
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" TORCH_INDEX="$(TORCH_INDEX)" MAKECMDGOALS="$(MAKECMDGOALS)" \
	  bash scripts/set_up.sh $(VENV) ros,opencv,train,onnx,sim,bags,video,completion,test
	@touch $@

.PHONY: FORCE
FORCE:

# Ray and Triton are large, and only the tests of label-bags and of the fused label kernel need them.
$(TEST_STAMP): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[fleet,triton]"
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest build install log dist *.egg-info demo_output
