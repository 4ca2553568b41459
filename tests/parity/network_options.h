// The command line of run_network.
#pragma once

#include <span>
#include <string>

#include "kernels/attention.h"
#include "kernels/core/device.h"
#include "kernels/core/dtype.h"
#include "model/pipeline.h"

namespace slalom {

struct NetworkOptions {
  std::string net;
  std::string in;   // "-": no input file
  std::string out;  // the golden tests leave it empty
  std::string model;
  Device device;
  DType dtype = DType::kF32;  // compute type

  std::string text;                                 // tokenizer
  AttentionKind attention = AttentionKind::kDense;  // transformer
  bool whole = false;                               // vae_decoder: all frames in one piece
  SamplerKind sampler = SamplerKind::kUniPc;        // sampler
  int steps = 1;                                    // sampler
  double shift = 1.0;                               // sampler
  BlockMapOptions map;                              // sla, salad
  LinearScope scope = LinearScope::kMarginal;       // sla
  FeatureMap feature_map = FeatureMap::kSoftmax;    // sla
  SaladGate gate = SaladGate::kToken;               // salad
  TokenGrid grid;                                   // salad
};

// Reads run_network's arguments, the program's name excluded. Throws Error(kInvalidArgument) with
// a message for people; Error(kCancelled) carries the help text when it was asked for.
NetworkOptions ParseNetworkOptions(std::span<const std::string> arguments);

}  // namespace slalom
