// The gradients of sparse attention on the device: the sparse branch over lists of blocks, the
// linear branch over its states, and what both share.
#pragma once

#include "kernels/backend.h"
#include "kernels/cuda/attention/linear_branch.h"
#include "kernels/cuda/attention/problem.h"

namespace slalom::cuda {

// --- the sparse branch ---
// With P = exp(scale q k^T - lse) and dS = P (d_out v^T - delta) on the listed pairs of blocks:
// d_q = scale dS k, d_k = scale dS^T q, d_v = P^T d_out. Nothing is added by atomics: d_q follows
// the list of each query block, d_k and d_v that of each key block, and the products that both
// need are computed twice.
struct SparseGradientProblem {
  DType dtype = DType::kBF16;
  const void* q = nullptr;  // [B, L, H, D]
  const void* k = nullptr;
  const void* v = nullptr;
  const void* d_out = nullptr;
  const float* lse = nullptr;    // [B, H, L]
  const float* delta = nullptr;  // [B, H, L]: sum over channels of d_out times the branch's output
  void* d_q = nullptr;           // [B, L, H, D]
  void* d_k = nullptr;
  void* d_v = nullptr;
  bool accumulate = false;  // add to what d_q, d_k and d_v hold
  std::int64_t batch = 0, heads = 0, length = 0;
  int head_size = 0;
  float scale = 1.0f;
  BlockList keys;  // of each query block
  BlockList
      queries;  // of each key block: block_q is the size of key blocks, block_k of query blocks
};

enum class GradientKernel {
  kHopper,      // TMA and wgmma, sm_90
  kTensorCore,  // mma.sync, sm_80 and newer
  kRow,         // one warp per row: anything
};

// The fastest kernel that can do this; a pure function. `aligned` says that all tensors may be
// accessed 16 bytes at a time.
GradientKernel ChooseGradientKernel(const SparseGradientProblem& problem, bool aligned,
                                    int compute_major);
void SparseGradient(const Context& context, const SparseGradientProblem& problem);
void SparseGradient(const Context& context, const SparseGradientProblem& problem,
                    GradientKernel kernel);

// The kernels. Each requires what ChooseGradientKernel checks.
void HopperSparseGradient(const Context& context, const SparseGradientProblem& problem);
void TensorCoreSparseGradient(const Context& context, const SparseGradientProblem& problem);
void RowSparseGradient(const Context& context, const SparseGradientProblem& problem);

// Which query blocks attend to each key block: a map's critical pairs, by key block.
struct QueryLists {
  Tensor indices;  // [B, H, Nk, Nq] i32, ascending
  Tensor counts;   // [B, H, Nk] i32
  BlockList list;
};
QueryLists MakeQueryLists(const Context& context, const BlockMap& map);

// --- the linear branch ---
struct LinearGradientArgs : LinearBranchInputs {
  Tensor d_out;  // [B, L, H, D] T: of the output, projected where it is
  Tensor d_q;    // [B, L, H, D] T, written
  Tensor d_k;
  Tensor d_v;
  Tensor delta;          // [B, H, L] f32, written: sum over channels of d_out times the output
  Tensor d_proj_weight;  // [D, D] f32, with proj_weight, written
};

// D is a multiple of 8 up to 384. Chooses between the two.
void LinearGradient(const Context& context, const LinearGradientArgs& args);
// bf16 with D 64 or 128, 16-byte aligned, and for scopes other than kAll blocks in multiples of 16.
bool TensorCoreLinearGradientFits(const LinearGradientArgs& args);
void TensorCoreLinearGradient(const Context& context, const LinearGradientArgs& args);
// One warp per row, over all pairs of rows: anything, slowly.
void RowLinearGradient(const Context& context, const LinearGradientArgs& args);

// --- shared pieces ---
// delta [B, H, L] (entry p for the head's p-th token) = sum over a row's channels of d_out times
// (out - bias - gate * projected), less `linear_delta`: of what the sparse branch gave.
struct DeltaArgs {
  Tensor out;           // [B, L, H, D] T
  Tensor d_out;         // [B, L, H, D] T
  Tensor bias;          // [D] f32, optional
  Tensor projected;     // [B, L, H, D] T, optional, with gates
  Tensor gates;         // [B, L] f32
  Tensor linear_delta;  // [B, H, L] f32, optional; may be delta
  TokenGrid grid;       // size() > 0: heads [H / 2, H) have their tokens in the order (y, x, t)
  Tensor delta;         // [B, H, L] f32
};
void SparseDelta(const Context& context, const DeltaArgs& args);

// out[c] = the sum over all rows of x [M, N] (T or f32), each times its weight [M] f32 (optional).
void SumColumns(const Context& context, const Tensor& x, const Tensor& weights, const Tensor& out);

// The problem of these tensors and this map; lse, delta and the gradients are still to be set.
SparseGradientProblem MakeSparseGradient(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const Tensor& d_out, const BlockMap& map,
                                         const QueryLists& queries);

}  // namespace slalom::cuda
