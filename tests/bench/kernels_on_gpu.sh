#!/bin/bash
# Builds kernels/ alone on a machine with a GPU, checks it from the simplest fact upwards, and times it.
#
#   tests/bench/kernels_on_gpu.sh [RESULT_DIR]                     # 8 minutes at most
#   tests/bench/kernels_on_gpu.sh RESULT_DIR build                 # nothing but the build
#   tests/bench/kernels_on_gpu.sh RESULT_DIR rungs GLOB            # rungs of the ladder with such names, no times
#   tests/bench/kernels_on_gpu.sh RESULT_DIR times 'PART PART'     # no rungs, these parts of kernels_bench
#   tests/bench/kernels_on_gpu.sh RESULT_DIR sanitize [FILTER]     # $SANITIZE (memcheck racecheck initcheck) over the tests, $CASES to a process, $JOBS processes on $GPUS
#   tests/bench/kernels_on_gpu.sh RESULT_DIR where PROGRAM FILTER  # where a test hangs, by cuda-gdb
#
# Each rung of the ladder is a process of its own with a short limit, so that a fault or a hang hides
# nothing else; the first rung that fails says where to look. The table comes last and fits a screen;
# RESULT_DIR gets table.txt, bench.txt and logs.tar.gz. SKIP_BUILD=1 takes what an earlier run has built.
# Needs nvcc, CMake and GoogleTest; where GoogleTest is not installed, its sources may lie in
# build/googletest. PyTorch, if python3 has it, is timed beside.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
results=$(realpath -m "${1:-build/kernels-gpu-results}")
mode=${2:-ladder}
build=build/kernels-gpu
logs=$results/logs
limit=${LIMIT_SECONDS:-470}
mkdir -p "$results" "$logs"
left() { echo $((limit - SECONDS)); }

# --- build ---
build() {
  local generator=() prefix=() options=() toolkit header binary
  command -v ninja >/dev/null && generator=(-G Ninja)
  if [ -d build/googletest ]; then
    { cmake -S build/googletest -B build/googletest-build "${generator[@]}" -DCMAKE_BUILD_TYPE=Release \
        -DBUILD_GMOCK=OFF -DCMAKE_INSTALL_PREFIX="$PWD/build/googletest-prefix" &&
        cmake --build build/googletest-build --target install -j "$(nproc)"; } >"$logs/gtest.log" 2>&1 ||
      { tail -30 "$logs/gtest.log"; exit 1; }
    prefix=(-DCMAKE_PREFIX_PATH="$PWD/build/googletest-prefix")
  fi
  # cuBLASLt may come with a Python wheel instead of the toolkit.
  toolkit=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
  if ! find -L "$toolkit" -name cublasLt.h 2>/dev/null | grep -q .; then
    header=$(find / -name cublasLt.h -not -path '/proc/*' 2>/dev/null | head -1)
    binary=$(find / -name 'libcublasLt.so*' -not -path '/proc/*' 2>/dev/null | head -1)
    options+=(-DSLALOM_CUBLASLT_INCLUDE="$(dirname "$header")" -DSLALOM_CUBLASLT="$binary")
  fi
  # One architecture takes half the time of all.
  if [ "$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1)" = 9.0 ]; then
    options+=(-DSLALOM_CUDA_ARCHITECTURES=90a-real)
  fi
  cmake -S . -B "$build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DSLALOM_CUDA=ON \
    -DSLALOM_KERNELS_ONLY=ON -DCMAKE_CUDA_FLAGS=-lineinfo "${prefix[@]}" "${options[@]}" \
    >"$logs/configure.log" 2>&1 || { tail -30 "$logs/configure.log"; exit 1; }
  cmake --build "$build" -j "$(nproc)" >"$logs/build.log" 2>&1 ||
    { grep -E "error|FAILED|undefined" -A5 "$logs/build.log" | cut -c1-300 | head -60; exit 1; }
  echo "built after $SECONDS s"
}
[ "${SKIP_BUILD:-0}" = 1 ] || build
[ "$mode" = build ] && exit 0
program() { find "$build/tests" -name "$1" -type f -perm -u+x | head -1; }

# --- other modes ---
finish() { tar -czf "$results/logs.tar.gz" -C "$results" logs; rm -rf "$logs"; }
trap finish EXIT
if [ "$mode" = sanitize ]; then
  # shellcheck source=tests/bench/sanitize.sh
  . tests/bench/sanitize.sh
  JOBS=${JOBS:-8} LIMIT=${LIMIT:-600} LIBRARIES=$build failures=0
  YARDSTICK_CASES='@(Devices|Row)/*'  # operations in f32 and the row kernel itself
  find_program() { program=("$(program "$1")"); }
  fail() { echo "FAILED: $*"; failures=$((failures + 1)); }
  # What launches nothing is not for the sanitizers: host tests, and Choose*.
  run_sanitizers "$logs" "${3:-*-Choose*}" kernels_cuda_hopper_test kernels_cuda_attention_test kernels_cuda_backward_test \
    kernels_cuda_conv_test kernels_cuda_test slalom_attention_cuda_test
  [ $failures -eq 0 ]
  exit
fi
if [ "$mode" = where ]; then
  timeout -s INT -k 30 20 cuda-gdb -batch -ex run -ex 'info cuda kernels' -ex 'info cuda warps' -ex bt \
    --args "$(program "$3")" --gtest_filter="$4" 2>&1 | tail -80 | cut -c1-160
  exit 0
fi

# --- the ladder ---
: >"$results/table.txt"
: >"$logs/failures.txt"
names='*'; parts='copy norm linear conv mma.sync products hopper sparse map sla salad backward'
[ "$mode" = rungs ] && names=$3 parts=''
[ "$mode" = times ] && names='' parts=$3
rung() {  # NAME PROGRAM FILTER SECONDS
  # shellcheck disable=SC2053
  [[ $1 == $names ]] || return
  local log="$logs/$1.log" start=$SECONDS status verdict
  if [ "$(left)" -lt "$4" ]; then
    printf '%-27s not run: no time left\n' "$1" >>"$results/table.txt"
    return
  fi
  timeout -k 5 "$4" "$(program "$2")" --gtest_brief=1 --gtest_filter="$3" >"$log" 2>&1
  status=$?
  case $status in
    0) verdict=$(grep -Eo '(PASSED|SKIPPED) +\] [0-9]+' "$log" | tr -d ']' | tr -s ' ' | tr '\n' ' ') ;;
    124 | 137) verdict="HANGS (limit $4 s): $(grep -Eo 'FAILED +\] [^ ]+' "$log" | head -1)" ;;
    *) verdict="FAILS ($status): $(grep -Ec '^\[  FAILED' "$log") tests" ;;
  esac
  printf '%-27s %3d s  %s\n' "$1" $((SECONDS - start)) "$verdict" >>"$results/table.txt"
  [ $status -eq 0 ] && return
  { echo "--- $1 ($2 --gtest_filter='$3')"
    grep -E 'FAILED|off by|what\(\)|C\+\+ exception|rror|Which is|actual|element|row ' "$log" |
      cut -c1-170 | head -7; } >>"$logs/failures.txt"
}
hopper=kernels_cuda_hopper_test attention=kernels_cuda_attention_test conv=kernels_cuda_conv_test
operations=kernels_cuda_test

rung host              kernels_cuda_host_test '*' 30
rung memory            $operations '*MemoryTest*' 40
rung tma-copy          $hopper '*Copy*' 20
rung wgmma-scores      $hopper '*Scores*' 20
rung wgmma-values      $hopper '*Values*' 20
rung wgmma-channels    $hopper '*Channels*' 20
rung wgmma-sums        $hopper '*Sums*' 20
rung warpgroup-turns   $hopper '*Turns*' 20
rung linear            $operations '*RowsTest.Linear*' 45
rung rows              $operations '*RowsTest.*-*Linear*' 45
rung frames            $operations '*FramesTest.*-*Conv*' 30
rung attention-row     $attention 'Row/*' 60
rung attention-product $attention 'Product/*:AttentionKernels.Product*' 40
rung attention-mma     $attention 'TensorCore/*:AttentionKernels.TensorCore*:*AttentionSmallBlocks*' 60
for step in OneTile HalfATile RaggedTile TwoTiles RingWrapsAround HeadsAndSamples ListsOfOneConsumer \
  ListsOfTwoConsumers ManyTiles ManyTilesOfOneConsumer ManyTilesOfTwoConsumers; do
  rung "hopper-$step" $attention "HopperAttentionSteps.$step" 15
done
rung hopper-all        $attention 'Hopper/*' 60
rung hopper-repeats    $attention 'HopperAttentionSteps.Repeats' 30
rung conv-mma          $conv '*TensorCore*' 30
rung conv-hopper-steps $conv 'HopperConvSteps.*' 15
rung conv-hopper       $conv 'Hopper/*' 40
rung conv-operation    $operations '*FramesTest.Conv*' 40
rung dense             $operations '*AttentionTest.Dense*' 60
rung maps-one-kernel   $attention 'BlockMaps.*' 30
rung maps              $operations '*AttentionTest.Map*:*Window*:*Count*:*MassKept*' 40
for step in OneTile Features ManyChunksOfKeys RingWrapsAround Scopes; do
  rung "linear-$step" $attention "LinearBranchKernels.$step" 20
done
rung linear-small-blocks $attention '*LinearBranchSmallBlocks*:LinearBranchKernels.*SmallBlocks' 40
for step in OneTile OneTileProjected NoCriticalBlock EveryBlockCritical FeatureMaps FusedRepeats; do
  rung "sla-$step" $attention "SlaKernels.$step" 30
done
rung sla-lengths       $attention '*SlaLengths*' 60
rung sla-many-tiles    $attention '*SlaManyTiles*' 30
rung sla               $operations '*AttentionTest.Sla*' 60
rung salad             $operations '*AttentionTest.Salad*' 40
backward=kernels_cuda_backward_test
rung backward-mma-tile $backward 'SparseGradientKernels.TensorCoreOneTile' 20
rung backward-mma      $backward 'SparseGradientKernels.TensorCore*:TensorCore/*' 40
for step in OneTile RaggedTile TwoConsumers RingWrapsAround TwoTilesOfNarrowHeads Lists Accumulates; do
  rung "backward-hopper-$step" $backward "HopperGradientSteps.$step" 15
done
rung backward-hopper   $backward 'HopperGradientSteps.LengthsAndShares:Hopper/*' 40
rung backward-linear-tile $backward 'LinearGradientKernels.OneTile' 20
rung backward-linear   $backward '*LinearGradient*' 60
rung backward-sla      $operations '*AttentionBackwardTest.Sla*:*AttentionBackwardTest.Saving*' 60
rung backward-salad    $operations '*AttentionBackwardTest.Salad*' 60
rung c-api             slalom_attention_cuda_test '*' 30
echo "checked after $SECONDS s" >>"$results/table.txt"

# --- times ---
: >"$results/bench.txt"
for part in $parts; do
  [ "$(left)" -gt 15 ] || { echo "$part: no time left" >>"$results/bench.txt"; continue; }
  timeout -k 5 "$(($(left) < 45 ? $(left) - 6 : 45))" "$build/tests/bench/kernels_bench" --filter "$part" \
    --json "$logs/bench-$part.json" >"$logs/bench-$part.log" 2>&1
  status=$?
  tail -n +2 "$logs/bench-$part.log" | cut -c1-110 >>"$results/bench.txt"
  [ $status -eq 0 ] || echo "$part: exit $status, $(tail -1 "$logs/bench-$part.log" | cut -c1-150)" >>"$results/bench.txt"
done
if [ "$mode" != rungs ] && [ "$(left)" -gt 40 ] && python3 -c "import torch; assert torch.cuda.is_available()" 2>/dev/null; then
  timeout -k 5 "$(($(left) - 10))" python3 tests/bench/peer_attention.py >"$logs/peers.log" 2>&1
  tail -25 "$logs/peers.log" | cut -c1-110 >>"$results/bench.txt"
fi

head -c 5000 "$logs/failures.txt"
head -c 3200 "$results/bench.txt"
cat "$results/table.txt"
echo "all after $SECONDS s"
