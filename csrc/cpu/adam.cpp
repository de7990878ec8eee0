// adam: one pass over param, exp_avg and exp_avg_sq (read and written), grad (read) and the low-precision weights
// (written): 28 or 30 bytes for each parameter. Single-tensor Adam takes some ten passes.
#include "cpu/operators.h"
#include "cpu/vector.h"

namespace fastp2p {
namespace {

template <typename A, typename Low>
struct Adam {
  A *param, *exp_avg, *exp_avg_sq;
  const A* grad;
  Low* low;                                                          // may be null
  A beta1, beta2, other1, other2, eps, step_size, root_correction2;  // other = 1 - beta
};

template <typename A, typename Low>
FASTP2P_INLINE void update(const Adam<A, Low>& adam, int64_t begin, int64_t end) {
  A* __restrict param = adam.param;
  A* __restrict exp_avg = adam.exp_avg;
  A* __restrict exp_avg_sq = adam.exp_avg_sq;
  const A* __restrict grad = adam.grad;
  Low* __restrict low = adam.low;
  const A beta1 = adam.beta1, beta2 = adam.beta2, other1 = adam.other1, other2 = adam.other2;
  const A eps = adam.eps, step_size = adam.step_size, root_correction2 = adam.root_correction2;
  const auto updated = [&](int64_t i) __attribute__((always_inline)) {
    const A m = exp_avg[i] * beta1 + grad[i] * other1, v = exp_avg_sq[i] * beta2 + grad[i] * grad[i] * other2;
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
  Adam<A, Low> adam{data(param),
                    data(exp_avg),
                    data(exp_avg_sq),
                    data(grad),
                    low ? static_cast<Low*>(low->data_ptr()) : nullptr,
                    static_cast<A>(beta1),
                    static_cast<A>(beta2),
                    static_cast<A>(1 - beta1),
                    static_cast<A>(1 - beta2),
                    static_cast<A>(eps),
                    static_cast<A>(lr / static_cast<A>(1 - powers[0])),
                    std::sqrt(static_cast<A>(1 - powers[1]))};
  torch::stable::parallel_for(0, param.numel(), GRAIN, [&](int64_t begin, int64_t end) { run(adam, begin, end); });
}

}  // namespace

void adam_cpu(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor lr, Tensor powers, double beta1,
              double beta2, double eps, std::optional<Tensor> low_precision) {
  const ScalarType type = param.scalar_type();
  const bool is_double = type == ScalarType::Double;
  const int64_t m = param.numel();
  FASTP2P_CHECK("adam", is_double || type == ScalarType::Float, "got param ", describe(param),
                ", expected Float or Double");
  for (const Tensor& t : {param, grad, exp_avg, exp_avg_sq}) {
    FASTP2P_CHECK("adam", t.is_cpu() && has_shape(t, {m}) && t.is_contiguous() && t.scalar_type() == type, "got ",
                  describe(t), ", expected contiguous (", m, ") ", type, " on the CPU");
  }
  const bool half = low_precision && low_precision->scalar_type() == ScalarType::Half;
  FASTP2P_CHECK(
      "adam",
      !low_precision || (low_precision->is_cpu() && has_shape(*low_precision, {m}) && low_precision->is_contiguous() &&
                         (half || low_precision->scalar_type() == ScalarType::BFloat16)),
      "got low_precision ", describe(*low_precision), ", expected contiguous (", m, ") BFloat16 or Half on the CPU");
  FASTP2P_CHECK("adam",
                lr.is_cpu() && lr.numel() == 1 &&
                    (lr.scalar_type() == ScalarType::Float || lr.scalar_type() == ScalarType::Double),
                "got lr ", describe(lr), ", expected () Float on the CPU");
  FASTP2P_CHECK("adam", powers.is_cpu() && has_shape(powers, {2}) && powers.scalar_type() == ScalarType::Double,
                "got powers ", describe(powers), ", expected (2) Double on the CPU");
  const double rate = lr.scalar_type() == ScalarType::Double ? values<double>(lr)[0] : values<float>(lr)[0];
  const auto take = is_double ? (half ? step<double, Half> : step<double, BFloat16>)
                              : (half ? step<float, Half> : step<float, BFloat16>);
  take(param, grad, exp_avg, exp_avg_sq, rate, values<double>(powers), beta1, beta2, eps, low_precision);
}

}  // namespace fastp2p
