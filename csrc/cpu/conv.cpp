// conv on the CPU: ATen's convolution, or im2col and a matrix product where the images are small; then activation or
// gate in one pass in place, and the statistics of norm_stats.
#include "cpu/convolution.h"
#include "cpu/operators.h"

namespace fastp2p {

std::tuple<Tensor, Tensor, Tensor> conv_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                            std::optional<Tensor> gate, int64_t stride, int64_t padding,
                                            int64_t activation, double slope, int64_t stat_groups,
                                            std::optional<Tensor> gate_mean, std::optional<Tensor> gate_var,
                                            std::optional<Tensor> gate_weight, std::optional<Tensor> gate_bias,
                                            std::optional<Tensor> rng, std::optional<Tensor> addend, int64_t first,
                                            double eps, int64_t second, double dropout, int64_t layer) {
  FASTP2P_CHECK("conv", x.dim() == 4 && weight.dim() == 4 && x.size(1) == weight.size(1), "got x ", describe(x),
                ", weight ", describe(weight), ", expected (N, C, H, W) and (O, C, KH, KW)");
  const Window window{weight.size(2), weight.size(3), stride, padding};
  check_window("conv", window);
  const int64_t n = x.size(0), channels = weight.size(0);
  const int64_t height = window.output_size(x.size(2), window.height),
                width = window.output_size(x.size(3), window.width);
  check_convolution("conv", x, weight, bias, gate_mean ? std::nullopt : gate, window, activation,
                    {n, channels, height, width});

  const Problem problem{.operation = Operation::CONV,
                        .type = x.scalar_type(),
                        .pixels = n * height * width,
                        .outer = channels,
                        .outer2 = 0,
                        .inner = x.size(1),
                        .height = window.height,
                        .width = window.width,
                        .stride = stride};
  const std::optional<Tensor> matrix = prefers_gemm(problem) ? weight_matrix(weight) : std::nullopt;
  Tensor out;
  if (matrix) {
    out = empty_images(x, n, channels, height, width);
    linear(im2col(x, window, height, width), *matrix, bias, pixel_matrix(out));
  } else {
    out = convolve(x, weight, bias, window, false, 0, 0);
  }
  if (gate_mean) {
    FASTP2P_CHECK("conv", gate.has_value(), "got gate_mean without a gate, expected the norm's input");
    const NormGate norm{gate_mean, gate_var, gate_weight, gate_bias, rng, addend, first, eps, second, dropout, layer};
    const auto [sum_dz, sum_dz_xhat] = dz_in_place("conv", out, *gate, norm, activation, slope, stat_groups);
    return {out, sum_dz, sum_dz_xhat};
  }
  activate_in_place(out, activation, slope, gate);
  const auto [mean, var] = norm_stats_cpu(out, stat_groups);
  return {out, mean, var};
}

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CPU, m) { m.impl("conv", TORCH_BOX(&fastp2p::conv_cpu)); }
