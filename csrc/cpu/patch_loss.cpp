// patch_loss: the mean of a pointwise loss and its gradient; x and the target are read once, dx is written once.
// Threads take parts of 16384 values. Arithmetic, and sums of at most 32 values, are in float (double for double), the
// rest of the sum in double, and the same bits for any number of threads.
#include "cpu/sums.h"

namespace fastp2p {
namespace {

enum Kind { BCE, SQUARE, HINGE, LINEAR, L1 };

// The loss of one value against t, and its slope there. A NaN stays one.
template <Kind KIND, typename A>
FASTP2P_INLINE A pointwise(A x, A t, A& slope) {
  if constexpr (KIND == BCE) {
    const A e = std::exp(-std::abs(x));
    slope = (x >= 0 ? 1 / (1 + e) : e / (1 + e)) - t;
    return (1 - t) * x + (x >= 0 ? A{0} : -x) + std::log1p(e);  // in this form also for an infinite x
  } else if constexpr (KIND == SQUARE) {
    slope = 2 * (x - t);
    return (x - t) * (x - t);
  } else if constexpr (KIND == HINGE) {
    const A margin = 1 - t * x;
    slope = t * x >= 1 ? A{0} : -t;
    return margin <= 0 ? A{0} : margin;
  } else if constexpr (KIND == LINEAR) {
    slope = -t;
    return -t * x;
  } else {
    slope = static_cast<A>(x > t) - static_cast<A>(x < t);
    return std::abs(x - t);
  }
}

template <typename T, typename Target>
struct PatchLoss {
  using A = Wide<T>;
  const T* x;
  const Target* target;    // may be null: then target_value
  A target_value, weight;  // the weight of one value
  bool through_tanh;
  T* dx;
};

constexpr int64_t LANES = 32, RUN = 1024;  // values summed side by side, and until they are added to a double

template <Kind KIND, bool WITH_TARGET, typename T, typename Target>
FASTP2P_INLINE double sum_range(const PatchLoss<T, Target>& loss, int64_t begin, int64_t end) {
  using A = Wide<T>;
  const T* __restrict x = loss.x;
  const Target* __restrict target = loss.target;
  T* __restrict dx = loss.dx;
  const A target_value = loss.target_value, weight = loss.weight;
  const bool through_tanh = loss.through_tanh;
  const auto value = [&](int64_t i) __attribute__((always_inline)) {
    const A wide = widen(x[i]), t = WITH_TARGET ? static_cast<A>(widen(target[i])) : target_value;
    A slope;
    const A result = pointwise<KIND>(wide, t, slope);
    dx[i] = narrow<T>(slope * weight * (through_tanh ? 1 - wide * wide : A{1}));
    return result;
  };
  double total = 0;
  for (; begin < end; begin += RUN) {
    const int64_t stop = std::min(end, begin + RUN);
    A sums[LANES] = {};
    int64_t i = begin;
    for (; i + LANES <= stop; i += LANES) {
      for (int64_t lane = 0; lane < LANES; ++lane) sums[lane] += value(i + lane);
    }
    for (int64_t lane = 0; i + lane < stop; ++lane) sums[lane] += value(i + lane);
    for (const A sum : sums) total += sum;
  }
  return total;
}

template <Kind KIND, typename T, typename Target>
FASTP2P_INLINE double sum_kind(const PatchLoss<T, Target>& loss, int64_t begin, int64_t end) {
  return loss.target ? sum_range<KIND, true>(loss, begin, end) : sum_range<KIND, false>(loss, begin, end);
}

template <typename T, typename Target>
FASTP2P_INLINE double sum_without_exp(const PatchLoss<T, Target>& loss, int64_t kind, int64_t begin, int64_t end) {
  switch (static_cast<Kind>(kind)) {  // without a default, so that the compiler tells of a kind that is forgotten
    case BCE: break;                  // compute sums it, outside of the clones
    case SQUARE: return sum_kind<SQUARE>(loss, begin, end);
    case HINGE: return sum_kind<HINGE>(loss, begin, end);
    case LINEAR: return sum_kind<LINEAR>(loss, begin, end);
    case L1: return sum_kind<L1>(loss, begin, end);
  }
  return 0;
}

#define INSTANTIATE(CLONES, T, TARGET)                                                            \
  CLONES double run(const PatchLoss<T, TARGET>& loss, int64_t kind, int64_t begin, int64_t end) { \
    return sum_without_exp(loss, kind, begin, end);                                               \
  }
INSTANTIATE(FASTP2P_CLONES, float, float)
INSTANTIATE(FASTP2P_CLONES, BFloat16, float)
INSTANTIATE(FASTP2P_CLONES, BFloat16, BFloat16)
INSTANTIATE(, Half, float)
INSTANTIATE(, Half, Half)
INSTANTIATE(, double, double)
#undef INSTANTIATE

template <typename T, typename Target>
void compute(const Tensor& x, const std::optional<Tensor>& target, int64_t kind, double target_value, double weight,
             bool through_tanh, const Tensor& loss, const Tensor& dx) {
  using A = Wide<T>;
  const double count = static_cast<double>(x.numel());
  const PatchLoss<T, Target> pass{.x = static_cast<const T*>(x.data_ptr()),
                                  .target = target ? static_cast<const Target*>(target->data_ptr()) : nullptr,
                                  .target_value = static_cast<A>(target_value),
                                  .weight = static_cast<A>(weight / count),
                                  .through_tanh = through_tanh,
                                  .dx = static_cast<T*>(dx.data_ptr())};
  const std::vector<double> total =
      sum_tasks({1, x.numel(), 1}, 1, [&](int64_t, int64_t begin, int64_t end, double* sum) {
    // A map of logits is small: its exp and log1p are not vectorised.
    *sum += kind == BCE ? sum_kind<BCE>(pass, begin, end) : run(pass, kind, begin, end);
  });
  *static_cast<A*>(loss.data_ptr()) = static_cast<A>(weight * total[0] / count);
}

}  // namespace

std::tuple<Tensor, Tensor> patch_loss_cpu(Tensor x, std::optional<Tensor> target, int64_t kind, double target_value,
                                          double weight, bool through_tanh) {
  const ScalarType type = x.scalar_type(), wide = wide_type(type);
  FASTP2P_CHECK("patch_loss", x.numel() > 0 && is_computed(type), "got x ", describe(x),
                ", expected elements of Float, BFloat16, Half or Double");
  FASTP2P_CHECK("patch_loss", 0 <= kind && kind <= L1, "got kind ", kind, ", expected 0 to ", int{L1});
  FASTP2P_CHECK(
      "patch_loss",
      !target || (target->device() == x.device() && describe_list(target->sizes()) == describe_list(x.sizes())),
      "got target ", describe(*target), ", expected the shape and device of x ", describe(x));
  // Values are taken in memory's order, for which both must lie alike.
  const bool images = x.dim() == 4 && !x.is_contiguous() && pixel_stride(x) == x.size(1);
  const MemoryFormat format = images ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  const Tensor dense = torch::stable::contiguous(x, format);
  if (target && target->scalar_type() != type && target->scalar_type() != wide)
    target = torch::stable::to(*target, wide);
  if (target) target = torch::stable::contiguous(*target, format);
  const bool same_type = !target || target->scalar_type() == type;

  Tensor loss = empty(x, {}, wide), dx = torch::stable::empty_like(dense);
  dispatch(type, "patch_loss", [&](auto element) {
    using T = decltype(element);
    const auto function = same_type ? compute<T, T> : compute<T, Wide<T>>;
    function(dense, target, kind, target_value, weight, through_tanh, loss, dx);
  });
  if (x.is_contiguous() || images) return {loss, dx};
  Tensor like_x = torch::stable::empty_like(x);
  return {loss, torch::stable::copy_(like_x, dx)};
}

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CPU, m) { m.impl("patch_loss", TORCH_BOX(&fastp2p::patch_loss_cpu)); }
