#include "kernels/cuda/hopper/tensor_map.h"

#include <cuda_runtime_api.h>

#include <string>

#include "kernels/core/error.h"
#include "kernels/cuda/check.h"

namespace slalom::cuda::hopper {
namespace {

using EncodeFunction = decltype(&cuTensorMapEncodeTiled);

// Asked of the runtime, so that nothing links against the driver library: the program starts on
// machines without one.
EncodeFunction FindEncode() {
  constexpr unsigned kFirstVersion = 12000;  // CUDA 12.0 brought TMA
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result{};
  Check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kFirstVersion,
                                         cudaEnableDefault, &result),
        "cuTensorMapEncodeTiled");
  if (result != cudaDriverEntryPointSuccess || function == nullptr) {
    throw Error(ErrorCode::kFailedPrecondition, "the driver does not know cuTensorMapEncodeTiled");
  }
  return reinterpret_cast<EncodeFunction>(function);
}

}  // namespace

CUtensorMap MakeTensorMap(const void* data, const std::array<std::uint64_t, 4>& extents,
                          const std::array<std::uint64_t, 3>& strides,
                          const std::array<std::uint32_t, 4>& box) {
  static const EncodeFunction encode = FindEncode();
  Require(box[0] == 64 || box[0] == 32, "MakeTensorMap: boxes are 64 or 32 elements wide");
  const std::array<std::uint64_t, 3> byte_strides{strides[0] * 2, strides[1] * 2, strides[2] * 2};
  const std::array<std::uint32_t, 4> element_strides{1, 1, 1, 1};
  CUtensorMap map{};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(data), extents.data(),
             byte_strides.data(), box.data(), element_strides.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
             box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error(ErrorCode::kInternal,
                "cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
  }
  return map;
}

CUtensorMap MakeRowsMap(const void* data, std::int64_t batch, std::int64_t length,
                        std::int64_t heads, std::int64_t head_size) {
  const auto channels = static_cast<std::uint64_t>(head_size);
  const auto width = channels * static_cast<std::uint64_t>(heads);
  const auto rows = static_cast<std::uint64_t>(length);
  return MakeTensorMap(
      data, {channels, static_cast<std::uint64_t>(heads), rows, static_cast<std::uint64_t>(batch)},
      {channels, width, width * rows}, {64, 1, 64, 1});
}

}  // namespace slalom::cuda::hopper
