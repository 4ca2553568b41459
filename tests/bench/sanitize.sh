# compute-sanitizer over GoogleTest programs, each case in a process of its own, so that one that hangs or is cut off
# costs no other. To be sourced by a script that has
#   find_program NAME   sets the array `program` to the command that runs a program of ours
#   fail TEXT           notes a failure
#   YARDSTICK_CASES     optional: the cases that check plain kernels, which others only measure themselves by
# shellcheck shell=bash
#
#   run_sanitizers OUT FILTER TEST...   the cases of each program that FILTER names, under each of $SANITIZE (memcheck
#                                       racecheck initcheck), $JOBS side by side, $LIMIT seconds each, on the $GPUS in turn
#                                       (CUDA_VISIBLE_DEVICES or 0); logs in OUT
#
# What NVIDIA's kernels do is not ours to judge, but racecheck, told to look at ours alone, makes cuBLASLt's fault, and
# initcheck does not see what they write: a library below $LIBRARIES takes cuBLASLt's place (plain_products.cu) or helps
# it (initialised_products.cc).
#
# racecheck follows every access to shared memory, of which plain kernels make one for each product or two: it looks at them
# in YARDSTICK_CASES alone. By their sources, as mangled names have them:
YARDSTICKS='conv_simple_cu simple_linear_cu _row_attention_cu 16_linear_branch_cu row_backward_cu'

sanitize_case() {  # OUT TOOL TEST CASE
  local program options=(--tool "$2" --report-api-errors no --error-exitcode 9) log="$1/$2-${4//\//.}.log" library source
  find_program "$3" || return
  case $2 in racecheck) library=plain_products ;; initcheck) library=initialised_products ;; *) library='' ;; esac
  if [ -n "$library" ]; then
    library=$(find "$LIBRARIES" -name "lib$library.so" 2>/dev/null | head -1)
    [ -n "$library" ] || { echo "exit: no library to preload for $2" >"$log"; return; }
    options+=(--kernel-name kns=slalom)
    # shellcheck disable=SC2016  # beside what compute-sanitizer itself preloads
    program=(/bin/bash -c 'LD_PRELOAD=$0${LD_PRELOAD:+:$LD_PRELOAD} exec "$@"' "$(realpath "$library")" "${program[@]}")
  fi
  # shellcheck disable=SC2053  # a pattern
  if [ "$2" = racecheck ] && ! [[ $4 == ${YARDSTICK_CASES:-} ]]; then
    for source in $YARDSTICKS; do options+=(--kernel-name-exclude "kns=$source"); done
  fi
  timeout -k 5 "$LIMIT" compute-sanitizer "${options[@]}" "${program[@]}" --gtest_filter="$4" >"$log" 2>&1
  echo "exit $?" >>"$log"
}
sanitize_cases() {  # FILTER TEST
  local program
  find_program "$2" || return
  "${program[@]}" --gtest_list_tests --gtest_filter="$1" | awk '/^[^ ]/ { suite = $1 } /^ / { print suite $1 }'
}
judge_cases() {  # OUT TOOL CASE...
  local case log clean=0
  for case in "${@:3}"; do
    log="$1/$2-${case//\//.}.log"
    if grep -q '^exit 0$' "$log" && grep -q 'PASSED  \] 1 test' "$log"; then clean=$((clean + 1)); continue; fi
    fail "$2 of $case: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY|PASSED|SKIPPED|FAILED|^exit' "$log" | sort -u | tr '\n' ' ')"
    grep -m 20 '^=========' "$log" | cut -c1-160
  done
  echo "$2: $clean of $(($# - 2)) cases clean"
  [ $# -gt 2 ] || fail "$2: no test matches"
}
run_sanitizers() {  # OUT FILTER TEST...
  local tools=${SANITIZE:-memcheck racecheck initcheck} tool test case cases=() gpu gpus=() n=0
  read -ra gpus <<<"${GPUS:-${CUDA_VISIBLE_DEVICES:-0}}"
  for test in "${@:3}"; do
    for case in $(sanitize_cases "$2" "$test"); do cases+=("$test $case"); done
  done
  for tool in $tools; do
    for case in "${cases[@]}"; do
      while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n; done
      gpu=${gpus[n++ % ${#gpus[@]}]}
      CUDA_VISIBLE_DEVICES=$gpu sanitize_case "$1" "$tool" "${case% *}" "${case#* }" &
    done
  done
  wait
  for tool in $tools; do judge_cases "$1" "$tool" "${cases[@]#* }"; done
}
