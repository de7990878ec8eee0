// batch_norm_act: norm_act, and a few hundred running averages, in one call.
#include "cpu/operators.h"

namespace fastp2p {
namespace {

std::tuple<Tensor, Tensor> batch_norm_act_cpu(Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight,
                                              std::optional<Tensor> bias, std::optional<Tensor> rng,
                                              Tensor running_mean, Tensor running_var, double momentum, double eps,
                                              int64_t activation, double slope, int64_t second, double dropout,
                                              int64_t layer) {
  auto results = norm_act_cpu(x, mean, var, weight, bias, rng, eps, activation, slope, second, dropout, layer, false);
  running_stats_cpu(running_mean, running_var, mean, var, x.numel() / mean.numel(), momentum);
  return results;
}

}  // namespace
}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CPU, m) { m.impl("batch_norm_act", TORCH_BOX(&fastp2p::batch_norm_act_cpu)); }
