// Sums and maxima over the lanes of a warp or the threads of a block.
#pragma once

namespace slalom::cuda {

inline constexpr unsigned kFullWarp = 0xffffffffu;

// Over groups of kLanes neighbouring lanes, kLanes a power of two up to 32. Every lane gets it.
template <int kLanes>
__device__ inline float GroupSum(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

template <int kLanes>
__device__ inline float GroupMax(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

// Over all threads of a block of whole warps; `shared` holds 32 floats and may be used again at
// once.
__device__ inline float BlockSum(float value, float* shared) {
  value = GroupSum<32>(value);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  value = lane < static_cast<int>(blockDim.x / 32) ? shared[lane] : 0.0f;
  value = GroupSum<32>(value);
  __syncthreads();
  return value;
}

__device__ inline float BlockMax(float value, float* shared) {
  value = GroupMax<32>(value);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  value = lane < static_cast<int>(blockDim.x / 32) ? shared[lane] : -INFINITY;
  value = GroupMax<32>(value);
  __syncthreads();
  return value;
}

}  // namespace slalom::cuda
