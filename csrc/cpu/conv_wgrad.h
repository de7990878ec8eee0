// A weight's gradient on the CPU, whole or row by row: for conv_wgrad, and for conv_wgrad_adam, which uses each row at
// once.
#pragma once

#include "cpu/convolution.h"

namespace fastp2p {

// The gradient as (rows, columns) = (O + O2, KH * KW * C), as a channels_last weight lies in memory. ATen's convolution
// gives it whole; where the matrix product serves, it is made when rows of it are asked for.
struct WeightGradient {
  int64_t rows, columns;
  ScalarType type;
  std::optional<Tensor> whole;  // (O + O2, C, KH, KW), channels_last
  Tensor outer, fields;         // (rows, pixels) and (pixels, columns), where there is no whole

  // out = rows [first, first + out.size(0)) of the product.
  void multiply_rows(int64_t first, const Tensor& out) const;
};

// Raises unless a convolution with this window leads from inner's size to outer's.
void check_outer_inner(const char* operation, const Tensor& outer, const std::optional<Tensor>& outer2,
                       const Tensor& inner, const Window& window);

// The gradient from tensors that are checked, for CONV_WGRAD or CONV_WGRAD_ADAM.
WeightGradient weight_gradient(Operation operation, const Tensor& outer, const std::optional<Tensor>& outer2,
                               const Tensor& inner, const Window& window);

}  // namespace fastp2p
