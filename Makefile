# make run    sets up and does the main job: synthetic raw days -> data set -> trained DLRM -> AUC
# make test   sets up and runs the tests, but for the slowest kinds
# make test-all   all of them, as CI does
# make doctor sets up, says what is on this machine, and checks that everything computes here what it should
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: run test test-all doctor lint bench setup clean

run: setup
	$(PY) -m bench quickstart

TESTS := -n auto --maxprocesses 4 --dist worksteal

test: setup
	$(PY) -m tests.warm
	$(PY) -m pytest $(TESTS) -m "not slow"

test-all: setup
	$(PY) -m tests.warm
	$(PY) -m pytest $(TESTS)

doctor: setup
	$(PY) -m gpu_etl doctor

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: setup
	$(PY) -m bench etl
	$(PY) -m bench load
	$(PY) -m bench train

setup: $(READY)

# Where there is a GPU, its packages come along.
GPU := $(if $(shell nvidia-smi -L 2>/dev/null),-r requirements-gpu.txt)

$(READY): requirements.txt requirements-dev.txt requirements-onnx.txt requirements-gpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt -r requirements-onnx.txt $(GPU)
	touch $(READY)

clean:
	rm -rf $(VENV) data runs
