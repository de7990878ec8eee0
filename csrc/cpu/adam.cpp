// adam: one pass over param, exp_avg and exp_avg_sq (read and written), grad (read) and the low-precision weights
// (written): 26 to 30 bytes for each parameter. Threads take ranges of
// at least 16384 parameters; arithmetic is the parameters' type, the bias corrections are made in double.
#include "cpu/adam.h"

#include "checks.h"
#include "cpu/operators.h"
#include "cpu/vector.h"

namespace fastp2p {
namespace {

template <typename A, typename Grad, typename Low>
struct Range {
  A *param, *exp_avg, *exp_avg_sq;
  const Grad* grad;
  Low* low;  // may be null
  int64_t size;
  A beta1, beta2, one_minus_beta1, one_minus_beta2, eps, step_size, root_correction2, unscale;
};

template <typename A, typename Grad, typename Low>
FASTP2P_INLINE void update_range(const Range<A, Grad, Low>& range) {
  A* __restrict param = range.param;
  A* __restrict exp_avg = range.exp_avg;
  A* __restrict exp_avg_sq = range.exp_avg_sq;
  const Grad* __restrict grad = range.grad;
  Low* __restrict low = range.low;
  const int64_t size = range.size;
  const A beta1 = range.beta1, beta2 = range.beta2, one_minus_beta1 = range.one_minus_beta1,
          one_minus_beta2 = range.one_minus_beta2;
  const A eps = range.eps, step_size = range.step_size, root_correction2 = range.root_correction2,
          unscale = range.unscale;
  const auto updated = [&](int64_t i) __attribute__((always_inline)) {
    const A g = widen(grad[i]) * unscale, m = exp_avg[i] * beta1 + g * one_minus_beta1,
            v = exp_avg_sq[i] * beta2 + one_minus_beta2 * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    return param[i] - m / (std::sqrt(v) / root_correction2 + eps) * step_size;
  };
  if (low == nullptr) {
    for (int64_t i = 0; i < size; ++i) param[i] = updated(i);
  } else {
    for (int64_t i = 0; i < size; ++i) {
      const A p = updated(i);
      param[i] = p;
      low[i] = narrow<Low>(static_cast<Wide<Low>>(p));
    }
  }
}

// What training on a CPU uses is compiled for each instruction set; the rest once, for the sake of the build's time.
#define INSTANTIATE(CLONES, A, GRAD, LOW) \
  CLONES void run(const Range<A, GRAD, LOW>& range) { update_range(range); }
INSTANTIATE(FASTP2P_CLONES, float, float, BFloat16)
INSTANTIATE(FASTP2P_CLONES, float, BFloat16, BFloat16)
INSTANTIATE(, float, Half, BFloat16)
INSTANTIATE(, float, float, Half)
INSTANTIATE(, float, BFloat16, Half)
INSTANTIATE(, float, Half, Half)
INSTANTIATE(, double, double, BFloat16)
INSTANTIATE(, double, double, Half)
#undef INSTANTIATE

double scalar(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? values<double>(t)[0] : values<float>(t)[0];
}

}  // namespace

AdamStep::AdamStep(const Tensor& param, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& lr,
                   const Tensor& powers, double beta1, double beta2, double eps,
                   const std::optional<Tensor>& low_precision, const std::optional<Tensor>& unscale)
    : type_(param.scalar_type()), low_type_(low_precision ? low_type(*low_precision) : ScalarType::BFloat16),
      param_(param.data_ptr()), exp_avg_(exp_avg.data_ptr()), exp_avg_sq_(exp_avg_sq.data_ptr()),
      low_(low_precision ? low_precision->data_ptr() : nullptr), lr_(scalar(lr)), power1_(values<double>(powers)[0]),
      power2_(values<double>(powers)[1]), beta1_(beta1), beta2_(beta2), eps_(eps),
      unscale_(unscale ? scalar(*unscale) : 1) {}

void AdamStep::update(const void* grad, ScalarType grad_type, int64_t n, int64_t element, int64_t low_element) const {
  dispatch_adam(type_, grad_type, low_type_, [&](auto wide, auto gradient, auto low) {
    using A = decltype(wide);
    using Low = decltype(low);
    const auto at = [&](void* data) { return static_cast<A*>(data) + element; };
    run(Range<A, decltype(gradient), Low>{.param = at(param_),
                                          .exp_avg = at(exp_avg_),
                                          .exp_avg_sq = at(exp_avg_sq_),
                                          .grad = static_cast<const decltype(gradient)*>(grad),
                                          .low = low_ == nullptr ? nullptr : static_cast<Low*>(low_) + low_element,
                                          .size = n,
                                          .beta1 = static_cast<A>(beta1_),
                                          .beta2 = static_cast<A>(beta2_),
                                          .one_minus_beta1 = static_cast<A>(1 - beta1_),
                                          .one_minus_beta2 = static_cast<A>(1 - beta2_),
                                          .eps = static_cast<A>(eps_),
                                          .step_size = static_cast<A>(lr_ / static_cast<A>(1 - power1_)),
                                          .root_correction2 = std::sqrt(static_cast<A>(1 - power2_)),
                                          .unscale = static_cast<A>(unscale_)});
  });
}

void adam_cpu(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor lr, Tensor powers, double beta1,
              double beta2, double eps, std::optional<Tensor> low_precision, std::optional<Tensor> unscale) {
  check_adam(param, grad, exp_avg, exp_avg_sq, lr, powers, low_precision, unscale);
  const AdamStep step(param, exp_avg, exp_avg_sq, lr, powers, beta1, beta2, eps, low_precision, unscale);
  if (step.skips()) return;
  const ScalarType type = grad.scalar_type();
  const char* data = static_cast<const char*>(grad.data_ptr());
  const int64_t element = static_cast<int64_t>(grad.element_size());
  torch::stable::parallel_for(0, param.numel(), GRAIN, [&](int64_t begin, int64_t end) {
    step.update(data + begin * element, type, end - begin, begin, begin);
  });
}

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CPU, m) { m.impl("adam", TORCH_BOX(&fastp2p::adam_cpu)); }
