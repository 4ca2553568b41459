# compute-sanitizer over GoogleTest programs, few cases to a process, so that one that hangs or is cut off costs few
# others. To be sourced by a script that has
#   find_program NAME   sets the array `program` to the command that runs a program of ours
#   fail TEXT           notes a failure
#   YARDSTICK_CASES     optional: the cases that check plain kernels, which others only measure themselves by
# shellcheck shell=bash
#
#   run_sanitizers OUT FILTER TEST...   the cases of each program that FILTER names, under each of $SANITIZE (memcheck
#                                       racecheck initcheck), $CASES (1) to a process, $JOBS side by side, $LIMIT seconds
#                                       each, on the $GPUS in turn (CUDA_VISIBLE_DEVICES or 0); logs in OUT, named by a
#                                       process's first case
#
# What NVIDIA's kernels do is not ours to judge, but racecheck, told to look at ours alone, makes cuBLASLt's fault, and
# initcheck does not see what they write: a library below $LIBRARIES takes cuBLASLt's place (plain_products.cu) or helps
# it (initialised_products.cc).
#
# racecheck follows every access to shared memory, of which plain kernels make one for each product or two: it looks at them
# in YARDSTICK_CASES alone. By their sources, as mangled names have them:
YARDSTICKS=(conv_simple_cu simple_linear_cu _row_attention_cu 16_linear_branch_cu row_backward_cu)

first_log() { echo "$1-${2//\//.}.log"; }  # TOOL CASE
sanitize_process() {  # OUT TOOL TEST CASE...
  local program case source library='' yardsticks=0 log IFS=:
  local options=(--tool "$2" --report-api-errors no --error-exitcode 9)
  log="$1/$(first_log "$2" "$4")"
  find_program "$3" || return
  case $2 in racecheck) library=plain_products ;; initcheck) library=initialised_products ;; esac
  if [ -n "$library" ]; then
    library=$(find "$LIBRARIES" -name "lib$library.so" 2>/dev/null | head -1)
    [ -n "$library" ] || { echo "exit: no library to preload for $2" >"$log"; return; }
    options+=(--kernel-name kns=slalom)
    # shellcheck disable=SC2016  # beside what compute-sanitizer itself preloads
    program=(/bin/bash -c 'LD_PRELOAD=$0${LD_PRELOAD:+:$LD_PRELOAD} exec "$@"' "$(realpath "$library")" "${program[@]}")
  fi
  if [ "$2" = racecheck ]; then
    # On its own it takes a thread for each core, in each process.
    options+=(--racecheck-num-workers "$((JOBS < $(nproc) ? $(nproc) / JOBS : 1))")
    # shellcheck disable=SC2053  # a pattern
    for case in "${@:4}"; do [[ $case == ${YARDSTICK_CASES:-} ]] && yardsticks=1; done
    [ $yardsticks = 1 ] || for source in "${YARDSTICKS[@]}"; do options+=(--kernel-name-exclude "kns=$source"); done
  fi
  timeout -k 5 "$LIMIT" compute-sanitizer "${options[@]}" "${program[@]}" --gtest_filter="${*:4}" >"$log" 2>&1
  echo "exit $?" >>"$log"
}
sanitize_cases() {  # FILTER TEST
  local program
  find_program "$2" || return
  "${program[@]}" --gtest_list_tests --gtest_filter="$1" | awk '/^[^ ]/ { suite = $1 } /^ / { print suite $1 }'
}
judge_processes() {  # OUT TOOL "TEST CASE..."...
  local process cases log all=0 clean=0
  for process in "${@:3}"; do
    read -ra cases <<<"${process#* }"
    log="$1/$(first_log "$2" "${cases[0]}")"
    all=$((all + ${#cases[@]}))
    if grep -q '^exit 0$' "$log" && grep -q "PASSED  \] ${#cases[@]} test" "$log"; then clean=$((clean + ${#cases[@]})); continue; fi
    fail "$2 of ${cases[*]}: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY|PASSED|SKIPPED|FAILED|^exit' "$log" | sort -u | tr '\n' ' ')"
    grep -m 20 '^=========' "$log" | cut -c1-160
  done
  echo "$2: $clean of $all cases clean"
  [ $all -gt 0 ] || fail "$2: no test matches"
}
run_sanitizers() {  # OUT FILTER TEST...
  local tools=${SANITIZE:-memcheck racecheck initcheck} tool test cases processes=() process gpu gpus=() n=0 i j share
  read -ra gpus <<<"${GPUS:-${CUDA_VISIBLE_DEVICES:-0}}"
  for test in "${@:3}"; do
    mapfile -t cases < <(sanitize_cases "$2" "$test")
    share=$(((${#cases[@]} + ${CASES:-1} - 1) / ${CASES:-1}))
    for ((i = 0; i < share; i++)); do
      process=$test
      for ((j = i; j < ${#cases[@]}; j += share)); do process+=" ${cases[j]}"; done
      processes+=("$process")
    done
  done
  for tool in $tools; do
    for process in "${processes[@]}"; do
      while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n; done
      gpu=${gpus[n++ % ${#gpus[@]}]}
      # shellcheck disable=SC2086  # a word for each case
      CUDA_VISIBLE_DEVICES=$gpu sanitize_process "$1" "$tool" $process &
    done
  done
  wait
  for tool in $tools; do judge_processes "$1" "$tool" "${processes[@]}"; done
}
