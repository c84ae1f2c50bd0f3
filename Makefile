# make demo       set up, draw with the models in assets/, train a NOVA on two pictures, draw them
# make demo-video the same on two clips
# make nova-tiny  make assets/nova-tiny and -video anew, in nova_tiny/; takes hours, continues when stopped
# make test       set up, lint, run the tests
# make test-slow  the slow tests as well
# make check-gpu  what needs a GPU, tested and measured: gpu_check/report.md
# make docs       the documentation as a site: site/index.html (python -m http.server -d site)
#
# TORCH picks another build of PyTorch, for example one without CUDA libraries:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo demo-video nova-tiny test test-slow check-gpu docs lint format setup setup-test clean-demo

demo: setup
	$(BIN)/diffnext generate "a red star" "two green squares" --model assets/nova-tiny --output demo/shapes.png
	$(BIN)/python scripts/demo.py

demo-video: setup
	$(BIN)/python scripts/demo.py clips

nova-tiny: setup
	$(BIN)/python scripts/nova_tiny/make_nova_tiny.py

test: setup-test lint
	$(PYTEST) -n 2 --dist loadfile

test-slow: setup-test
	$(PYTEST) -m "slow and not gpu" -n 2 --dist loadfile

check-gpu: setup-test
	$(BIN)/python scripts/dev/check_gpu.py

docs: setup-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(VENV)/.core
setup-test: $(VENV)/.test

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/.core: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[cache]"
	touch $@

$(VENV)/.test: $(VENV)/.core pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[cache,demo,train,test,docs]"
	touch $@

clean-demo:
	rm -rf demo demo_video
