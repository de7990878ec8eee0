// norm_stats: x is read once from memory and twice from the cache, for the mean of some 16384 elements and then for
// their deviations from it; threads take such parts, whose (mean, M2) are merged by Chan's formula. Sums of at most 32
// rows are in the type of arithmetic, float or double, the rest in double, and the same bits for any number of threads.
#include "cpu/operators.h"
#include "cpu/sums.h"

namespace fastp2p {
namespace {

// mean and M2 of each channel over a task's rows, to out[0] and out[channels] on.
template <typename T>
FASTP2P_INLINE void task_stats(const Pixels& x, int64_t begin, int64_t end, double* out) {
  using A = Wide<T>;
  for (int64_t c0 = 0; c0 < x.channels; c0 += BLOCK) {
    const int64_t n = std::min(BLOCK, x.channels - c0);
    double sum[BLOCK] = {}, m2[BLOCK] = {};
    A mean[BLOCK];
    const auto add_rows = [&](double* total, auto term) __attribute__((always_inline)) {
      for (int64_t row = begin; row < end; row += FLOAT_ROWS) {
        const int64_t stop = std::min(end, row + FLOAT_ROWS);
        A part[BLOCK] = {};
        int64_t m = row;
        for (; m + 4 <= stop; m += 4) {  // four rows to one load and store of the sums
          const T* __restrict p0 = x.data<T>() + m * x.stride + c0;
          const T* __restrict p1 = p0 + x.stride;
          const T* __restrict p2 = p1 + x.stride;
          const T* __restrict p3 = p2 + x.stride;
          for (int64_t c = 0; c < n; ++c) {
            part[c] +=
                (term(widen(p0[c]), c) + term(widen(p1[c]), c)) + (term(widen(p2[c]), c) + term(widen(p3[c]), c));
          }
        }
        for (; m < stop; ++m) {
          const T* __restrict pixel = x.data<T>() + m * x.stride + c0;
          for (int64_t c = 0; c < n; ++c) part[c] += term(widen(pixel[c]), c);
        }
        for (int64_t c = 0; c < n; ++c) total[c] += part[c];
      }
    };
    const T* origin = x.data<T>() + begin * x.stride + c0;  // values minus the first one: small where the mean is large
    A first[BLOCK];
    for (int64_t c = 0; c < n; ++c) first[c] = widen(origin[c]);
    add_rows(sum, [&](A value, int64_t c) __attribute__((always_inline)) { return value - first[c]; });
    const double count = static_cast<double>(end - begin), per_row = 1 / count;
    for (int64_t c = 0; c < n; ++c) mean[c] = static_cast<A>(first[c] + sum[c] * per_row);
    add_rows(m2,
             [&](A value, int64_t c) __attribute__((always_inline)) { return (value - mean[c]) * (value - mean[c]); });
    for (int64_t c = 0; c < n; ++c) {
      const double exact = first[c] + sum[c] * per_row,
                   correction = exact - mean[c];  // the deviations were from the rounded mean
      out[c0 + c] = exact;
      out[x.channels + c0 + c] = std::max(0.0, m2[c] - count * correction * correction);
    }
  }
}

#define INSTANTIATE(CLONES, T) \
  CLONES void run(T, const Pixels& x, int64_t begin, int64_t end, double* out) { task_stats<T>(x, begin, end, out); }
INSTANTIATE(FASTP2P_CLONES, float)
INSTANTIATE(FASTP2P_CLONES, BFloat16)
INSTANTIATE(, Half)
INSTANTIATE(, double)
#undef INSTANTIATE

// Merges the parts of each group, in their order.
template <typename A>
void merge(const Tasks& tasks, int64_t channels, const std::vector<double>& parts, A* mean, A* var) {
  for (int64_t group = 0; group < tasks.groups; ++group) {
    std::vector<double> merged_mean(channels), m2(channels);
    double count = 0;
    for (int64_t task = group * tasks.per_group; task < (group + 1) * tasks.per_group; ++task) {
      const double n = static_cast<double>(tasks.size_of(task)), total = count + n;
      const double share = n / total, weight = count * share;
      const double *part_mean = parts.data() + 2 * task * channels, *part_m2 = part_mean + channels;
      for (int64_t c = 0; c < channels; ++c) {
        const double delta = part_mean[c] - merged_mean[c];
        merged_mean[c] += delta * share;
        m2[c] += part_m2[c] + delta * delta * weight;
      }
      count = total;
    }
    for (int64_t c = 0; c < channels; ++c) {
      mean[group * channels + c] = static_cast<A>(merged_mean[c]);
      var[group * channels + c] = static_cast<A>(m2[c] / count);
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor> norm_stats_cpu(Tensor x, int64_t stat_groups) {
  check_images("norm_stats", "x", x);
  FASTP2P_CHECK("norm_stats", stat_groups >= 0 && (stat_groups == 0 || x.size(0) % stat_groups == 0),
                "got stat_groups ", stat_groups, ", expected 0 or a divisor of ", x.size(0), " images");
  const ScalarType wide = wide_type(x.scalar_type());
  Tensor mean = empty(x, {stat_groups, x.size(1)}, wide), var = empty(x, {stat_groups, x.size(1)}, wide);
  if (stat_groups == 0) return {mean, var};
  const Pixels rows = pixels(x);
  const Tasks tasks{stat_groups, rows.count / stat_groups, rows.channels};
  std::vector<double> parts(tasks.count() * 2 * rows.channels);
  dispatch(x.scalar_type(), "norm_stats", [&](auto element) {
    using A = Wide<decltype(element)>;
    tasks.run([&](int64_t task, int64_t group, int64_t begin, int64_t end) {
      const int64_t first = group * tasks.rows;
      run(element, rows, first + begin, first + end, parts.data() + task * 2 * rows.channels);
    });
    merge(tasks, rows.channels, parts, static_cast<A*>(mean.data_ptr()), static_cast<A*>(var.data_ptr()));
  });
  return {mean, var};
}

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CPU, m) { m.impl("norm_stats", TORCH_BOX(&fastp2p::norm_stats_cpu)); }
