// Adam's update of a range of elements: for adam, and for what makes its gradients a part at a time.
#pragma once

#include "common.h"

namespace fastp2p {

// A step's buffers and its numbers, read once; that they go together is for the caller to check.
class AdamStep {
 public:
  AdamStep(const Tensor& param, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& lr, const Tensor& powers,
           double beta1, double beta2, double eps, const std::optional<Tensor>& low_precision,
           const std::optional<Tensor>& unscale);

  // Whether unscale says to change nothing; update does not ask.
  bool skips() const { return unscale_ == 0; }

  // Updates n elements of param and its moments from `element` on, and of low_precision from low_element on, by as many
  // gradients of a type for which `grad_type_fits`. Starts no threads, and may be called from any.
  void update(const void* grad, ScalarType grad_type, int64_t n, int64_t element, int64_t low_element) const;

 private:
  ScalarType type_, low_type_;
  void *param_, *exp_avg_, *exp_avg_sq_, *low_;  // the last null where there is none
  double lr_, power1_, power2_, beta1_, beta2_, eps_, unscale_;
};

}  // namespace fastp2p
