// conv_wgrad on the CPU: ATen's weight gradient, or the product of the outer pixels and the inner images' receptive
// fields, which is the gradient as a channels_last weight lies in memory. Sums are in float. In bfloat16 the result is
// rounded to that before it is widened to the dtype asked for, as the gradients of PyTorch's own convolutions are;
// float16, which ATen sums in float16, is widened first.
#include "cpu/conv_wgrad.h"

#include "cpu/operators.h"

namespace fastp2p {

void check_outer_inner(const char* operation, const Tensor& outer, const std::optional<Tensor>& outer2,
                       const Tensor& inner, const Window& window) {
  check_images(operation, "outer", outer);
  check_images(operation, "inner", inner);
  check_alike(operation, "outer", outer, inner);
  if (outer2) {
    check_images(operation, "outer2", *outer2);
    check_tensor(operation, "outer2", *outer2, outer, {outer.size(0), outer2->size(1), outer.size(2), outer.size(3)},
                 inner.scalar_type());
  }
  check_window(operation, window);
  FASTP2P_CHECK(operation, std::min(window.height, window.width) > 0, "got kernel (", window.height, ", ", window.width,
                "), expected at least (1, 1)");
  FASTP2P_CHECK(operation,
                outer.size(0) == inner.size(0) && window.output_size(inner.size(2), window.height) == outer.size(2) &&
                    window.output_size(inner.size(3), window.width) == outer.size(3),
                "got outer ", describe(outer), ", inner ", describe(inner),
                ", expected sizes between which a convolution with this window leads");
}

void WeightGradient::multiply_rows(int64_t first, const Tensor& out) const {
  Tensor all = outer;  // narrow takes no const one
  multiply(torch::stable::narrow(all, 0, first, out.size(0)), fields, out);
}

WeightGradient weight_gradient(Operation operation, const Tensor& outer, const std::optional<Tensor>& outer2,
                               const Tensor& inner, const Window& window) {
  const bool half = inner.scalar_type() == ScalarType::Half;
  const auto widened = [&](const Tensor& t) { return half ? torch::stable::to(t, ScalarType::Float) : t; };
  const Tensor both = widened(concatenate(outer, outer2)), x = widened(inner);
  const ScalarType type = x.scalar_type();
  const int64_t rows = both.size(1), columns = window.taps() * x.size(1);
  // oneDNN's bfloat16 gradients (PyTorch 2.13) leave the weights of a tap that meets padding alone uninitialised.
  const bool direct_is_right =
      type != ScalarType::BFloat16 || (window.every_tap_meets_a_pixel(x.size(2), window.height) &&
                                       window.every_tap_meets_a_pixel(x.size(3), window.width));
  const Problem problem{.operation = operation,
                        .type = inner.scalar_type(),
                        .pixels = both.numel() / rows,
                        .outer = outer.size(1),
                        .outer2 = outer2 ? outer2->size(1) : 0,
                        .inner = inner.size(1),
                        .height = window.height,
                        .width = window.width,
                        .stride = window.stride};
  if (direct_is_right && !prefers_gemm(problem)) {
    return {.rows = rows, .columns = columns, .type = type, .whole = convolution_dweight(both, x, window)};
  }
  return {.rows = rows,
          .columns = columns,
          .type = type,
          .outer = transpose(pixel_matrix(both)),
          .fields = im2col(x, window, both.size(2), both.size(3))};
}

Tensor conv_wgrad_cpu(Tensor outer, std::optional<Tensor> outer2, Tensor inner, int64_t kernel_height,
                      int64_t kernel_width, int64_t stride, int64_t padding, ScalarType dtype) {
  const Window window{kernel_height, kernel_width, stride, padding};
  check_outer_inner("conv_wgrad", outer, outer2, inner, window);
  const WeightGradient gradient = weight_gradient(Operation::CONV_WGRAD, outer, outer2, inner, window);
  if (gradient.whole) return torch::stable::to(*gradient.whole, dtype);
  const Tensor dweight = empty(inner, {gradient.rows, inner.size(1), kernel_height, kernel_width}, gradient.type,
                               MemoryFormat::ChannelsLast);
  gradient.multiply_rows(0, *weight_matrix(dweight));
  return torch::stable::to(dweight, dtype);
}

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CPU, m) { m.impl("conv_wgrad", TORCH_BOX(&fastp2p::conv_wgrad_cpu)); }
