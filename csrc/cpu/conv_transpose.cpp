// conv_transpose on the CPU: ATen's transposed convolution, or a matrix product into every tap's share of every pixel,
// which are then added up in float, with bias and activation, where they overlap. The shares are rounded to x's dtype
// once each.
#include "cpu/convolution.h"
#include "cpu/operators.h"
#include "cpu/sums.h"

namespace fastp2p {
namespace {

// shares: (N, in_height, in_width, KH, KW, C), dense, to out: (N, height, width, C).
template <typename T>
struct Col2Im {
  const T* shares;
  T* out;
  Window window;
  int64_t in_height, in_width, height, width, channels;
  std::vector<Wide<T>> bias;
};

template <typename T>
FASTP2P_INLINE void add_shares(const Col2Im<T>& job, int64_t begin, int64_t end) {
  using A = Wide<T>;
  const Window& window = job.window;
  for (int64_t m = begin; m < end; ++m) {
    const int64_t image = m / (job.height * job.width);
    const int64_t y = m / job.width % job.height + window.padding, x = m % job.width + window.padding;
    for (int64_t c0 = 0; c0 < job.channels; c0 += BLOCK) {
      const int64_t n = std::min(BLOCK, job.channels - c0);
      A sum[BLOCK];
      for (int64_t c = 0; c < n; ++c) sum[c] = job.bias[c0 + c];
      for (int64_t ky = y % window.stride; ky < window.height; ky += window.stride) {
        const int64_t in_y = (y - ky) / window.stride;
        if (y < ky || in_y >= job.in_height) continue;
        for (int64_t kx = x % window.stride; kx < window.width; kx += window.stride) {
          const int64_t in_x = (x - kx) / window.stride;
          if (x < kx || in_x >= job.in_width) continue;
          const int64_t pixel = (image * job.in_height + in_y) * job.in_width + in_x;
          const T* __restrict share =
              job.shares + ((pixel * window.height + ky) * window.width + kx) * job.channels + c0;
          for (int64_t c = 0; c < n; ++c) sum[c] += widen(share[c]);
        }
      }
      T* __restrict out = job.out + m * job.channels + c0;
      for (int64_t c = 0; c < n; ++c) out[c] = narrow<T>(sum[c]);
    }
  }
}

#define INSTANTIATE(CLONES, T) \
  CLONES void run(const Col2Im<T>& job, int64_t begin, int64_t end) { add_shares(job, begin, end); }
INSTANTIATE(FASTP2P_CLONES, float)
INSTANTIATE(FASTP2P_CLONES, BFloat16)
INSTANTIATE(, Half)
INSTANTIATE(, double)
#undef INSTANTIATE

void col2im(const Tensor& shares, const Tensor& x, const Window& window, const std::optional<Tensor>& bias,
            const Tensor& out) {
  dispatch(out.scalar_type(), "conv_transpose", [&](auto element) {
    using T = decltype(element);
    const ScalarType wide = wide_type(out.scalar_type());
    const std::vector<Wide<T>> biases =
        bias ? values<Wide<T>>(torch::stable::to(*bias, wide)) : std::vector<Wide<T>>(out.size(1), 0);
    const Col2Im<T> job{.shares = static_cast<const T*>(shares.data_ptr()),
                        .out = static_cast<T*>(out.data_ptr()),
                        .window = window,
                        .in_height = x.size(2),
                        .in_width = x.size(3),
                        .height = out.size(2),
                        .width = out.size(3),
                        .channels = out.size(1),
                        .bias = biases};
    torch::stable::parallel_for(0, out.numel() / out.size(1), std::max<int64_t>(1, GRAIN / 4 / out.size(1)),
                                [&](int64_t begin, int64_t end) { run(job, begin, end); });
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> conv_transpose_cpu(
    Tensor x, std::optional<Tensor> x2, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> gate,
    int64_t stride, int64_t padding, int64_t height, int64_t width, int64_t activation, double slope,
    int64_t stat_groups, std::optional<Tensor> gate_mean, std::optional<Tensor> gate_var,
    std::optional<Tensor> gate_weight, std::optional<Tensor> gate_bias, std::optional<Tensor> rng,
    std::optional<Tensor> addend, int64_t first, double eps, int64_t second, double dropout, int64_t layer) {
  FASTP2P_CHECK("conv_transpose", x.dim() == 4 && weight.dim() == 4, "got x ", describe(x), ", weight ",
                describe(weight), ", expected (N, C, H, W) and (C + C2, O, KH, KW)");
  if (x2) {
    check_images("conv_transpose", "x2", *x2);
    check_tensor("conv_transpose", "x2", *x2, x, {x.size(0), x2->size(1), x.size(2), x.size(3)}, x.scalar_type());
  }
  FASTP2P_CHECK("conv_transpose", weight.size(0) == x.size(1) + (x2 ? x2->size(1) : 0), "got weight ", describe(weight),
                ", expected as many rows as x and x2 have channels, for x ", describe(x));
  const Window window{weight.size(2), weight.size(3), stride, padding};
  const int64_t n = x.size(0), channels = weight.size(1);
  check_convolution("conv_transpose", x, weight, bias, gate_mean ? std::nullopt : gate, window, activation,
                    {n, channels, height, width});
  const int64_t extra_height = height - ((x.size(2) - 1) * stride - 2 * padding + window.height);
  const int64_t extra_width = width - ((x.size(3) - 1) * stride - 2 * padding + window.width);
  FASTP2P_CHECK("conv_transpose",
                0 <= std::min(extra_height, extra_width) && std::max(extra_height, extra_width) < stride, "got height ",
                height, ", width ", width, ", expected what a convolution of stride ", stride, " takes to x ",
                describe(x));

  // The gradient of D's input takes a slice of the input channels; what follows wants dense taps
  const bool is_slice = pixel_stride(weight) > channels;
  if (is_slice) weight = torch::stable::contiguous(weight, MemoryFormat::ChannelsLast);

  const Problem problem{.operation = Operation::CONV_TRANSPOSE,
                        .type = x.scalar_type(),
                        .pixels = n * x.size(2) * x.size(3),
                        .outer = x.size(1),
                        .outer2 = x2 ? x2->size(1) : 0,
                        .inner = channels,
                        .height = window.height,
                        .width = window.width,
                        .stride = stride};
  const std::optional<Tensor> matrix = prefers_gemm(problem) ? weight_matrix(weight) : std::nullopt;
  Tensor out;
  if (matrix) {
    out = empty_images(x, n, channels, height, width);
    Tensor shares = empty(x, {n * x.size(2) * x.size(3), matrix->size(1)}, x.scalar_type());
    multiply(pixel_matrix(concatenate(x, x2)), *matrix, shares);
    col2im(shares, x, window, bias, out);
  } else {
    out = convolve(concatenate(x, x2), weight, bias, window, true, extra_height, extra_width);
  }
  if (gate_mean) {
    FASTP2P_CHECK("conv_transpose", gate.has_value(), "got gate_mean without a gate, expected the norm's input");
    const NormGate norm{gate_mean, gate_var, gate_weight, gate_bias, rng, addend, first, eps, second, dropout, layer};
    const auto [sum_dz, sum_dz_xhat] = dz_in_place("conv_transpose", out, *gate, norm, activation, slope, stat_groups);
    return {out, sum_dz, sum_dz_xhat};
  }
  activate_in_place(out, activation, slope, gate);
  const auto [mean, var] = norm_stats_cpu(out, stat_groups);
  return {out, mean, var};
}

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CPU, m) { m.impl("conv_transpose", TORCH_BOX(&fastp2p::conv_transpose_cpu)); }
