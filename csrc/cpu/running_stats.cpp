// running_stats: a few hundred elements, in one call instead of five for each group; one thread.
#include "cpu/operators.h"

namespace fastp2p {
namespace {

template <typename A>
void update(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean, const Tensor& var,
            double momentum, double unbiased) {
  const std::vector<A> means = values<A>(mean), vars = values<A>(var);
  A* running[] = {static_cast<A*>(running_mean.data_ptr()), static_cast<A*>(running_var.data_ptr())};
  const int64_t channels = running_mean.numel();
  for (size_t i = 0; i < means.size(); ++i) {
    A &old_mean = running[0][i % channels], &old_var = running[1][i % channels];
    old_mean = old_mean * static_cast<A>(1 - momentum) + means[i] * static_cast<A>(momentum);
    old_var = old_var * static_cast<A>(1 - momentum) + vars[i] * static_cast<A>(momentum * unbiased);
  }
}

}  // namespace

void running_stats_cpu(Tensor running_mean, Tensor running_var, Tensor mean, Tensor var, int64_t n_values,
                       double momentum) {
  const ScalarType type = wide_type(running_mean.scalar_type());
  const int64_t channels = running_mean.numel(), groups = mean.dim() == 2 ? mean.size(0) : 0;
  check_tensor("running_stats", "running_mean", running_mean, running_mean, {channels}, type);
  check_tensor("running_stats", "running_var", running_var, running_mean, {channels}, type);
  check_tensor("running_stats", "mean", mean, running_mean, {groups, channels}, type);
  check_tensor("running_stats", "var", var, running_mean, {groups, channels}, type);
  FASTP2P_CHECK("running_stats", running_mean.is_contiguous() && running_var.is_contiguous(), "got running_mean ",
                describe(running_mean), ", running_var ", describe(running_var), ", expected them contiguous");
  FASTP2P_CHECK("running_stats", n_values >= 2, "got ", n_values, " values per channel, expected 2 or more");
  const double unbiased = static_cast<double>(n_values) / static_cast<double>(n_values - 1);
  const auto kernel = type == ScalarType::Double ? update<double> : update<float>;
  kernel(running_mean, running_var, mean, var, momentum, unbiased);
}

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CPU, m) { m.impl("running_stats", TORCH_BOX(&fastp2p::running_stats_cpu)); }
