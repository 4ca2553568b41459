// What the tests of SLA and SALAD share, forward and backward: random classes, inputs, and the
// arguments that are made of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tests/reference/attention.h"
#include "tests/unit/kernels/device_test.h"

namespace slalom {

class SparseAttentionTest : public OpTest {
 protected:
  // `least_critical` draws of every query block make a block critical, whatever it was.
  reference::Classes RandomClasses(std::int64_t batch, std::int64_t heads, std::int64_t length,
                                   int block_q, int block_k, int least_critical = 0) {
    reference::Classes map;
    map.block_q = block_q;
    map.block_k = block_k;
    map.batch = batch;
    map.heads = heads;
    map.query_blocks = (length + block_q - 1) / block_q;
    map.key_blocks = (length + block_k - 1) / block_k;
    map.values.resize(static_cast<std::size_t>(batch * heads * map.query_blocks * map.key_blocks));
    for (auto& c : map.values) c = static_cast<std::uint8_t>(RandomInt(0, 2));
    for (std::size_t row = 0; row < map.values.size();
         row += static_cast<std::size_t>(map.key_blocks)) {
      for (int i = 0; i < least_critical; ++i) {
        map.values[row + static_cast<std::size_t>(RandomInt(0, map.key_blocks - 1))] = 1;
      }
    }
    return map;
  }

  BlockMap Force(const reference::Classes& map) {
    const Shape shape{map.batch, map.heads, map.query_blocks, map.key_blocks};
    const Tensor host = Tensor::Host(shape, DType::kU8);
    std::copy(map.values.begin(), map.values.end(), host.data<std::uint8_t>());
    const Tensor classes = backend().Allocate(shape, DType::kU8);
    backend().Copy(host, classes);
    BlockMap forced = backend().BlockMapFromClasses(classes, map.block_q, map.block_k);
    forced.grid = map.grid;
    return forced;
  }

  struct Qkv {
    reference::Array q, k, v;
  };
  Qkv RandomQkv(std::int64_t batch, std::int64_t length, std::int64_t heads, std::int64_t size) {
    const Shape shape{batch, length, heads, size};
    return {Random(shape, type(), 1.5), Random(shape, type(), 1.5), Random(shape, type())};
  }

  // Of SLA; not defined without a linear branch.
  struct Projection {
    reference::Array weight, bias;
  };
  Projection RandomProjection(std::int64_t size, bool linear) {
    if (!linear) return {};
    return {Random(Shape{size, size}, DType::kF32, 0.3), Random(Shape{size}, DType::kF32)};
  }

  // Uploads; `out` is poisoned, lse is left out.
  SlaArgs SlaArguments(const Qkv& in, const Projection& projection, const BlockMap& map,
                       LinearScope scope, FeatureMap feature_map) {
    return {.q = Upload(in.q, type()),
            .k = Upload(in.k, type()),
            .v = Upload(in.v, type()),
            .map = &map,
            .scope = scope,
            .feature_map = feature_map,
            .proj_weight = UploadIf(projection.weight, DType::kF32),
            .proj_bias = UploadIf(projection.bias, DType::kF32),
            .out = Poisoned(in.q.shape, type())};
  }

  reference::SaladInputs RandomSalad(std::int64_t batch, const TokenGrid& grid, std::int64_t heads,
                                     std::int64_t size, bool linear) {
    const std::int64_t length = grid.size(), width = heads * size;
    const Qkv qkv = RandomQkv(batch, length, heads, size);
    reference::SaladInputs in;
    in.q = qkv.q;
    in.k = qkv.k;
    in.v = qkv.v;
    in.q_normed = Random(qkv.q.shape, type());
    in.k_normed = Random(qkv.q.shape, type());
    in.SetAngles(Random(Shape{length, size / 2}, DType::kF32, 0.5));
    in.x = Random(Shape{batch, length, width}, type());
    if (linear) {
      in.proj_weight = Random(Shape{width, width}, type(), 0.2);
      in.proj_bias = Random(Shape{width}, DType::kF32);
    }
    in.gate_weight = Random(Shape{1, width}, DType::kF32, 0.2);
    in.gate_bias = Random(Shape{1}, DType::kF32);
    return in;
  }

  // Uploads; `out` is poisoned, lse and gate_out are left out. A map with a grid is of windows.
  SaladArgs SaladArguments(const reference::SaladInputs& in, const BlockMap& map,
                           const TokenGrid& grid) {
    return {.q = Upload(in.q, type()),
            .k = Upload(in.k, type()),
            .v = Upload(in.v, type()),
            .q_normed = Upload(in.q_normed, type()),
            .k_normed = Upload(in.k_normed, type()),
            .cos = Upload(in.cos, DType::kF32),
            .sin = Upload(in.sin, DType::kF32),
            .x = Upload(in.x, type()),
            .map = &map,
            .map_kind = map.grid.size() > 0 ? BlockMapKind::kWindow : BlockMapKind::kTopK,
            .grid = grid,
            .gate = in.gate,
            .proj_weight = UploadIf(in.proj_weight, type()),
            .proj_bias = UploadIf(in.proj_bias, DType::kF32),
            .gate_weight = Upload(in.gate_weight, DType::kF32),
            .gate_bias = Upload(in.gate_bias, DType::kF32),
            .out = Poisoned(in.x.shape, type())};
  }
};

}  // namespace slalom
