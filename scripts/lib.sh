# What the scripts share: which back end this machine can build and run. Sourced from the repository's
# root; whoever sources it says who it is in `script`.

# Where `scripts/bootstrap cuda` unpacks NVIDIA's wheels.
cuda_toolkit=build/cuda-toolkit

# The first driver that runs what CUDA 13 builds; the kernels need bf16 tensor cores.
oldest_driver=580
oldest_compute=8.0
# The driver's entry points are looked up by version, which the runtime does since 12.5.
oldest_toolkit=12.5

say() { echo "$script: $*" >&2; }

# at_least VERSION WANTED
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

ask_driver() { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null; }

# Prints the version of the loaded NVIDIA driver ("unknown" in a container that hides it); fails where
# none is loaded. nvidia-smi may be missing, or be there without a driver.
driver_version() {
  local version
  if version=$(ask_driver driver_version) && [ -n "$version" ]; then
    echo "${version%%$'\n'*}"
  elif [ -e /dev/nvidiactl ]; then
    version=$(grep -om 1 '[0-9]\+\.[0-9.]\+' /proc/driver/nvidia/version 2>/dev/null || true)
    echo "${version:-unknown}"
  else
    return 1
  fi
}

# Prints the path of an nvcc that can build kernels/cuda: new enough, cuBLASLt's header beside it.
find_nvcc() {
  local candidate root version
  for candidate in "${CUDACXX:-}" "$(command -v nvcc)" "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" \
    "$PWD/$cuda_toolkit/nvidia/cu13/bin/nvcc"; do
    [ -x "$candidate" ] || continue
    version=$("$candidate" --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p')
    root=$(dirname "$(dirname "$(readlink -f "$candidate")")")
    at_least "${version:-0}" $oldest_toolkit || continue
    [ -n "$(find -L "$root"/include "$root"/targets/*/include -maxdepth 1 -name cublasLt.h 2>/dev/null)" ] || continue
    echo "$candidate"
    return
  done
  return 1
}

# Prints the preset for this machine, and on standard error why. With a GPU that the kernels can use it
# is cuda, once a toolkit is there to build them; it is cpu everywhere else.
choose_preset() {
  local driver compute
  if ! driver=$(driver_version); then
    say "no NVIDIA driver on this machine: building for the CPU"
    echo cpu
    return
  fi
  compute=$(ask_driver compute_cap | sort -Vr | head -n 1) || compute=
  if [ -n "$compute" ] && ! at_least "$compute" $oldest_compute; then
    say "the GPU has compute capability $compute, the kernels need $oldest_compute: building for the CPU"
    echo cpu
    return
  fi
  if ! find_nvcc >/dev/null; then
    if [ "$driver" != unknown ] && ! at_least "$driver" $oldest_driver; then
      say "NVIDIA driver $driver is there, but no CUDA toolkit, and CUDA 13 needs driver $oldest_driver: building for the CPU"
      echo cpu
      return
    fi
    if ! { scripts/bootstrap cuda >&2 && find_nvcc >/dev/null; }; then
      say "no CUDA toolkit could be had (the lines above say why): building for the CPU"
      echo cpu
      return
    fi
  fi
  say "NVIDIA driver $driver: building for the GPU with $(find_nvcc)"
  echo cuda
}
