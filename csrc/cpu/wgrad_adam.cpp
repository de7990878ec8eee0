// wgrad_adam on the CPU: wgrad, then adam over the weight's memory.
#include "cpu/convolution.h"
#include "cpu/operators.h"

namespace fastp2p {

void wgrad_adam_cpu(Tensor outer, std::optional<Tensor> outer2, Tensor inner, Tensor param, Tensor exp_avg,
                    Tensor exp_avg_sq, Tensor lr, Tensor powers, double beta1, double beta2, double eps, int64_t stride,
                    int64_t padding, std::optional<Tensor> low_precision) {
  FASTP2P_CHECK("wgrad_adam", param.dim() == 4, "got param ", describe(param), ", expected (O, C, KH, KW)");
  const Tensor grad =
      wgrad_cpu(outer, outer2, inner, param.size(2), param.size(3), stride, padding, param.scalar_type());
  const auto flat = [&](const Tensor& t) {
    FASTP2P_CHECK(
        "wgrad_adam",
        has_shape(t, {grad.size(0), grad.size(1), grad.size(2), grad.size(3)}) && pixel_stride(t) == t.size(1), "got ",
        describe(t), ", expected channels_last, of the shape of ", describe(grad));
    return flattened(t);
  };
  adam_cpu(flat(param), flat(grad), flat(exp_avg), flat(exp_avg_sq), lr, powers, beta1, beta2, eps,
           low_precision ? std::optional(flat(*low_precision)) : std::nullopt);
}

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CPU, m) { m.impl("wgrad_adam", TORCH_BOX(&fastp2p::wgrad_adam_cpu)); }
