// SLA in one kernel on Hopper: attention over the critical blocks, and the linear branch in its
// epilogue.
#include "kernels/cuda/attention/hopper_attention.cuh"
#include "kernels/cuda/attention/sla.h"

namespace slalom::cuda {
namespace {

using namespace hopper_attention;

// `count` matrices of kD rows, `rows` rows apart.
CUtensorMap MatricesMap(const Tensor& data, int head_size, std::int64_t rows, std::int64_t count) {
  const auto d = static_cast<std::uint64_t>(head_size);
  return MakeTensorMap(data.raw(), {d, 1, d, static_cast<std::uint64_t>(count)},
                       {d, d, d * static_cast<std::uint64_t>(rows)}, {kPanel, 1, kKeyBlock, 1});
}

template <int kD, int kConsumers>
void Run(const Context& context, const AttentionProblem& problem, const LinearStates& states,
         Feature feature, const float* bias) {
  TensorMaps maps = MakeMaps(problem);
  maps.state =
      MatricesMap(states.sums, kD, kD + 1, std::int64_t{states.heads} * states.states_per_head);
  Parameters parameters = MakeParameters(problem);
  parameters.first_head = states.first_head;
  parameters.linear = {feature, states.sums.data<bf16>(), states.states_per_head,
                       problem.list.block_q, bias};
  if (states.weight.defined()) {
    maps.weight = MatricesMap(states.weight, kD, kD, 1);
    Launch<Tiling<kD, kConsumers, Mixing::kProjected>>(context, maps, parameters, states.heads);
  } else {
    Launch<Tiling<kD, kConsumers, Mixing::kFolded>>(context, maps, parameters, states.heads);
  }
}

}  // namespace

void HopperSla(const Context& context, const AttentionProblem& problem, const LinearStates& states,
               Feature feature, const float* bias) {
  const bool narrow = Narrow(problem);
  if (problem.head_size == 128) {
    narrow ? Run<128, 1>(context, problem, states, feature, bias)
           : Run<128, 2>(context, problem, states, feature, bias);
  } else {
    narrow ? Run<64, 1>(context, problem, states, feature, bias)
           : Run<64, 2>(context, problem, states, feature, bias);
  }
}

}  // namespace slalom::cuda
