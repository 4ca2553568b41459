#!/bin/bash
# What a whole model does on a machine with a GPU: tests, each network, steps, clips through the server,
# whether twenty clips leave memory behind, and the peers.
#
#   tests/bench/model_on_gpu.sh RESULT_DIR PART...
#
#   tests      the gpu tests that need a model: parity, the pipeline on both devices, predicted memory
#   sanitize   parity and pipeline under compute-sanitizer's $SANITIZE (memcheck racecheck initcheck), $CASES to a process,
#              $JOBS processes side by side on $GPUS; $SANITIZE_FILTER instead of all CUDA cases; libraries to preload below $LIBRARIES
#   model      writes the model folder of random weights, where it is not there yet
#   networks   text encoder, one forward pass with each $ATTENTION and decoding, alone: seconds, memory beside its prediction
#   large      one forward pass of a transformer of 14B with each $ATTENTION
#   steps      one guided step for each $ATTENTION
#   clips      a clip of STEPS steps for each of $ATTENTION through the server, with the seconds of its stages
#   leak       $CLIPS clips through one server; fails when memory grows after the first two
#   peers      diffusers, eager; peers-compiled: torch.compile too, in the background (takes minutes);
#              peers-wait waits for it and prints its table
#   trace      GPU time by kernel, of text, decoding and a forward pass with each $ATTENTION (libgpu_trace.so, built where
#              CUPTI is)
#
# The environment may say: BUILD (build/cuda; or RUN, a command that runs a program of ours by its name, such as
# that of a portable bundle), MODEL (a folder; written if absent), MODEL_ARGS (for write_random_model), DEVICE (cuda),
# SIZE (832x480), FRAMES (81), STEPS (50), REPEATS (5), ATTENTION (dense sla salad), CLIPS (20), JOBS (4), LIMIT
# (seconds for each program, 600), LIBRARIES (BUILD). A rehearsal without a GPU:
#   DEVICE=cpu SIZE=64x32 FRAMES=5 STEPS=2 CLIPS=3 REPEATS=1 MODEL_ARGS='--layers 1 --text-layers 1 --vocabulary 1000' \
#     BUILD=build/cpu tests/bench/model_on_gpu.sh /tmp/out model networks steps clips leak
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
[ $# -ge 2 ] || { sed -n '2,26p' "$0"; exit 2; }
out=$(realpath -m "$1"); shift
mkdir -p "$out"
DEVICE=${DEVICE:-cuda} SIZE=${SIZE:-832x480} FRAMES=${FRAMES:-81} STEPS=${STEPS:-50} REPEATS=${REPEATS:-5}
ATTENTION=${ATTENTION:-dense sla salad} CLIPS=${CLIPS:-20} JOBS=${JOBS:-4} LIMIT=${LIMIT:-600} BUILD=${BUILD:-build/cuda}
MODEL=${MODEL:-$out/model}
PROMPT='a red ball rolls from left to right over a green floor'
export OMP_WAIT_POLICY=passive  # threads that spin take the encoder's cores
failures=0
fail() { echo "FAILED: $*"; failures=$((failures + 1)); }

# Sets `program` to the command that runs a program of ours.
find_program() {
  if [ -n "${RUN:-}" ]; then program=("$RUN" "$1"); return; fi
  program=("$(find "$BUILD" -name "$1" -type f -perm -u+x | head -1)")
  [ -n "${program[0]}" ] || { echo "no $1 below $BUILD"; return 1; }
}
# shellcheck source=tests/bench/sanitize.sh
. tests/bench/sanitize.sh
LIBRARIES=${LIBRARIES:-$BUILD}
limited() {  # NAME ARGS...
  local program
  find_program "$1" || return
  timeout -k 5 "$LIMIT" "${program[@]}" "${@:2}"
}
# Until nothing else computes on the GPU: others' work would be in our times.
quiet() {
  local i
  [ "$DEVICE" = cuda ] || return 0
  for i in $(seq "${PATIENCE:-60}"); do
    [ -z "$(nvidia-smi --id="${CUDA_VISIBLE_DEVICES:-0}" --query-compute-apps=pid --format=csv,noheader 2>/dev/null)" ] && return 0
    sleep 0.5
  done
  echo "(not alone on the GPU)"
}
bench() { quiet; limited pipeline_bench --model "$MODEL" --device "$DEVICE" --repeats "$REPEATS" "$@"; }

# --- the server ---
server='' address='' http=''
serve() {  # NAME
  local program start
  quiet
  find_program slalomd || { fail "$1"; return 1; }
  start=$(date +%s.%N)
  : >"$out/$1.ready"
  "${program[@]}" --device "$DEVICE" --models "$MODEL" --listen 127.0.0.1:0 --http-listen 127.0.0.1:0 \
    --warm-up "${SIZE}x$FRAMES" >"$out/$1.ready" 2>"$out/$1-server.log" &
  server=$!
  for _ in $(seq 600); do
    address=$(sed -n 's/^slalomd ready .*grpc=\([^ ]*\).*/\1/p' "$out/$1.ready")
    [ -z "$address" ] || break
    kill -0 $server 2>/dev/null || break
    sleep 0.1
  done
  http=$(sed -n 's/^slalomd ready .*http=\([^ ]*\).*/\1/p' "$out/$1.ready")
  if [ -n "$address" ]; then
    echo "ready after $(awk -v a="$start" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }') s, one clip to warm up among them"
    return
  fi
  fail "$1: the server does not start"
  tail -5 "$out/$1-server.log"
  kill -TERM $server
  return 1
}
stop() {
  kill -TERM $server
  wait $server || fail "the server ended with $?"
}
metric() { curl -s -m 10 "http://$http/metrics" | sed -n "s/^slalom_device_memory_bytes{device=\"$1[^\"]*\",kind=\"$2\"} //p"; }
clip() {  # NAME ATTENTION SEED STEPS: the client's table of stages goes to its log
  limited slalom --server "$address" generate "$PROMPT" --size "$SIZE" --frames "$FRAMES" --steps "$4" --seed "$3" \
    --attention "$2" -o "$out/$1.mp4" >"$out/$1.log" 2>&1
}

# --- parts ---
part_tests() {
  local test
  for test in network_parity_test pipeline_devices_test memory_devices_test; do
    if ! limited $test --gtest_brief=1 >"$out/$test.log" 2>&1; then
      fail "$test"
      grep -E '^\[  FAILED|Failure|off by|actual|Expected' "$out/$test.log" | sort -u | head -20
    fi
    echo "$test: $(grep -Eo '(PASSED|SKIPPED|FAILED) +\] [0-9]+' "$out/$test.log" | tr -d ']' | tr -s ' ' | tr '\n' ' ')"
  done
}
part_model() {
  [ -e "$MODEL/model_index.json" ] && return
  # shellcheck disable=SC2086
  limited write_random_model ${MODEL_ARGS:---size 1.3b --transformer-dtype bf16} "$MODEL" || fail "writing the model"
}
kinds() { tr ' ' ',' <<<"$ATTENTION"; }
part_sanitize() {
  run_sanitizers "$out" "${SANITIZE_FILTER:-*cuda*:*PipelineDevices*}" pipeline_devices_test network_parity_test
}
part_networks() {
  bench --sizes "${SIZE}x$FRAMES" --parts text,forward,decode --attention "$(kinds)" | tail -n +3 || fail "networks"
}
part_large() {
  local MODEL=${LARGE_MODEL:-$out/large}
  [ -e "$MODEL/model_index.json" ] || limited write_random_model --size 14b --only transformer --transformer-dtype bf16 "$MODEL"
  bench --sizes "${SIZE}x$FRAMES" --parts forward --attention "$(kinds)" | tail -n +3 || fail "large"
}
part_steps() { bench --sizes "${SIZE}x$FRAMES" --parts step --attention "$(kinds)" | tail -n +3 || fail "steps"; }
part_clips() {
  local attention
  serve clips || return
  for attention in $ATTENTION; do
    clip "clip-$attention" "$attention" 1 "$STEPS" || fail "clip, $attention"
    echo "--- $attention, $STEPS steps, $(stat -c %s "$out/clip-$attention.mp4" 2>/dev/null) bytes"
    tr '\r' '\n' <"$out/clip-$attention.log" | tail -9 | cut -c1-180
  done
  stop
}
part_leak() {
  local i before=0 now kind=cuda
  [ "$DEVICE" = cuda ] || kind=cpu
  serve leak || return
  for i in $(seq "$CLIPS"); do
    # The same prompt throughout: embeddings of new ones stay in the cache, as they should.
    clip leak "$(echo dense sla salad | cut -d' ' -f$((i % 3 + 1)))" "$i" 2 || fail "clip $i of $CLIPS"
    now="$(metric $kind in_use) $(metric $kind reserved)"
    [ "$i" -gt 3 ] && [ "$now" != "$before" ] && fail "memory in use and reserved after clip $i: $now, before: $before"
    [ "$i" -lt 3 ] || before=$now
    [ "$i" -ne 3 ] || echo "after 3 clips: $now in use and reserved, host $(metric host resident)"
  done
  echo "after $CLIPS clips: $now in use and reserved, host $(metric host resident)"
  stop
}
peers() {  # ARGS...
  local runner="$out/pipeline_bench" program
  find_program pipeline_bench || return
  printf '#!/bin/bash\nexec %q %q "$@"\n' "${program[0]}" "${program[1]:-}" | sed "s/ '' / /" >"$runner"
  chmod +x "$runner"
  timeout -k 5 "$LIMIT" python3 tests/bench/peer_diffusers.py --bench "$runner" --model "$MODEL" --device "$DEVICE" \
    --size "${SIZE}x$FRAMES" --repeats "$REPEATS" "$@"
}
part_peers() { quiet; peers --no-compile --out "$out/peers.json" || fail "peers"; }
part_peers-compiled() {
  { peers --out "$out/peers-compiled.json"; echo "exit $?"; } >"$out/peers-compiled.log" 2>&1 </dev/null &
  disown
}
part_peers-wait() {
  local i
  for i in $(seq "$LIMIT"); do grep -q '^exit' "$out/peers-compiled.log" 2>/dev/null && break; sleep 1; done
  tail -12 "$out/peers-compiled.log"
  grep -q '^exit 0' "$out/peers-compiled.log" || fail "compiled peers"
}
trace() {  # text|decode|dense|sla|salad LIBRARY
  local parts=(--parts "$1")
  case $1 in dense | sla | salad) parts=(--parts forward --attention "$1") ;; esac
  REPEATS=2 CUDA_INJECTION64_PATH=$2 GPU_TRACE_OUT="$out/trace-$1.txt" GPU_TRACE_RUNS=3 \
    bench --sizes "${SIZE}x$FRAMES" "${parts[@]}" >"$out/trace-$1.log" 2>&1 || fail "trace, $1"
  echo "--- $1"
  cat "$out/trace-$1.txt"
}
part_trace() {
  local part library
  library=${TRACE_LIBRARY:-$(find "$BUILD" -name libgpu_trace.so 2>/dev/null | head -1)}
  [ -n "$library" ] || { fail "no libgpu_trace.so below $BUILD"; return; }
  for part in text decode $ATTENTION; do
    trace "$part" "$library"
  done
}

for part in "$@"; do
  declare -F "part_$part" >/dev/null || { fail "no part $part"; continue; }
  echo "== $part"
  start=$SECONDS
  "part_$part"
  echo "($part: $((SECONDS - start)) s)"
done
[ "$failures" -eq 0 ] || { echo "$failures failures"; exit 1; }
