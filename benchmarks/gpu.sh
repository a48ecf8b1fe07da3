#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in less than ten minutes: builds the kernels, runs the tests
# marked gpu, runs the kernels under compute-sanitizer, times them. For a bare Linux machine with
# CUDA (nvcc), g++ and a Python that has torch, numpy and pytest; nothing is installed or downloaded,
# edgeseg is imported from this tree.
#
#   make gpu        or        PYTHON=python3 bash benchmarks/gpu.sh [FOLDER FOR THE RESULTS]
#
# EDGESEG_TENSORRT_HEADERS=DIR[:DIR...], folders with TensorRT's headers, adds the plugins: they are
# built, and their enqueue is driven by a harness that needs no TensorRT.
#
# A part that fails does not keep the next from running. Exit code 1 when one did, and at once, with
# one sentence, where something is missing.

set -euo pipefail

fail() {
  echo "gpu.sh: $1" >&2
  exit 1
}

results=$(realpath -m -- "${1:-"$(dirname -- "${BASH_SOURCE[0]}")/results"}")
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
build=$PWD/build/gpu
library=$build/libedgeseg_cuda.so
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

failed=()
started=$SECONDS
part() {
  echo "== $1 ($((SECONDS - started)) s)"
}

part "GPU, CUDA compiler"
"$python" -c 'import torch
device = torch.cuda.get_device_properties(0)
print(f"{device.name}, compute capability {device.major}.{device.minor}, torch {torch.__version__}")'
nvcc --version | tail -n 2

part "building the kernels"
mkdir -p "$build"
rm -f "$build"/*.o "$library"
architecture=sm_$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability(0))')
# As kernels/CMakeLists.txt does; no fused multiply-add, so that the bytes are those of the CPU.
# Line numbers are for compute-sanitizer and cost nothing.
# shellcheck disable=SC2016  # the inner bash expands its own arguments
printf '%s\0' kernels/cuda/*.cu | xargs -0 -P "$(nproc)" -I SOURCE bash -c '
  nvcc -std=c++17 -O3 -fmad=false -lineinfo "-arch=$1" -Xcompiler=-fPIC,-fvisibility=hidden \
    -Ikernels/include -c "$2" -o "$3/$(basename "$2" .cu).o"' bash "$architecture" SOURCE "$build" ||
  fail "the kernels do not compile for $architecture; nvcc's words are above"
nvcc -shared "-arch=$architecture" "$build"/*.o -o "$library" ||
  fail "the compiled kernels cannot be linked; nvcc's words are above"
"$python" -c 'from edgeseg import kernels; print(kernels.build().name)' ||
  fail "the CPU kernels cannot be built, and they are what the GPU's results are compared with"

part "kernels against the CPU library, small sizes"
"$python" benchmarks/bench_gpu_kernels.py --library "$library" --quick --check || failed+=(check)

part "tests marked gpu"
# Only the files that have such tests: others import engines that this machine need not have. The
# installed libraries are what this machine has, so their warnings are shown and are no errors.
export EDGESEG_CUDA_LIBRARY=$library
run_pytest=("$python" -m pytest -W default -p no:cacheprovider -m gpu -q)
files=()
while IFS= read -r file; do
  status=0
  said=$("${run_pytest[@]}" --collect-only "$file" 2>&1) || status=$?
  # A file of which nothing is left: pytest's 5. A file that wants a package: not an error here.
  if ((status == 5)); then
    continue
  elif ((status != 0)) && missing=$(grep -m 1 -oE "No module named '[^']+'" <<<"$said"); then
    echo "left out: $file ($missing)"
  else
    files+=("$file")
  fi
done < <(grep -rlE 'pytest\.mark\.gpu' tests --include='test_*.py' | sort)
if ((${#files[@]} == 0)); then
  echo "no file of tests can be imported here"
  failed+=(tests)
else
  "${run_pytest[@]}" "${files[@]}" || failed+=(tests)
fi
if [[ -z ${EDGESEG_TENSORRT_HEADERS:-} ]]; then
  echo "the plugins are left out: EDGESEG_TENSORRT_HEADERS names no TensorRT headers"
fi

part "compute-sanitizer"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck; do
    # Without torch's cache every tensor is an allocation of its own, so that reading past one is
    # seen. What torch itself asks of the driver and does not get is none of our errors.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 90 \
      compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 3 \
      "$python" benchmarks/bench_gpu_kernels.py --library "$library" --quick --check ||
      failed+=("$tool")
  done
else
  echo "left out: there is no compute-sanitizer on the path or in $cuda/bin"
fi

part "benchmark"
"$python" benchmarks/bench_gpu_kernels.py --library "$library" --results "$results" ||
  failed+=(benchmark)

part "done"
if ((${#failed[@]} != 0)); then
  fail "failed: ${failed[*]}"
fi
