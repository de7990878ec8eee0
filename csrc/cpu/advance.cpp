// advance: a few hundred numbers, in one call instead of eight; one thread.
#include "cpu/operators.h"

namespace fastp2p {

void advance_cpu(Tensor steps, Tensor powers, Tensor betas, Tensor firsts, Tensor counters, Tensor increments,
                 int64_t images) {
  const int64_t adams = powers.dim() == 2 ? powers.size(0) : 0, n = steps.numel(), k = counters.numel();
  check_tensor("advance", "steps", steps, steps, {n}, ScalarType::Float);
  check_tensor("advance", "powers", powers, steps, {adams, 2}, ScalarType::Double);
  check_tensor("advance", "betas", betas, steps, {adams, 2}, ScalarType::Double);
  check_tensor("advance", "firsts", firsts, steps, {adams}, ScalarType::Long);
  check_tensor("advance", "counters", counters, steps, {k}, ScalarType::Long);
  check_tensor("advance", "increments", increments, steps, {2, k}, ScalarType::Long);
  FASTP2P_CHECK("advance", steps.is_contiguous() && powers.is_contiguous() && counters.is_contiguous(), "got steps ",
                describe(steps), ", powers ", describe(powers), ", counters ", describe(counters),
                ", expected them contiguous");
  const std::vector<double> bases = values<double>(betas);
  const std::vector<int64_t> places = values<int64_t>(firsts), gains = values<int64_t>(increments);
  for (const int64_t place : places)
    FASTP2P_CHECK("advance", place >= 0 && place < n, "got a first of ", place, ", expected one of ", n, " steps");

  float* const step = static_cast<float*>(steps.data_ptr());
  for (int64_t i = 0; i < n; ++i) step[i] += 1;
  double* const power = static_cast<double*>(powers.data_ptr());
  for (int64_t i = 0; i < 2 * adams; ++i) power[i] = std::pow(bases[i], static_cast<double>(step[places[i / 2]]));
  int64_t* const counter = static_cast<int64_t*>(counters.data_ptr());
  for (int64_t i = 0; i < k; ++i) counter[i] += gains[i] + images * gains[k + i];
}

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CPU, m) { m.impl("advance", TORCH_BOX(&fastp2p::advance_cpu)); }
