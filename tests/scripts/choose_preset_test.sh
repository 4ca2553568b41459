#!/usr/bin/env bash
# What scripts/lib.sh makes of a machine: a driver, a GPU and a toolkit that only pretend to be there.
#
#   choose_preset_test.sh SOURCE_DIR
set -uo pipefail
source_dir=$1
world=$(mktemp -d)
trap 'rm -rf "$world"' EXIT
failures=0
script=test
. "$source_dir/scripts/lib.sh"

# program PATH LINE...: an executable that runs these lines
program() {
  mkdir -p "$(dirname "$1")"
  printf '%s\n' '#!/bin/sh' "${@:2}" >"$1"
  chmod +x "$1"
}

# toolkit FOLDER RELEASE: an nvcc with cuBLASLt's header beside it
toolkit() {
  program "$1/bin/nvcc" "echo 'Cuda compilation tools, release $2, V$2.88'"
  mkdir -p "$1/include"
  : >"$1/include/cublasLt.h"
}

# A bare machine, in which the toolkit's wheels can be had.
new_world() {
  rm -rf "${world:?}"/*
  cd "$world" || exit 1
  mkdir bin
  program scripts/bootstrap "mkdir -p $cuda_toolkit/nvidia && cp -r wheels $cuda_toolkit/nvidia/cu13"
  toolkit "$world/wheels" 13.0
}

# gpu DRIVER COMPUTE: an nvidia-smi that answers with them
gpu() {
  program bin/nvidia-smi "case \$1 in *driver_version) echo $1;; *compute_cap) echo $2;; esac"
}

# expect PRESET WORDS: what choose_preset prints, and what it says
expect() {
  local preset said
  preset=$(PATH="$world/bin:/usr/bin:/bin" CUDACXX='' CUDA_HOME="$world/cuda" choose_preset 2>said)
  said=$(cat said)
  if [ "$preset" != "$1" ] || [[ $said != *"$2"* ]]; then
    echo "line ${BASH_LINENO[0]}: expected '$1' and '$2', got '$preset' and '$said'"
    failures=$((failures + 1))
  fi
}

if [ -e /dev/nvidiactl ]; then
  echo "a driver is loaded here: the cases without one are left out"
else
  new_world
  expect cpu "no NVIDIA driver"
  program bin/nvidia-smi 'echo "NVIDIA-SMI has failed"; exit 9'
  expect cpu "no NVIDIA driver"
  toolkit "$world/cuda" 13.0
  expect cpu "no NVIDIA driver"
fi

new_world
gpu 580.95.05 9.0
toolkit "$world/cuda" 13.0
expect cuda "$world/cuda/bin/nvcc"
[ ! -e "$cuda_toolkit" ] || { echo "wheels were fetched though nvcc was there"; failures=$((failures + 1)); }

# No nvcc, one that is too old, and one without cuBLAS: the wheels.
new_world
gpu 580.95.05 9.0
expect cuda "$cuda_toolkit/nvidia/cu13/bin/nvcc"
new_world
gpu 580.95.05 9.0
toolkit "$world/cuda" 11.8
expect cuda "$cuda_toolkit/nvidia/cu13/bin/nvcc"
new_world
gpu 580.95.05 9.0
toolkit "$world/cuda" 13.0
rm cuda/include/cublasLt.h
expect cuda "$cuda_toolkit/nvidia/cu13/bin/nvcc"

new_world
gpu 580.95.05 9.0
program scripts/bootstrap 'echo "no network"; exit 1'
expect cpu "no network"

# An older driver runs what the toolkit that came with it builds, and not what CUDA 13 builds.
new_world
gpu 550.54.15 8.6
expect cpu "needs driver"
toolkit "$world/cuda" 12.8
expect cuda "$world/cuda/bin/nvcc"

new_world
gpu 580.95.05 7.5
toolkit "$world/cuda" 13.0
expect cpu "compute capability 7.5"
new_world
gpu 580.95.05 "7.5; echo 12.0"
toolkit "$world/cuda" 13.0
expect cuda "$world/cuda/bin/nvcc"

[ $failures -eq 0 ] && echo "every machine got its preset"
exit $((failures > 0))
