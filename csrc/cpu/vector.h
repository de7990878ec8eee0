// How CPU kernels are vectorised: plain loops that the compiler vectorises, compiled once for each level of x86-64, the
// best of which the loader chooses at run time. One binary is fast on AVX2 and AVX-512 and right on any machine. Loops
// read local copies, and __restrict ones: after a store gcc would load a struct's members anew, and not vectorise.
#pragma once

#include <cmath>
#include <cstring>

#include "common.h"

// On a function whose loops are hot. What it calls must be FASTP2P_INLINE, or it is not compiled with it. For float and
// bfloat16; float16 and float64, which nobody trains with on a CPU, do without, and the build is shorter for it.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(FASTP2P_SANITIZED)
#define FASTP2P_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTP2P_CLONES
#endif
#define FASTP2P_INLINE inline __attribute__((always_inline))

namespace fastp2p {

// The type of arithmetic for elements stored as T.
template <typename T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;

FASTP2P_INLINE float widen(float x) { return x; }
FASTP2P_INLINE double widen(double x) { return x; }
FASTP2P_INLINE float widen(Half x) { return static_cast<float>(x); }
FASTP2P_INLINE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// Rounds to nearest, ties to even. In integers, without a branch, so that it vectorises.
template <typename T>
FASTP2P_INLINE T narrow(Wide<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return BFloat16(static_cast<uint16_t>(x == x ? rounded : 0x7FC0), BFloat16::from_bits());
  } else {
    return static_cast<T>(x);
  }
}

constexpr int64_t GRAIN = 16384;  // elements worth a task of their own: a few microseconds

// f(group, begin, end) over tasks of about GRAIN elements, each within one group of `rows` rows. The tasks do not
// depend on the number of threads, so neither do sums over them.
struct Tasks {
  int64_t groups, rows, row_size;
  int64_t rows_per_task = std::max<int64_t>(1, GRAIN / std::max<int64_t>(row_size, 1));
  int64_t per_group = (rows + rows_per_task - 1) / rows_per_task;

  int64_t count() const { return groups * per_group; }
  int64_t size_of(int64_t task) const {  // in rows
    return std::min(rows_per_task, rows - task % per_group * rows_per_task);
  }

  template <typename F>
  void run(const F& f) const {
    const int64_t task_size = std::min(rows, rows_per_task) * row_size;
    torch::stable::parallel_for(0, count(), std::max<int64_t>(1, GRAIN / task_size), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % per_group * rows_per_task;
        f(task, task / per_group, first, std::min(rows, first + rows_per_task));
      }
    });
  }
};

}  // namespace fastp2p
