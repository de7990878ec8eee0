// What an operator's CPU and CUDA kernels share: checks, results, and the types of which they are compiled.
#pragma once

#include "common.h"

namespace fastp2p {

// The types of a step's parameters and numbers; adam's, and those of what ends in it.
inline void check_adam_types(const char* operation, const Tensor& param, const Tensor& lr, const Tensor& powers,
                             const std::optional<Tensor>& unscale) {
  const bool wide = param.scalar_type() == ScalarType::Double;
  FASTP2P_CHECK(operation, wide || param.scalar_type() == ScalarType::Float, "got param ", describe(param),
                ", expected Float or Double");
  const auto float_or = [](const Tensor& t, bool also) {
    return also && t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  };
  check_tensor(operation, "lr", lr, param, {}, float_or(lr, true));
  check_tensor(operation, "powers", powers, param, {2}, ScalarType::Double);
  if (unscale) check_tensor(operation, "unscale", *unscale, param, {}, float_or(*unscale, wide));
}

// For any other type it gives bfloat16, so that the check that follows names the mistake.
inline ScalarType low_type(const Tensor& low_precision) {
  return low_precision.scalar_type() == ScalarType::Half ? ScalarType::Half : ScalarType::BFloat16;
}

// Whether gradients of this type update parameters of that one.
inline bool grad_type_fits(ScalarType grad, ScalarType param) {
  const bool low = grad == ScalarType::BFloat16 || grad == ScalarType::Half;
  return grad == param || (low && param == ScalarType::Float);
}

inline void check_adam(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                       const Tensor& lr, const Tensor& powers, const std::optional<Tensor>& low_precision,
                       const std::optional<Tensor>& unscale) {
  const ScalarType type = param.scalar_type();
  const int64_t m = param.numel();
  check_adam_types("adam", param, lr, powers, unscale);
  const auto check_buffer = [&](const char* name, const Tensor& t, ScalarType expected) {
    check_tensor("adam", name, t, param, {m}, expected);
    FASTP2P_CHECK("adam", t.is_contiguous(), "got ", name, " ", describe(t), ", expected it contiguous");
  };
  check_buffer("param", param, type);
  check_buffer("grad", grad, grad_type_fits(grad.scalar_type(), type) ? grad.scalar_type() : type);
  check_buffer("exp_avg", exp_avg, type);
  check_buffer("exp_avg_sq", exp_avg_sq, type);
  if (low_precision) check_buffer("low_precision", *low_precision, low_type(*low_precision));
}

// Everything but what index and offset hold: on a GPU, reading them would wait for it.
inline void check_augment(const Tensor& pairs, const Tensor& index, const Tensor& offset, const Tensor& flip,
                          int64_t crop_size, int64_t input_nc) {
  const int64_t n = index.numel();
  FASTP2P_CHECK("augment", pairs.dim() == 4 && pairs.scalar_type() == ScalarType::Byte, "got pairs ", describe(pairs),
                ", expected (P, H, W, C) Byte");
  check_tensor("augment", "index", index, pairs, {n}, ScalarType::Long);
  check_tensor("augment", "offset", offset, pairs, {n, 2}, ScalarType::Long);
  check_tensor("augment", "flip", flip, pairs, {n}, ScalarType::Bool);
  FASTP2P_CHECK(
      "augment",
      crop_size > 0 && crop_size <= std::min(pairs.size(1), pairs.size(2)) && input_nc > 0 && input_nc < pairs.size(3),
      "got crop_size ", crop_size, ", input_nc ", input_nc, " for pairs ", describe(pairs),
      ", expected a crop no larger than the pairs, and channels left for both A and B");
}

// real_A and real_B of augment, to be filled; type: real_A's.
inline std::tuple<Tensor, Tensor> empty_crops(const Tensor& pairs, int64_t n, int64_t crop_size, int64_t input_nc,
                                              ScalarType type) {
  const auto batch = [&](int64_t channels, ScalarType dtype) {
    return empty(pairs, {n, channels, crop_size, crop_size}, dtype, MemoryFormat::ChannelsLast);
  };
  return {batch(input_nc, type), batch(pairs.size(3) - input_nc, ScalarType::Float)};
}

// Calls f with values of the types of parameters, gradients and low-precision weights (any where there are none).
template <typename F>
void dispatch_adam(ScalarType param, ScalarType grad, ScalarType low_precision, const F& f) {
  const auto with = [&](auto wide, auto gradient) {
    low_precision == ScalarType::Half ? f(wide, gradient, Half()) : f(wide, gradient, BFloat16());
  };
  if (param == ScalarType::Double) return with(double(), double());
  switch (grad) {
    case ScalarType::BFloat16: return with(float(), BFloat16());
    case ScalarType::Half: return with(float(), Half());
    default: return with(float(), float());
  }
}

}  // namespace fastp2p
