// What an operator's CPU and CUDA kernels share: checks, results, and the types of which they are compiled.
#pragma once

#include "common.h"

namespace fastp2p {

inline void check_adam(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                       const Tensor& lr, const Tensor& powers, const std::optional<Tensor>& low_precision) {
  const ScalarType type = param.scalar_type();
  const int64_t m = param.numel();
  FASTP2P_CHECK("adam", type == ScalarType::Float || type == ScalarType::Double, "got param ", describe(param),
                ", expected Float or Double");
  const auto check_buffer = [&](const char* name, const Tensor& t, ScalarType expected) {
    check_tensor("adam", name, t, param, {m}, expected);
    FASTP2P_CHECK("adam", t.is_contiguous(), "got ", name, " ", describe(t), ", expected it contiguous");
  };
  check_buffer("param", param, type);
  check_buffer("grad", grad, type);
  check_buffer("exp_avg", exp_avg, type);
  check_buffer("exp_avg_sq", exp_avg_sq, type);
  if (low_precision) {
    const bool half = low_precision->scalar_type() == ScalarType::Half;
    check_buffer("low_precision", *low_precision, half ? ScalarType::Half : ScalarType::BFloat16);
  }
  const bool wide_lr = lr.scalar_type() == ScalarType::Double;
  check_tensor("adam", "lr", lr, param, {}, wide_lr ? ScalarType::Double : ScalarType::Float);
  check_tensor("adam", "powers", powers, param, {2}, ScalarType::Double);
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

// real_A and real_B of augment, to be filled.
inline std::tuple<Tensor, Tensor> empty_crops(const Tensor& pairs, int64_t n, int64_t crop_size, int64_t input_nc,
                                              ScalarType type) {
  const auto batch = [&](int64_t channels) {
    return empty(pairs, {n, channels, crop_size, crop_size}, type, MemoryFormat::ChannelsLast);
  };
  return {batch(input_nc), batch(pairs.size(3) - input_nc)};
}

// Calls f with values of the parameters' type and of the low-precision weights', bfloat16 where there are none.
template <typename F>
void dispatch_adam(const Tensor& param, const std::optional<Tensor>& low_precision, const F& f) {
  const bool half = low_precision && low_precision->scalar_type() == ScalarType::Half;
  if (param.scalar_type() == ScalarType::Double) return half ? f(double(), Half()) : f(double(), BFloat16());
  half ? f(float(), Half()) : f(float(), BFloat16());
}

}  // namespace fastp2p
