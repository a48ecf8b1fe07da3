# Every target creates what it needs in .venv; nothing has to be installed beforehand but
# Python 3.10 or newer, and a C++ compiler if the kernels are to be compiled.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := edgeseg export calibration kernels
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-all lint lint-tensorrt tensorrt-stubs soak format bench bench-compression bench-estimate bench-int8 gpu nvcc clean

demo: $(VENV)/.device
	$(BIN)/edgeseg demo

test: $(VENV)/.dev tensorrt-stubs
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(VENV)/.dev tensorrt-stubs
	$(BIN)/python -m pytest -m "not gpu"

# 200 000 masks of cameras, an engine and sinks that fail in every way: seven minutes on two cores.
soak: $(VENV)/.dev
	$(BIN)/python -m tests.soak --json benchmarks/results/soak.json

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.cu' '*.h')

# The code that knows TensorRT against the signatures of four releases; needs no TensorRT.
lint-tensorrt: $(VENV)/.dev
	$(BIN)/python tests/tensorrt/stubs.py --check

# From wheels of some MB, downloaded once; where that cannot be, a line says so and tests skip.
tensorrt-stubs: $(VENV)/.dev
	$(BIN)/python tests/tensorrt/stubs.py

# The compiler of the CUDA kernels: this machine's own, or 300 MB from the package index.
nvcc: $(VENV)/.dev
	@command -v nvcc || ls "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" 2>/dev/null || \
	    $(PIP) install --quiet -r requirements/nvcc.txt

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.cu' '*.h')

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_upsample_argmax.py --json benchmarks/results/upsample_argmax.json
	$(BIN)/python benchmarks/bench_end_to_end.py --json benchmarks/results/end_to_end.json
	$(BIN)/python benchmarks/bench_start.py --json benchmarks/results/start.json
	$(BIN)/python benchmarks/bench_mask_assembly.py --json benchmarks/results/mask_assembly.json
	$(BIN)/python benchmarks/bench_instance_end_to_end.py --json benchmarks/results/instance_end_to_end.json
	$(BIN)/python benchmarks/bench_serve.py --json benchmarks/results/serve.json

# Pruning, distillation and INT8, step by step: needs CamVid as the folder camvid, and hours.
bench-compression: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_compression.py --work build/compression --seeds 3 --json benchmarks/results/compression.json

# `edgeseg estimate` against published speeds; nothing is timed, but 21 networks are built.
bench-estimate: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_estimate.py --cache build/estimate --check --json benchmarks/results/estimate.json

# Against other quantizers: needs CamVid (DATA=camvid:DIR), Python 3.11, and some GB in build/peers.
DATA := camvid:camvid
bench-int8: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_quantization.py --data $(DATA) --memory --json benchmarks/results/quantization.json

# On a bare Linux machine with an NVIDIA GPU, CUDA, torch and nvcc; uses that machine's own Python.
gpu:
	PYTHON=$(PYTHON) bash benchmarks/gpu.sh

clean:
	rm -rf $(VENV) build dist *.egg-info edgeseg-demo kernels/*.so

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("EdgeSeg needs Python 3.10 or newer, and this is " + sys.version.split()[0] + "; name another with PYTHON=python3.11") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "The venv module is missing; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

$(VENV)/.device: pyproject.toml setup.py requirements/device.txt $(wildcard kernels/cpu/* kernels/include/edgeseg/*) | $(VENV)/bin/python
	$(PIP) install --quiet -r requirements/device.txt
	$(PIP) install --quiet --no-deps --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.device requirements/dev.txt
	$(PIP) install --quiet -r requirements/dev.txt
	touch $@
