// The operators that serve the CPU; their schemas, and what the arguments mean, are in fastp2p/ops/.
#pragma once

#include "common.h"

namespace fastp2p {

struct NormActInputs {
  const Tensor &x, &mean, &var;
  const std::optional<Tensor>&weight, &bias, &rng;
  double eps;
  int64_t activation;
  double slope;
  int64_t second;
  double dropout;
  int64_t layer;
};

std::tuple<Tensor, Tensor> norm_act_cpu(Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight,
                                        std::optional<Tensor> bias, std::optional<Tensor> rng, double eps,
                                        int64_t activation, double slope, int64_t second, double dropout, int64_t layer,
                                        bool fixed_stats);
std::tuple<Tensor, Tensor, Tensor> norm_act_backward_cpu(Tensor dy, std::optional<Tensor> dy2, Tensor x, Tensor mean,
                                                         Tensor var, std::optional<Tensor> weight,
                                                         std::optional<Tensor> bias, std::optional<Tensor> rng,
                                                         double eps, int64_t activation, double slope, int64_t second,
                                                         double dropout, int64_t layer, bool fixed_stats);
std::tuple<Tensor, Tensor> norm_stats_cpu(Tensor x, int64_t stat_groups);
void running_stats_cpu(Tensor running_mean, Tensor running_var, Tensor mean, Tensor var, int64_t n_values,
                       double momentum);
std::tuple<Tensor, Tensor> patch_loss_cpu(Tensor x, std::optional<Tensor> target, int64_t kind, double target_value,
                                          double weight, bool through_tanh);
void adam_cpu(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor lr, Tensor powers, double beta1,
              double beta2, double eps, std::optional<Tensor> low_precision);
std::tuple<Tensor, Tensor> augment_cpu(Tensor pairs, Tensor index, Tensor offset, Tensor flip, int64_t crop_size,
                                       int64_t input_nc, std::optional<ScalarType> dtype);

}  // namespace fastp2p
