// Operators that other operators call; their schemas, and what the arguments mean, are in fastp2p/ops/.
#pragma once

#include "common.h"

namespace fastp2p {

// A normalised layer that a data gradient flows on into; fastp2p/norm_gate.py.
struct NormGate {
  std::optional<Tensor> mean, var, weight, bias, rng, addend;
  int64_t first;
  double eps;
  int64_t second;
  double dropout;
  int64_t layer;
};

// dz in place of dy's channels from gate.first on, and its sums; x is the norm's input.
std::tuple<Tensor, Tensor> dz_in_place(const char* operation, Tensor& dy, const Tensor& x, const NormGate& gate,
                                       int64_t activation, double slope, int64_t stat_groups);
std::tuple<Tensor, Tensor> norm_stats_cpu(Tensor x, int64_t stat_groups);
std::tuple<Tensor, Tensor> norm_act_cpu(Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight,
                                        std::optional<Tensor> bias, std::optional<Tensor> rng, double eps,
                                        int64_t activation, double slope, int64_t second, double dropout, int64_t layer,
                                        bool fixed_stats);
void running_stats_cpu(Tensor running_mean, Tensor running_var, Tensor mean, Tensor var, int64_t n_values,
                       double momentum);
Tensor conv_wgrad_cpu(Tensor outer, std::optional<Tensor> outer2, Tensor inner, int64_t kernel_height,
                      int64_t kernel_width, int64_t stride, int64_t padding, ScalarType dtype);
void adam_cpu(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor lr, Tensor powers, double beta1,
              double beta2, double eps, std::optional<Tensor> low_precision, std::optional<Tensor> unscale);

}  // namespace fastp2p
