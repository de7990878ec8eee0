// The activations of fastp2p/ops/activation.py, by their numbers there.
#pragma once

#include <limits>

#include "cpu/vector.h"

namespace fastp2p {

enum ActivationKind { NONE, RELU, LEAKY_RELU, TANH };

// What is linear on either side of 0 is one expression without a branch, so that loops vectorise; tanh is another. A
// NaN stays one.
template <typename A>
struct Activation {
  Activation(int64_t kind, double leaky_slope)
      : tanh(kind == TANH), slope(static_cast<A>(kind == RELU         ? 0
                                                 : kind == LEAKY_RELU ? leaky_slope
                                                                      : 1)),
        lowest(kind == RELU ? std::numeric_limits<A>::lowest() : -std::numeric_limits<A>::infinity()) {}

  bool tanh;
  A slope;   // below 0
  A lowest;  // what is below counts as this: relu(-inf) is 0, and -inf * 0 is not

  template <bool WITH_TANH>
  FASTP2P_INLINE A apply(A z) const {
    if (WITH_TANH && tanh) return std::tanh(z);
    const A below = (z > lowest ? z : lowest) * slope;
    return !(z <= 0) ? z : below;
  }

  // act'(z); at 0 the negative side's.
  template <bool WITH_TANH>
  FASTP2P_INLINE A derivative(A z) const {
    if (WITH_TANH && tanh) {
      const A y = std::tanh(z);
      return 1 - y * y;
    }
    return z > 0 ? A{1} : slope;
  }
};

// Whether an index in an operator's schema names an activation.
inline bool is_activation(int64_t kind) { return NONE <= kind && kind <= TANH; }

}  // namespace fastp2p
