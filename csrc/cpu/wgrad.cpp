// wgrad on the CPU: ATen's weight gradient, or the product of the outer pixels and the inner images' receptive fields,
// which is the gradient as a channels_last weight lies in memory. Sums are in float. In bfloat16 the result is rounded
// to that before it is widened to the dtype asked for, as the gradients of PyTorch's own convolutions are; float16,
// which ATen sums in float16, is widened first.
#include "cpu/convolution.h"
#include "cpu/operators.h"

namespace fastp2p {

Tensor wgrad_cpu(Tensor outer, std::optional<Tensor> outer2, Tensor inner, int64_t kernel_height, int64_t kernel_width,
                 int64_t stride, int64_t padding, ScalarType dtype) {
  const ScalarType type = inner.scalar_type();
  check_images("wgrad", "outer", outer);
  check_images("wgrad", "inner", inner);
  check_alike("wgrad", "outer", outer, inner);
  if (outer2) {
    check_images("wgrad", "outer2", *outer2);
    check_tensor("wgrad", "outer2", *outer2, outer, {outer.size(0), outer2->size(1), outer.size(2), outer.size(3)},
                 type);
  }
  const Window window{kernel_height, kernel_width, stride, padding};
  check_window("wgrad", window);
  FASTP2P_CHECK("wgrad", std::min(kernel_height, kernel_width) > 0, "got kernel (", kernel_height, ", ", kernel_width,
                "), expected at least (1, 1)");
  const int64_t rows = outer.size(1) + (outer2 ? outer2->size(1) : 0), channels = inner.size(1);
  FASTP2P_CHECK("wgrad",
                outer.size(0) == inner.size(0) && window.output_size(inner.size(2), kernel_height) == outer.size(2) &&
                    window.output_size(inner.size(3), kernel_width) == outer.size(3),
                "got outer ", describe(outer), ", inner ", describe(inner),
                ", expected sizes between which a convolution with this window leads");

  Tensor both = concatenate(outer, outer2);
  if (type == ScalarType::Half) {
    both = torch::stable::to(both, ScalarType::Float);
    inner = torch::stable::to(inner, ScalarType::Float);
  }
  // oneDNN's bfloat16 gradients (PyTorch 2.13) leave the weights of a tap that meets padding alone uninitialised.
  const bool direct_is_right =
      type != ScalarType::BFloat16 || (window.every_tap_meets_a_pixel(inner.size(2), kernel_height) &&
                                       window.every_tap_meets_a_pixel(inner.size(3), kernel_width));
  Tensor dweight;
  if (!direct_is_right || prefers_gemm(Direction::WGRAD, type, both.numel() / rows, channels)) {
    dweight =
        empty(inner, {rows, channels, kernel_height, kernel_width}, inner.scalar_type(), MemoryFormat::ChannelsLast);
    multiply(transpose(pixel_matrix(both)), im2col(inner, window, outer.size(2), outer.size(3)),
             *weight_matrix(dweight));
  } else {
    dweight = convolution_dweight(both, inner, window);
  }
  return torch::stable::to(dweight, dtype);
}

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CPU, m) { m.impl("wgrad", TORCH_BOX(&fastp2p::wgrad_cpu)); }
