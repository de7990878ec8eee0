// norm_act and its gradient. Forward reads x once and writes one or two results. Backward reads x and the gradients
// twice, for the two sums of each channel and for dx, and recomputes the activation rather than keep it: forward moves
// 2 elements for each (3 with a second result), backward 5 (7). Threads take parts of some 16384 elements. Arithmetic
// is in float (double for double); sums of at most 32 rows are float, their sums double. Eager PyTorch takes a pass
// each for normalisation, activation and dropout, and the second activation another.
#include "cpu/activation.h"
#include "cpu/operators.h"
#include "cpu/philox.h"
#include "cpu/sums.h"

namespace fastp2p {
namespace {

struct Inputs {
  const Tensor &x, &mean, &var;
  const std::optional<Tensor>&weight, &bias, &rng;
  double eps;
  int64_t activation;
  double slope;
  int64_t second;
  double dropout;
  int64_t layer;
};

// The arguments that both directions share, ready to use: x as rows, coefficients of each group and channel. Where few
// channels lie dense, a row is several pixels and the coefficients are repeated, so that loops are long enough.
template <typename T>
struct Norm {
  using A = Wide<T>;

  Norm(const Inputs& in, Pixels images, bool others_are_dense)
      : groups(in.mean.size(0)), x(images), first(in.activation, in.slope),
        second(std::max<int64_t>(in.second, 0), in.slope), has_second(in.second >= 0) {
    const int64_t pixels = x.count / groups;
    if (x.stride == x.channels && others_are_dense) {
      while (pixels % (2 * repeats) == 0 && 2 * repeats * x.channels <= BLOCK) repeats *= 2;
    }
    channels = x.channels * repeats;
    rows = pixels / repeats;
    stride = x.stride * repeats;
    const std::vector<A> means = values<A>(in.mean), vars = values<A>(in.var);
    const std::vector<A> weight = in.weight ? values<A>(*in.weight) : std::vector<A>(x.channels, 1);
    const std::vector<A> bias = in.bias ? values<A>(*in.bias) : std::vector<A>(x.channels, 0);
    for (std::vector<A>* list : {&mean, &rstd, &scale}) list->resize(groups * channels);
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t repeat = 0; repeat < repeats; ++repeat) {
        const int64_t to = group * channels + repeat * x.channels, from = group * x.channels;
        for (int64_t c = 0; c < x.channels; ++c) {
          mean[to + c] = means[from + c];
          rstd[to + c] = 1 / std::sqrt(vars[from + c] + static_cast<A>(in.eps));
          scale[to + c] = rstd[to + c] * weight[c];
        }
      }
    }
    for (int64_t repeat = 0; repeat < repeats; ++repeat) shift.insert(shift.end(), bias.begin(), bias.end());
    if (in.rng && in.dropout > 0) {
      const std::vector<int64_t> rng = values<int64_t>(*in.rng);
      dropout = {in.dropout, static_cast<uint64_t>(rng[0]), static_cast<uint32_t>(rng[1]),
                 static_cast<uint32_t>(in.layer)};
    }
  }

  Tasks tasks() const { return {groups, rows, channels}; }
  int64_t first_row(int64_t group) const { return group * rows; }

  int64_t groups;
  Pixels x;
  int64_t repeats = 1, channels, rows, stride;  // pixels in a row, their channels, rows of a group
  std::vector<A> mean, rstd, scale, shift;      // (groups, channels), but for shift, (channels)
  Activation<A> first, second;
  bool has_second;
  Dropout dropout;
};

// How a loop is compiled: with what it may have to do, and how many rows it takes at a time, so that the coefficients,
// or the sums, are loaded once for several rows.
template <bool TANH, bool DROPOUT, bool SECOND, int ROWS>
struct Variant {
  static constexpr bool tanh = TANH, dropout = DROPOUT, second = SECOND;
  static constexpr int rows = ROWS;
};

// f(variant, begin) for [begin, begin + variant.rows), until all rows are done. What is slow anyway, or hardly used,
// takes single rows: tanh and dropout, float16 and float64. So the build is shorter.
template <typename T, typename F>
FASTP2P_INLINE void for_rows(const Norm<T>& norm, bool with_second, int64_t begin, int64_t end, const F& f) {
  constexpr bool trained_with = std::is_same_v<T, float> || std::is_same_v<T, BFloat16>;
  const auto take = [&](auto second) __attribute__((always_inline)) {
    if constexpr (trained_with) {
      if (!norm.first.tanh && !norm.second.tanh) {
        if (norm.dropout.probability > 0) {
          for (; begin < end; ++begin) f(Variant<false, true, second, 1>(), begin);
          return;
        }
        for (; begin + 4 <= end; begin += 4) f(Variant<false, false, second, 4>(), begin);
        for (; begin < end; ++begin) f(Variant<false, false, second, 1>(), begin);
        return;
      }
    }
    for (; begin < end; ++begin) f(Variant<true, true, second, 1>(), begin);
  };
  with_second ? take(std::true_type()) : take(std::false_type());
}

// The coefficients of a block of channels, and which elements dropout keeps, for the rows that a Variant takes.
template <typename T, typename V>
struct Block {
  using A = Wide<T>;

  FASTP2P_INLINE Block(const Norm<T>& norm, int64_t group, int64_t row, int64_t c0)
      : first(norm.first), second(norm.second), mean(norm.mean.data() + group * norm.channels + c0),
        scale(norm.scale.data() + group * norm.channels + c0), shift(norm.shift.data() + c0),
        x(norm.x.template data<T>() + row * norm.stride + c0), stride(norm.stride) {
    if constexpr (V::dropout) {
      const int64_t n = std::min(BLOCK, norm.channels - c0);
      for (int r = 0; r < V::rows; ++r) norm.dropout.factors((row + r) * norm.channels + c0, n, factor[r]);
    }
  }

  FASTP2P_INLINE A deviation(int r, int64_t c) const { return widen(x[r * stride + c]) - mean[c]; }
  FASTP2P_INLINE A z(int r, int64_t c) const { return deviation(r, c) * scale[c] + shift[c]; }
  FASTP2P_INLINE A keep(int r, int64_t c) const { return V::dropout ? factor[r][c] : A{1}; }

  const Activation<A> first, second;
  const A* __restrict mean, * __restrict scale, * __restrict shift;
  const T* __restrict x;
  const int64_t stride;
  A factor[V::dropout ? V::rows : 1][V::dropout ? BLOCK : 1];
};

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

// Adds the rows' sums of dz and of dz * (x - mean), for each channel, to sums[0] and sums[channels] on.
template <typename T>
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
            const A dz = block.dz(r, c);
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

#define INSTANTIATE(CLONES, T)                                                                        \
  CLONES void run(const Forward<T>& pass, int64_t group, int64_t begin, int64_t end) {                \
    forward_rows(pass, group, begin, end);                                                            \
  }                                                                                                   \
  CLONES void run(const Backward<T>& pass, int64_t group, int64_t begin, int64_t end, double* sums) { \
    sum_rows(pass, group, begin, end, sums);                                                          \
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

void check(const char* operation, const Inputs& in) {
  check_images(operation, "x", in.x);
  const ScalarType wide = wide_type(in.x.scalar_type());
  const int64_t channels = in.x.size(1), groups = in.mean.dim() == 2 ? in.mean.size(0) : 0;
  FASTP2P_CHECK(operation, groups > 0 && in.x.size(0) % groups == 0, "got mean ", describe(in.mean),
                ", expected (G, C) with G a divisor of ", in.x.size(0), " images");
  check_tensor(operation, "mean", in.mean, in.x, {groups, channels}, wide);
  check_tensor(operation, "var", in.var, in.x, {groups, channels}, wide);
  if (in.weight) check_tensor(operation, "weight", *in.weight, in.x, {channels}, wide);
  if (in.bias) check_tensor(operation, "bias", *in.bias, in.x, {channels}, wide);
  if (in.rng) check_tensor(operation, "rng", *in.rng, in.x, {2}, ScalarType::Long);
  FASTP2P_CHECK(operation, is_activation(in.activation) && (in.second == -1 || is_activation(in.second)),
                "got activation ", in.activation, ", second ", in.second, ", expected 0 to 3, -1 to 3");
  FASTP2P_CHECK(operation, in.dropout >= 0 && in.dropout < 1, "got dropout ", in.dropout, ", expected 0 to below 1");
  FASTP2P_CHECK(operation, 0 <= in.layer && in.layer <= 0xFFFFFFFF, "got layer ", in.layer, ", expected 0 to 2^32 - 1");
}

void check_gradient(const char* name, const Tensor& gradient, const Tensor& x) {
  check_tensor("norm_act_backward", name, gradient, x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
}

Tensor empty_like_images(const Tensor& x) { return empty_images(x, x.size(0), x.size(1), x.size(2), x.size(3)); }

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

std::tuple<Tensor, Tensor, Tensor> norm_act_backward_cpu(Tensor dy, std::optional<Tensor> dy2, Tensor x, Tensor mean,
                                                         Tensor var, std::optional<Tensor> weight,
                                                         std::optional<Tensor> bias, std::optional<Tensor> rng,
                                                         double eps, int64_t activation, double slope, int64_t second,
                                                         double dropout, int64_t layer, bool fixed_stats) {
  const Inputs in{x, mean, var, weight, bias, rng, eps, activation, slope, second, dropout, layer};
  check("norm_act_backward", in);
  check_gradient("dy", dy, x);
  if (dy2) check_gradient("dy2", *dy2, x);
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

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&fastp2p::norm_act_cpu));
  m.impl("norm_act_backward", TORCH_BOX(&fastp2p::norm_act_backward_cpu));
}
