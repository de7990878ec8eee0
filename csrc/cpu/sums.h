// Sums over rows that are the same bits for any number of threads.
#pragma once

#include "cpu/vector.h"

namespace fastp2p {

constexpr int64_t BLOCK = 256;      // channels taken at once, so that their sums stay in the cache
constexpr int64_t FLOAT_ROWS = 32;  // rows summed in the type of arithmetic before they are added to a double

// f(group, begin, end, sums) adds its rows to `size` doubles; the sums of each group: (groups, size).
template <typename F>
std::vector<double> sum_tasks(const Tasks& tasks, int64_t size, const F& f) {
  std::vector<double> partial(tasks.count() * size), total(tasks.groups * size);
  tasks.run([&](int64_t task, int64_t group, int64_t begin, int64_t end) {
    f(group, begin, end, partial.data() + task * size);
  });
  for (int64_t task = 0; task < tasks.count(); ++task) {
    double* group_total = total.data() + task / tasks.per_group * size;
    for (int64_t i = 0; i < size; ++i) group_total[i] += partial[task * size + i];
  }
  return total;
}

}  // namespace fastp2p
