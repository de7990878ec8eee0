// The gradients of normalisations. norm_act_backward reads x and the gradients twice, for the two sums of each channel
// and for dx, and recomputes the activation rather than keep it: 5 elements moved for each (7 with a second gradient).
// dz_in_place is its first pass, which leaves dz in the gradient's place, and norm_dx its second pass from there.
// Arithmetic is in float (double for double); sums of at most 32 rows are float, their sums double.
#include "cpu/norm.h"
#include "cpu/operators.h"

namespace fastp2p {
namespace {

template <typename T>
struct Backward {
  const Norm<T>& norm;
  Pixels dy;
  std::optional<Pixels> dy2;
};

// The rows of a Block and of the gradients that came for them: dz, the gradient before the affine map.
template <typename T, typename V>
struct GradientBlock : Block<T, V> {
  using A = Wide<T>;

  FASTP2P_INLINE GradientBlock(const Backward<T>& pass, int64_t group, int64_t row, int64_t c0)
      : Block<T, V>(pass.norm, group, row, c0), dy_stride(pass.dy.stride * pass.norm.repeats),
        dy2_stride(V::second ? pass.dy2->stride * pass.norm.repeats : 0),
        dy(pass.dy.template data<T>() + row * dy_stride + c0),
        dy2(V::second ? pass.dy2->template data<T>() + row * dy2_stride + c0 : nullptr) {}

  FASTP2P_INLINE A dz(int r, int64_t c) const {
    const A z = this->z(r, c);
    A sum = widen(dy[r * dy_stride + c]) * this->first.template derivative<V::tanh>(z);
    if (V::second) sum += widen(dy2[r * dy2_stride + c]) * this->second.template derivative<V::tanh>(z);
    return sum * this->keep(r, c);
  }

  const int64_t dy_stride, dy2_stride;
  const T* __restrict dy, * __restrict dy2;
};

// Adds the rows' sums of dz and of dz * (x - mean), for each channel, to sums[0] and sums[channels] on. With STORE dz
// is rounded into dy's place before.
template <bool STORE, typename T>
FASTP2P_INLINE void sum_rows(const Backward<T>& pass, int64_t group, int64_t begin, int64_t end, double* sums) {
  using A = Wide<T>;
  const Norm<T>& norm = pass.norm;
  const int64_t channels = norm.channels, offset = norm.first_row(group);
  for (int64_t c0 = 0; c0 < channels; c0 += BLOCK) {
    const int64_t n = std::min(BLOCK, channels - c0);
    for (int64_t from = begin; from < end; from += FLOAT_ROWS) {
      A dbias[BLOCK] = {}, dscale[BLOCK] = {};
      const int64_t to = std::min(end, from + FLOAT_ROWS);
      for_rows(norm, pass.dy2.has_value(), offset + from, offset + to,
               [&](auto variant, int64_t row) __attribute__((always_inline)) {
        using V = decltype(variant);
        const GradientBlock<T, V> block(pass, group, row, c0);
#pragma GCC ivdep
        for (int64_t c = 0; c < n; ++c) {
          A dz_sum = 0, deviation_sum = 0;
#pragma GCC unroll 4
          for (int r = 0; r < V::rows; ++r) {
            A dz = block.dz(r, c);
            if constexpr (STORE) {
              T& place = const_cast<T&>(block.dy[r * block.dy_stride + c]);
              place = narrow<T>(dz);
              dz = widen(place);
            }
            dz_sum += dz;
            deviation_sum += dz * block.deviation(r, c);
          }
          dbias[c] += dz_sum;
          dscale[c] += deviation_sum;
        }
      });
      for (int64_t c = 0; c < n; ++c) {
        sums[c0 + c] += dbias[c];
        sums[channels + c0 + c] += dscale[c];
      }
    }
  }
}

// dx = dz * scale - constant - (x - mean) * linear, the last two the ways through mean and variance.
template <typename T>
struct InputGradient {
  using A = Wide<T>;
  const Backward<T>& pass;
  std::vector<A> constant, linear;  // (groups, channels)
  bool fixed_stats;                 // then dx = dz * scale, also where a pixel is infinite
  T* dx;
};

template <bool FIXED_STATS, typename T>
FASTP2P_INLINE void input_gradient_rows(const InputGradient<T>& out, int64_t group, int64_t begin, int64_t end) {
  using A = Wide<T>;
  const Backward<T>& pass = out.pass;
  const int64_t channels = pass.norm.channels, offset = pass.norm.first_row(group);
  for_rows(pass.norm, pass.dy2.has_value(), offset + begin, offset + end,
           [&](auto variant, int64_t row) __attribute__((always_inline)) {
    using V = decltype(variant);
    for (int64_t c0 = 0; c0 < channels; c0 += BLOCK) {
      const int64_t n = std::min(BLOCK, channels - c0);
      const GradientBlock<T, V> block(pass, group, row, c0);
      const A* __restrict constant = out.constant.data() + group * channels + c0;
      const A* __restrict linear = out.linear.data() + group * channels + c0;
      T* __restrict dx = out.dx + row * channels + c0;
#pragma GCC ivdep
      for (int64_t c = 0; c < n; ++c) {
#pragma GCC unroll 4
        for (int r = 0; r < V::rows; ++r) {
          A value = block.dz(r, c) * block.scale[c];
          if constexpr (!FIXED_STATS) value -= constant[c] + block.deviation(r, c) * linear[c];
          dx[r * channels + c] = narrow<T>(value);
        }
      }
    }
  });
}

// The first pass alone, with dz in dy's place.
template <typename T>
struct InPlace {
  const Backward<T>& pass;
};

#define INSTANTIATE(CLONES, T)                                                                        \
  CLONES void run(const Backward<T>& pass, int64_t group, int64_t begin, int64_t end, double* sums) { \
    sum_rows<false>(pass, group, begin, end, sums);                                                   \
  }                                                                                                   \
  CLONES void run(const InPlace<T>& in, int64_t group, int64_t begin, int64_t end, double* sums) {    \
    sum_rows<true>(in.pass, group, begin, end, sums);                                                 \
  }                                                                                                   \
  CLONES void run(const InputGradient<T>& pass, int64_t group, int64_t begin, int64_t end) {          \
    if (pass.fixed_stats) return input_gradient_rows<true>(pass, group, begin, end);                  \
    input_gradient_rows<false>(pass, group, begin, end);                                              \
  }
INSTANTIATE(FASTP2P_CLONES, float)
INSTANTIATE(FASTP2P_CLONES, BFloat16)
INSTANTIATE(, Half)
INSTANTIATE(, double)
#undef INSTANTIATE

// From the sums over rows: dx's coefficients for each group and channel, dweight and dbias.
template <typename T>
void finish_sums(const std::vector<double>& row_sums, InputGradient<T>& out, Wide<T>* dweight, Wide<T>* dbias) {
  using A = Wide<T>;
  const Norm<T>& norm = out.pass.norm;
  const int64_t channels = norm.x.channels;
  std::vector<double> totals(2 * channels);
  const double per_value = 1.0 / static_cast<double>(norm.rows * norm.repeats);
  for (int64_t group = 0; group < norm.groups; ++group) {
    std::vector<double> sums(2 * channels);  // over dz and dz * (x - mean), the repeats together
    const double* row_sum = row_sums.data() + 2 * group * norm.channels;
    for (int64_t repeat = 0; repeat < norm.repeats; ++repeat, row_sum += channels) {
      for (int64_t c = 0; c < channels; ++c) {
        sums[c] += row_sum[c];
        sums[channels + c] += row_sum[norm.channels + c];
      }
    }
    for (int64_t repeat = 0; repeat < norm.repeats; ++repeat) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t i = (group * norm.repeats + repeat) * channels + c;
        const double rstd = norm.rstd[i], scale = norm.scale[i] * per_value;
        out.constant[i] = static_cast<A>(scale * sums[c]);
        out.linear[i] = static_cast<A>(scale * rstd * rstd * sums[channels + c]);
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      totals[c] += sums[c];
      totals[channels + c] += sums[channels + c] * norm.rstd[group * norm.channels + c];
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    dbias[c] = static_cast<A>(totals[c]);
    dweight[c] = static_cast<A>(totals[channels + c]);
  }
}

// The coefficients of dx from the sums of each group and channel, and the gradients of weight and bias.
template <typename T>
void take_sums(const Tensor& sum_dz, const Tensor& sum_dz_xhat, InputGradient<T>& out, Wide<T>* dweight,
               Wide<T>* dbias) {
  using A = Wide<T>;
  const Norm<T>& norm = out.pass.norm;
  const int64_t channels = norm.x.channels;
  const std::vector<A> sums = values<A>(sum_dz), products = values<A>(sum_dz_xhat);
  const double per_value = 1.0 / static_cast<double>(norm.rows * norm.repeats);
  std::fill_n(dweight, channels, A{0});
  std::fill_n(dbias, channels, A{0});
  for (int64_t group = 0; group < norm.groups; ++group) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t from = group * channels + c;
      dbias[c] += sums[from];
      dweight[c] += products[from];
      for (int64_t repeat = 0; repeat < norm.repeats; ++repeat) {
        const int64_t i = (group * norm.repeats + repeat) * channels + c;
        const double scale = norm.scale[i] * per_value;
        out.constant[i] = static_cast<A>(scale * sums[from]);
        out.linear[i] = static_cast<A>(scale * norm.rstd[i] * products[from]);
      }
    }
  }
}

void check_like(const char* operation, const char* name, const Tensor& gradient, const Tensor& x) {
  check_tensor(operation, name, gradient, x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> norm_dx_cpu(Tensor dz, Tensor x, Tensor mean, Tensor var,
                                               std::optional<Tensor> weight, Tensor sum_dz, Tensor sum_dz_xhat,
                                               double eps) {
  const std::optional<Tensor> none;
  const Inputs in{x, mean, var, weight, none, none, eps, 0, 0.0, -1, 0.0, 0};
  check("norm_dx", in);
  check_like("norm_dx", "dz", dz, x);
  const ScalarType wide = wide_type(x.scalar_type());
  const int64_t channels = x.size(1), groups = mean.size(0);
  check_tensor("norm_dx", "sum_dz", sum_dz, x, {groups, channels}, wide);
  check_tensor("norm_dx", "sum_dz_xhat", sum_dz_xhat, x, {groups, channels}, wide);
  Tensor dx = empty_like_images(x), dweight = empty(x, {channels}, wide), dbias = empty(x, {channels}, wide);
  dispatch(x.scalar_type(), "norm_dx", [&](auto element) {
    using T = decltype(element);
    using A = Wide<T>;
    const Pixels grad = pixels(dz);
    const Norm<T> norm(in, pixels(x), grad.stride == grad.channels);
    const Backward<T> pass{norm, grad, std::nullopt};
    InputGradient<T> out{.pass = pass,
                         .constant = std::vector<A>(norm.mean.size()),
                         .linear = std::vector<A>(norm.mean.size()),
                         .fixed_stats = false,
                         .dx = static_cast<T*>(dx.data_ptr())};
    take_sums(sum_dz, sum_dz_xhat, out, static_cast<A*>(dweight.data_ptr()), static_cast<A*>(dbias.data_ptr()));
    norm.tasks().run([&](int64_t, int64_t group, int64_t begin, int64_t end) { run(out, group, begin, end); });
  });
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> norm_act_backward_cpu(Tensor dy, std::optional<Tensor> dy2, Tensor x, Tensor mean,
                                                         Tensor var, std::optional<Tensor> weight,
                                                         std::optional<Tensor> bias, std::optional<Tensor> rng,
                                                         double eps, int64_t activation, double slope, int64_t second,
                                                         double dropout, int64_t layer, bool fixed_stats) {
  const Inputs in{x, mean, var, weight, bias, rng, eps, activation, slope, second, dropout, layer};
  check("norm_act_backward", in);
  check_like("norm_act_backward", "dy", dy, x);
  if (dy2) check_like("norm_act_backward", "dy2", *dy2, x);
  FASTP2P_CHECK("norm_act_backward", !dy2 || second >= 0, "got dy2, expected none without a second activation");
  const ScalarType wide = wide_type(x.scalar_type());
  Tensor dx = empty_like_images(x), dweight = empty(x, {x.size(1)}, wide), dbias = empty(x, {x.size(1)}, wide);
  dispatch(x.scalar_type(), "norm_act_backward", [&](auto element) {
    using T = decltype(element);
    using A = Wide<T>;
    const Pixels grad = pixels(dy);
    const std::optional<Pixels> grad2 = dy2 ? std::optional(pixels(*dy2)) : std::nullopt;
    const bool dense = grad.stride == grad.channels && (!grad2 || grad2->stride == grad2->channels);
    const Norm<T> norm(in, pixels(x), dense);
    const Backward<T> pass{norm, grad, grad2};
    const std::vector<double> row_sums =
        sum_tasks(norm.tasks(), 2 * norm.channels, [&](auto... range) { run(pass, range...); });
    InputGradient<T> out{.pass = pass,
                         .constant = std::vector<A>(norm.mean.size()),
                         .linear = std::vector<A>(norm.mean.size()),
                         .fixed_stats = fixed_stats,
                         .dx = static_cast<T*>(dx.data_ptr())};
    finish_sums(row_sums, out, static_cast<A*>(dweight.data_ptr()), static_cast<A*>(dbias.data_ptr()));
    norm.tasks().run([&](int64_t, int64_t group, int64_t begin, int64_t end) { run(out, group, begin, end); });
  });
  return {dx, dweight, dbias};
}

}  // namespace

std::tuple<Tensor, Tensor> dz_in_place(const char* operation, Tensor& dy, const Tensor& x, const NormGate& gate,
                                       int64_t activation, double slope, int64_t stat_groups) {
  FASTP2P_CHECK(operation, gate.var.has_value(), "got gate_mean without gate_var, expected both");
  const Inputs in{x,        *gate.mean, *gate.var, gate.weight, gate.bias,    gate.rng,
                  gate.eps, activation, slope,     gate.second, gate.dropout, gate.layer};
  check(operation, in);
  const int64_t channels = x.size(1), groups = gate.mean->size(0);
  FASTP2P_CHECK(operation, gate.first >= 0 && gate.first + channels == dy.size(1), "got gate ", describe(x), ", first ",
                gate.first, ", expected the channels of the result, ", dy.size(1), ", from first on");
  FASTP2P_CHECK(operation, stat_groups == 0 || stat_groups == groups, "got stat_groups ", stat_groups, ", expected ",
                groups, " as gate_mean has, or 0");
  if (gate.addend) check_like(operation, "addend", *gate.addend, x);
  FASTP2P_CHECK(operation, !gate.addend || gate.second >= 0, "got addend, expected none without a second activation");
  const ScalarType wide = wide_type(x.scalar_type());
  Tensor sum_dz = empty(x, {stat_groups, channels}, wide), sum_dz_xhat = empty(x, {stat_groups, channels}, wide);
  dispatch(x.scalar_type(), operation, [&](auto element) {
    using T = decltype(element);
    using A = Wide<T>;
    Pixels grad = pixels(dy);
    grad.memory = grad.data<T>() + gate.first;
    grad.channels = channels;
    const std::optional<Pixels> addend = gate.addend ? std::optional(pixels(*gate.addend)) : std::nullopt;
    const bool dense = grad.stride == channels && (!addend || addend->stride == channels);
    const Norm<T> norm(in, pixels(x), dense);
    const Backward<T> pass{norm, grad, addend};
    const InPlace<T> in_place{pass};
    const std::vector<double> row_sums =
        sum_tasks(norm.tasks(), 2 * norm.channels, [&](auto... range) { run(in_place, range...); });
    if (stat_groups == 0) return;
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t c = 0; c < channels; ++c) {
        double sum = 0, product = 0;  // the repeats together
        for (int64_t i = c; i < norm.channels; i += channels) {
          sum += row_sums[2 * group * norm.channels + i];
          product += row_sums[(2 * group + 1) * norm.channels + i];
        }
        const int64_t to = group * channels + c;
        static_cast<A*>(sum_dz.data_ptr())[to] = static_cast<A>(sum);
        static_cast<A*>(sum_dz_xhat.data_ptr())[to] = static_cast<A>(product * norm.rstd[group * norm.channels + c]);
      }
    }
  });
  return {sum_dz, sum_dz_xhat};
}

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CPU, m) {
  m.impl("norm_act_backward", TORCH_BOX(&fastp2p::norm_act_backward_cpu));
  m.impl("norm_dx", TORCH_BOX(&fastp2p::norm_dx_cpu));
}
