// norm_act reads x once and writes one or two results: 2 elements moved for each (3 with a second result). Threads take
// parts of some 16384 elements. Arithmetic is in float (double for double). Eager PyTorch takes a pass each for
// normalisation, activation and dropout, and the second activation another.
#include "cpu/norm.h"
#include "cpu/operators.h"

namespace fastp2p {
namespace {

template <typename T>
struct Forward {
  const Norm<T>& norm;
  T *y, *y2;
};

template <typename T>
FASTP2P_INLINE void forward_rows(const Forward<T>& pass, int64_t group, int64_t begin, int64_t end) {
  const Norm<T>& norm = pass.norm;
  const int64_t channels = norm.channels, offset = norm.first_row(group);
  for_rows(norm, norm.has_second, offset + begin, offset + end,
           [&](auto variant, int64_t row) __attribute__((always_inline)) {
    using V = decltype(variant);
    for (int64_t c0 = 0; c0 < channels; c0 += BLOCK) {
      const int64_t n = std::min(BLOCK, channels - c0);
      const Block<T, V> block(norm, group, row, c0);
      T* __restrict y = pass.y + row * channels + c0;
      T* __restrict y2 = V::second ? pass.y2 + row * channels + c0 : nullptr;
#pragma GCC ivdep
      for (int64_t c = 0; c < n; ++c) {
#pragma GCC unroll 4
        for (int r = 0; r < V::rows; ++r) {
          y[r * channels + c] = narrow<T>(block.first.template apply<V::tanh>(block.z(r, c)) * block.keep(r, c));
          if (V::second) {
            y2[r * channels + c] = narrow<T>(block.second.template apply<V::tanh>(block.z(r, c)) * block.keep(r, c));
          }
        }
      }
    }
  });
}

#define INSTANTIATE(CLONES, T)                                                         \
  CLONES void run(const Forward<T>& pass, int64_t group, int64_t begin, int64_t end) { \
    forward_rows(pass, group, begin, end);                                             \
  }
INSTANTIATE(FASTP2P_CLONES, float)
INSTANTIATE(FASTP2P_CLONES, BFloat16)
INSTANTIATE(, Half)
INSTANTIATE(, double)
#undef INSTANTIATE

}  // namespace

std::tuple<Tensor, Tensor> norm_act_cpu(Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight,
                                        std::optional<Tensor> bias, std::optional<Tensor> rng, double eps,
                                        int64_t activation, double slope, int64_t second, double dropout, int64_t layer,
                                        bool /* fixed_stats: of the gradient alone */) {
  const Inputs in{x, mean, var, weight, bias, rng, eps, activation, slope, second, dropout, layer};
  check("norm_act", in);
  Tensor y = empty_like_images(x), y2 = second < 0 ? empty(x, {0}, x.scalar_type()) : empty_like_images(x);
  dispatch(x.scalar_type(), "norm_act", [&](auto element) {
    using T = decltype(element);
    const Norm<T> norm(in, pixels(x), true);
    const Forward<T> pass{norm, static_cast<T*>(y.data_ptr()), static_cast<T*>(y2.data_ptr())};
    norm.tasks().run([&](int64_t, int64_t group, int64_t begin, int64_t end) { run(pass, group, begin, end); });
  });
  return {y, y2};
}

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CPU, m) { m.impl("norm_act", TORCH_BOX(&fastp2p::norm_act_cpu)); }
