#!/bin/bash
# Builds kernels/ alone on a machine with a GPU, checks it and times it; the tables come last.
#
#   tests/bench/kernels_on_gpu.sh [RESULT_DIR [sanitize]]
#
# With "sanitize", compute-sanitizer's memcheck and racecheck run over the tests instead of the timing.
# Needs nvcc, CMake and GoogleTest; where GoogleTest is not installed, its sources may lie in
# build/googletest. PyTorch, if python3 has it, is timed beside.
set -uo pipefail
cd "$(dirname "$0")/../.."
results=${1:-build/kernels-gpu-results}
mkdir -p "$results"
build=build/kernels-gpu
generator=(); command -v ninja >/dev/null && generator=(-G Ninja)

prefix=()
if [ -d build/googletest ]; then
  cmake -S build/googletest -B build/googletest-build "${generator[@]}" -DCMAKE_BUILD_TYPE=Release \
    -DBUILD_GMOCK=OFF -DCMAKE_INSTALL_PREFIX="$PWD/build/googletest-prefix" >"$results/gtest.log" &&
    cmake --build build/googletest-build --target install -j >>"$results/gtest.log" || exit 1
  prefix=(-DCMAKE_PREFIX_PATH="$PWD/build/googletest-prefix")
fi

# cuBLASLt may come with a Python wheel instead of the toolkit.
toolkit=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
library=()
if ! find -L "$toolkit" -name cublasLt.h 2>/dev/null | grep -q .; then
  header=$(find / -name cublasLt.h -not -path '/proc/*' 2>/dev/null | head -1)
  binary=$(find / -name 'libcublasLt.so*' -not -path '/proc/*' 2>/dev/null | head -1)
  library=(-DSLALOM_CUBLASLT_INCLUDE="$(dirname "$header")" -DSLALOM_CUBLASLT="$binary")
fi

cmake -S . -B "$build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DSLALOM_CUDA=ON \
  -DSLALOM_KERNELS_ONLY=ON "${prefix[@]}" "${library[@]}" >"$results/configure.log" 2>&1 ||
  { tail -30 "$results/configure.log"; exit 1; }
cmake --build "$build" -j >"$results/build.log" 2>&1 || { grep -E "error|FAILED" -A5 "$results/build.log" | head -60; exit 1; }

# Each group of tests in its own process, for a short time: a fault or a hang must not hide the rest.
summary=()
check() {  # NAME PROGRAM FILTER SECONDS
  local log="$results/$1.log" status
  timeout "$4" "$(find "$build/tests" -name "$2" -type f)" --gtest_brief=1 --gtest_filter="$3" >"$log" 2>&1
  status=$?
  summary+=("$1: exit $status, $(grep -E '^\[  (PASSED|FAILED)' "$log" | head -2 | tr '\n' ' ')")
  [ $status -eq 0 ] || grep -E 'off by|FAILED|what\(\)|rror|Le|actual' "$log" | cut -c1-220 | head -25
}
sanitize() {  # TOOL PROGRAM
  local log="$results/$1-$2.log"
  timeout 250 compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$(find "$build/tests" -name "$2" -type f)" --gtest_brief=1 >"$log" 2>&1
  summary+=("$1 $2: exit $?, $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -1)")
}
if [ "${2:-}" = sanitize ]; then
  for tool in memcheck racecheck; do
    for program in kernels_cuda_test kernels_cuda_conv_test kernels_cuda_attention_test; do
      sanitize "$tool" "$program"
    done
  done
  printf '%s\n' "${summary[@]}"
  exit 0
fi
check host kernels_cuda_host_test '*' 60
check rows kernels_cuda_test '*Rows*:*Memory*' 90
check frames kernels_cuda_test '*Frames*' 90
check kernels-sm80 kernels_cuda_attention_test '-*Hopper*' 90
check kernels-hopper kernels_cuda_attention_test '*Hopper*' 60
check conv-sm80 kernels_cuda_conv_test '-*Hopper*' 60
check conv-hopper kernels_cuda_conv_test '*Hopper*' 60
check attention kernels_cuda_test '*Attention*' 90
timeout 150 "$build/tests/bench/kernels_bench" --json "$results/kernels_bench.json" 2>&1 | tee "$results/kernels_bench.txt"
if python3 -c "import torch; assert torch.cuda.is_available()" 2>/dev/null; then
  timeout 120 python3 tests/bench/peer_attention.py 2>&1 | tee "$results/peers.txt"
fi
printf '%s\n' "${summary[@]}"
