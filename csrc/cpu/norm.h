// What the passes of a normalisation share: a norm's arguments ready to use, and loops over its rows.
#pragma once

#include "cpu/activation.h"
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

[[maybe_unused]] void check(const char* operation, const Inputs& in) {
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

[[maybe_unused]] Tensor empty_like_images(const Tensor& x) {
  return empty_images(x, x.size(0), x.size(1), x.size(2), x.size(3));
}

}  // namespace
}  // namespace fastp2p
