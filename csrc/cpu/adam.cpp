// adam: one pass over param, exp_avg and exp_avg_sq (read and written), grad (read) and the low-precision weights
// (written): 28 or 30 bytes for each parameter, where single-tensor Adam takes some ten passes. Threads take ranges of
// at least 16384 parameters; arithmetic is the parameters' type, the bias corrections are made in double.
#include "checks.h"
#include "cpu/operators.h"
#include "cpu/vector.h"

namespace fastp2p {
namespace {

template <typename A, typename Low>
struct Adam {
  A *param, *exp_avg, *exp_avg_sq;
  const A* grad;
  Low* low;  // may be null
  A beta1, beta2, one_minus_beta1, one_minus_beta2, eps, step_size, root_correction2;
};

template <typename A, typename Low>
FASTP2P_INLINE void update(const Adam<A, Low>& adam, int64_t begin, int64_t end) {
  A* __restrict param = adam.param;
  A* __restrict exp_avg = adam.exp_avg;
  A* __restrict exp_avg_sq = adam.exp_avg_sq;
  const A* __restrict grad = adam.grad;
  Low* __restrict low = adam.low;
  const A beta1 = adam.beta1, beta2 = adam.beta2, one_minus_beta1 = adam.one_minus_beta1,
          one_minus_beta2 = adam.one_minus_beta2;
  const A eps = adam.eps, step_size = adam.step_size, root_correction2 = adam.root_correction2;
  const auto updated = [&](int64_t i) __attribute__((always_inline)) {
    const A m = exp_avg[i] * beta1 + grad[i] * one_minus_beta1,
            v = exp_avg_sq[i] * beta2 + one_minus_beta2 * grad[i] * grad[i];
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    return param[i] - m / (std::sqrt(v) / root_correction2 + eps) * step_size;
  };
  if (low == nullptr) {
    for (int64_t i = begin; i < end; ++i) param[i] = updated(i);
  } else {
    for (int64_t i = begin; i < end; ++i) {
      const A p = updated(i);
      param[i] = p;
      low[i] = narrow<Low>(static_cast<Wide<Low>>(p));
    }
  }
}

#define INSTANTIATE(CLONES, A, LOW) \
  CLONES void run(const Adam<A, LOW>& adam, int64_t begin, int64_t end) { update(adam, begin, end); }
INSTANTIATE(FASTP2P_CLONES, float, BFloat16)
INSTANTIATE(, float, Half)
INSTANTIATE(, double, BFloat16)
INSTANTIATE(, double, Half)
#undef INSTANTIATE

template <typename A, typename Low>
void step(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq, double lr,
          const std::vector<double>& powers, double beta1, double beta2, double eps, const std::optional<Tensor>& low) {
  const auto data = [](const Tensor& t) { return static_cast<A*>(t.data_ptr()); };
  const Adam<A, Low> adam{.param = data(param),
                          .exp_avg = data(exp_avg),
                          .exp_avg_sq = data(exp_avg_sq),
                          .grad = data(grad),
                          .low = low ? static_cast<Low*>(low->data_ptr()) : nullptr,
                          .beta1 = static_cast<A>(beta1),
                          .beta2 = static_cast<A>(beta2),
                          .one_minus_beta1 = static_cast<A>(1 - beta1),
                          .one_minus_beta2 = static_cast<A>(1 - beta2),
                          .eps = static_cast<A>(eps),
                          .step_size = static_cast<A>(lr / static_cast<A>(1 - powers[0])),
                          .root_correction2 = std::sqrt(static_cast<A>(1 - powers[1]))};
  torch::stable::parallel_for(0, param.numel(), GRAIN, [&](int64_t begin, int64_t end) { run(adam, begin, end); });
}

}  // namespace

void adam_cpu(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor lr, Tensor powers, double beta1,
              double beta2, double eps, std::optional<Tensor> low_precision) {
  check_adam(param, grad, exp_avg, exp_avg_sq, lr, powers, low_precision);
  const double rate = lr.scalar_type() == ScalarType::Double ? values<double>(lr)[0] : values<float>(lr)[0];
  dispatch_adam(param, low_precision, [&](auto wide, auto low) {
    step<decltype(wide), decltype(low)>(param, grad, exp_avg, exp_avg_sq, rate, values<double>(powers), beta1, beta2,
                                        eps, low_precision);
  });
}

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CPU, m) { m.impl("adam", TORCH_BOX(&fastp2p::adam_cpu)); }
