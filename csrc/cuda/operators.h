// The operators that serve CUDA; their schemas, and what the arguments mean, are in fastp2p/ops/.
#pragma once

#include "common.h"

namespace fastp2p {

void adam_cuda(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor lr, Tensor powers, double beta1,
               double beta2, double eps, std::optional<Tensor> low_precision, std::optional<Tensor> unscale);
std::tuple<Tensor, Tensor> augment_cuda(Tensor pairs, Tensor index, Tensor offset, Tensor flip, int64_t crop_size,
                                        int64_t input_nc, std::optional<ScalarType> dtype);

}  // namespace fastp2p
