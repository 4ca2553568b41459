// Softmax attention alone on Hopper, dense or over lists of key blocks.
#include "kernels/cuda/attention/hopper_attention.cuh"

namespace slalom::cuda {
namespace {

using namespace hopper_attention;

template <class Tile>
void Run(const Context& context, const AttentionProblem& problem) {
  Launch<Tile>(context, MakeMaps(problem), MakeParameters(problem), problem.heads * problem.batch);
}

}  // namespace

void HopperAttention(const Context& context, const AttentionProblem& problem) {
  const bool narrow = Narrow(problem);
  if (problem.head_size == 128) {
    narrow ? Run<Tiling<128, 1>>(context, problem) : Run<Tiling<128, 2>>(context, problem);
  } else {
    narrow ? Run<Tiling<64, 1>>(context, problem) : Run<Tiling<64, 2>>(context, problem);
  }
}

}  // namespace slalom::cuda
