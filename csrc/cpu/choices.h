// Whether a convolution is one of ATen's or our matrix product: what was measured on this machine, else a rule.
#pragma once

#include <array>

#include "common.h"

namespace fastp2p {

enum class Operation : int64_t { CONV, CONV_TRANSPOSE, CONV_WGRAD, CONV_WGRAD_ADAM };

// What decides which is faster: fastp2p/ops/kernel_choices.py's Problem.
struct Problem {
  Operation operation;
  ScalarType type;
  int64_t pixels;                // the smaller images', over the batch
  int64_t outer, outer2, inner;  // channels: of the smaller images, of their second part, of the larger ones
  int64_t height, width, stride;

  using Key = std::array<int64_t, 9>;
  Key key() const {
    return {static_cast<int64_t>(operation),
            static_cast<int64_t>(type),
            pixels,
            outer,
            outer2,
            inner,
            height,
            width,
            stride};
  }
};

enum class Algorithm { AUTO, GEMM, DIRECT };
Algorithm& forced_algorithm();  // AUTO but in tests and measurements

// What serves a problem that nobody has measured: GEMM or DIRECT.
Algorithm algorithm_by_rule(const Problem& problem);

// Whether to take the matrix product.
bool prefers_gemm(const Problem& problem);

// The choices for so many threads become these.
using Choices = std::vector<std::pair<Problem, Algorithm>>;
void install_choices(int64_t threads, const Choices& choices);
void forget_choices();

}  // namespace fastp2p
