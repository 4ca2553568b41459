#!/bin/bash
# Builds kernels/ alone on a machine with a GPU, checks it and times it; the tables come last.
#
#   tests/bench/kernels_on_gpu.sh [RESULT_DIR]
#
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

# Each program with its own log: a fault in one must not hide the others.
summary=()
for program in kernels_core_test kernels_cuda_host_test kernels_cuda_attention_test kernels_cuda_test; do
  binary=$(find "$build/tests" -name "$program" -type f)
  timeout 240 "$binary" --gtest_brief=1 >"$results/$program.log" 2>&1
  status=$?
  summary+=("$program: exit $status, $(grep -E "^\[  (PASSED|FAILED)" "$results/$program.log" | head -2 | tr '\n' ' ')")
  [ $status -eq 0 ] || grep -E "Failure|off by|FAILED|what|rror" "$results/$program.log" | cut -c1-200 | sort | uniq -c | sort -rn | head -40
done
timeout 200 "$build/tests/bench/kernels_bench" --json "$results/kernels_bench.json" 2>&1 | tee "$results/kernels_bench.txt"
if python3 -c "import torch; assert torch.cuda.is_available()" 2>/dev/null; then
  timeout 120 python3 tests/bench/peer_attention.py 2>&1 | tee "$results/peers.txt"
fi
printf '%s\n' "${summary[@]}"
