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

std::tuple<Tensor, Tensor, Tensor> down_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                            std::optional<Tensor> gate, int64_t stride, int64_t padding,
                                            int64_t activation, double slope, int64_t stat_groups);
std::tuple<Tensor, Tensor, Tensor> up_cpu(Tensor x, std::optional<Tensor> x2, Tensor weight, std::optional<Tensor> bias,
                                          std::optional<Tensor> gate, int64_t stride, int64_t padding, int64_t height,
                                          int64_t width, int64_t activation, double slope, int64_t stat_groups);
Tensor wgrad_cpu(Tensor outer, std::optional<Tensor> outer2, Tensor inner, int64_t kernel_height, int64_t kernel_width,
                 int64_t stride, int64_t padding, ScalarType dtype);
void wgrad_adam_cpu(Tensor outer, std::optional<Tensor> outer2, Tensor inner, Tensor param, Tensor exp_avg,
                    Tensor exp_avg_sq, Tensor lr, Tensor powers, double beta1, double beta2, double eps, int64_t stride,
                    int64_t padding, std::optional<Tensor> low_precision);

}  // namespace fastp2p
