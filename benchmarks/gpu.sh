#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in a few minutes: builds the kernels, runs the tests marked
# gpu, times the kernels. For a bare Linux machine with CUDA (nvcc), g++ and a Python that has torch,
# numpy and pytest; nothing is installed, edgeseg is imported from this tree.
#
#   make gpu        or        PYTHON=python3 bash benchmarks/gpu.sh [FOLDER FOR THE RESULTS]
#
# Exit code 1 and one sentence where something is missing.

set -euo pipefail

fail() {
  echo "gpu.sh: $1" >&2
  exit 1
}

results=$(realpath -m -- "${1:-"$(dirname -- "${BASH_SOURCE[0]}")/results"}")
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
build=build/gpu
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# CUDA's installer leaves the path alone.
cuda=${CUDA_HOME:-/usr/local/cuda}
export PATH=$PATH:$cuda/bin

command -v "$python" >/dev/null || fail "there is no $python; name a Python with PYTHON=..."
command -v nvcc >/dev/null ||
  fail "there is no nvcc on the path or in $cuda/bin; install the CUDA toolkit or set CUDA_HOME"
for module in numpy pytest torch; do
  "$python" -c "import $module" 2>/dev/null ||
    fail "$python cannot import $module; install it, or name another Python with PYTHON=..."
done
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
  fail "torch $("$python" -c 'import torch; print(torch.__version__)') sees no NVIDIA GPU here"

echo "== GPU, CUDA compiler"
"$python" -c 'import torch
device = torch.cuda.get_device_properties(0)
print(f"{device.name}, compute capability {device.major}.{device.minor}, torch {torch.__version__}")'
nvcc --version | tail -n 2

echo "== building the kernels"
mkdir -p "$build"
# As kernels/CMakeLists.txt does; no fused multiply-add, so that the bytes are those of the CPU.
nvcc -std=c++17 -O3 -fmad=false -arch=native -shared -Xcompiler=-fPIC,-fvisibility=hidden \
  -Ikernels/include kernels/cuda/*.cu -o "$build/libedgeseg_cuda.so"
"$python" -c 'from edgeseg import kernels; print(kernels.build().name)'

echo "== tests marked gpu"
# Only the files that have such tests: others import engines that this machine need not have. The
# libraries are what this machine has, so their warnings are shown and are no errors.
mapfile -t files < <(grep -rlE 'pytest\.mark\.gpu' tests --include='*.py')
"$python" -m pytest -W default -p no:cacheprovider -m gpu "${files[@]}"

echo "== benchmark"
mkdir -p "$results"
"$python" benchmarks/bench_gpu_kernels.py --library "$build/libedgeseg_cuda.so" \
  --json "$results/gpu_kernels.json"
echo "== written to $results/gpu_kernels.json"
