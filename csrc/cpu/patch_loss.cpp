// patch_loss: the mean of a pointwise loss and its gradient; x, the target and the addend are read once, dx is written
// once. The channels' sums of dx, where they are wanted, are a second pass, over what lies in the cache or is small.
// Threads take parts of 16384 values. Arithmetic, and sums of at most 32 values, are in float (double for double), the
// rest of the sum in double, and the same bits for any number of threads.
#include "cpu/operators.h"
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
  const T* addend;         // may be null
  A target_value, weight;  // the weight of one value's slope
  bool through_tanh;
  T* dx;
};

constexpr int64_t LANES = 32, RUN = 1024;  // values summed side by side, and until they are added to a double

template <Kind KIND, bool WITH_TARGET, bool WITH_ADDEND, typename T, typename Target>
FASTP2P_INLINE double sum_range(const PatchLoss<T, Target>& loss, int64_t begin, int64_t end) {
  using A = Wide<T>;
  const T* __restrict x = loss.x;
  const Target* __restrict target = loss.target;
  const T* __restrict addend = loss.addend;
  T* __restrict dx = loss.dx;
  const A target_value = loss.target_value, weight = loss.weight;
  const bool through_tanh = loss.through_tanh;
  const auto value = [&](int64_t i) __attribute__((always_inline)) {
    const A wide = widen(x[i]), t = WITH_TARGET ? static_cast<A>(widen(target[i])) : target_value;
    A slope;
    const A result = pointwise<KIND>(wide, t, slope);
    const A change = slope * weight * (through_tanh ? 1 - wide * wide : A{1});
    dx[i] = narrow<T>(WITH_ADDEND ? change + static_cast<A>(widen(addend[i])) : change);
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
  if (loss.target && loss.addend) return sum_range<KIND, true, true>(loss, begin, end);
  if (loss.addend) return sum_range<KIND, false, true>(loss, begin, end);
  return loss.target ? sum_range<KIND, true, false>(loss, begin, end) : sum_range<KIND, false, false>(loss, begin, end);
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

// One loss of `count` values, which begin at `first`.
template <typename T, typename Target>
void compute(const Tensor& x, const std::optional<Tensor>& target, const std::optional<Tensor>& addend, int64_t kind,
             double target_value, double weight, double dx_weight, bool through_tanh, int64_t first, int64_t count,
             Wide<T>& loss, const Tensor& dx) {
  using A = Wide<T>;
  const PatchLoss<T, Target> pass{.x = static_cast<const T*>(x.data_ptr()) + first,
                                  .target = target ? static_cast<const Target*>(target->data_ptr()) + first : nullptr,
                                  .addend = addend ? static_cast<const T*>(addend->data_ptr()) + first : nullptr,
                                  .target_value = static_cast<A>(target_value),
                                  .weight = static_cast<A>(weight * dx_weight / static_cast<double>(count)),
                                  .through_tanh = through_tanh,
                                  .dx = static_cast<T*>(dx.data_ptr()) + first};
  const std::vector<double> total = sum_tasks({1, count, 1}, 1, [&](int64_t, int64_t begin, int64_t end, double* sum) {
    // A map of logits is small: its exp and log1p are not vectorised.
    *sum += kind == BCE ? sum_kind<BCE>(pass, begin, end) : run(pass, kind, begin, end);
  });
  loss = static_cast<A>(weight * total[0] / static_cast<double>(count));
}

// Each channel's sum over the pixels of all images: what is a bias's gradient.
Tensor channel_sums(const Tensor& dx, ScalarType wide) {
  const Tensor mean = std::get<0>(norm_stats_cpu(dx, 1));
  Tensor sums = empty(dx, {dx.size(1)}, wide);
  const int64_t pixels = dx.numel() / dx.size(1);
  const auto multiply = [&](auto element) {
    using A = decltype(element);
    const A* from = static_cast<const A*>(mean.data_ptr());
    A* to = static_cast<A*>(sums.data_ptr());
    for (int64_t c = 0; c < dx.size(1); ++c) to[c] = from[c] * static_cast<A>(pixels);
  };
  wide == ScalarType::Double ? multiply(double()) : multiply(float());
  return sums;
}

// What a scale on the device holds: 1 where there is none.
double value_of(const std::optional<Tensor>& scale) {
  if (!scale) return 1;
  return scale->scalar_type() == ScalarType::Double ? *static_cast<const double*>(scale->data_ptr())
                                                    : *static_cast<const float*>(scale->data_ptr());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> patch_loss_cpu(Tensor x, std::optional<Tensor> target, int64_t kind,
                                                  double target_value, double weight, bool through_tanh,
                                                  int64_t second_kind, double second_value, double dx_weight,
                                                  std::optional<Tensor> dx_scale, std::optional<Tensor> addend,
                                                  bool sums) {
  const ScalarType type = x.scalar_type(), wide = wide_type(type);
  const bool halves = second_kind >= 0;
  FASTP2P_CHECK("patch_loss", x.numel() > 0 && is_computed(type), "got x ", describe(x),
                ", expected elements of Float, BFloat16, Half or Double");
  FASTP2P_CHECK("patch_loss", 0 <= kind && kind <= L1, "got kind ", kind, ", expected 0 to ", int{L1});
  FASTP2P_CHECK("patch_loss", -1 <= second_kind && second_kind <= L1, "got second_kind ", second_kind,
                ", expected -1 to ", int{L1});
  FASTP2P_CHECK("patch_loss", !halves || (x.dim() > 0 && x.size(0) % 2 == 0 && !target), "got x ", describe(x),
                " and a second kind, expected two halves and no target");
  FASTP2P_CHECK("patch_loss", !sums || x.dim() == 4, "got x ", describe(x), ", expected (N, C, H, W) for sums");
  const auto check_like_x = [&](const char* name, const std::optional<Tensor>& t) {
    FASTP2P_CHECK("patch_loss",
                  !t || (t->device() == x.device() && describe_list(t->sizes()) == describe_list(x.sizes())), "got ",
                  name, " ", describe(*t), ", expected the shape and device of x ", describe(x));
  };
  check_like_x("target", target);
  check_like_x("addend", addend);
  if (addend) check_alike("patch_loss", "addend", *addend, x);
  if (dx_scale)
    check_tensor("patch_loss", "dx_scale", *dx_scale, x, {},
                 wide == dx_scale->scalar_type() ? wide : ScalarType::Float);
  // Values are taken in memory's order, for which all must lie alike.
  const bool images = x.dim() == 4 && !x.is_contiguous() && pixel_stride(x) == x.size(1);
  const MemoryFormat format = images ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  const Tensor dense = torch::stable::contiguous(x, format);
  if (target && target->scalar_type() != type && target->scalar_type() != wide)
    target = torch::stable::to(*target, wide);
  if (target) target = torch::stable::contiguous(*target, format);
  if (addend) addend = torch::stable::contiguous(*addend, format);
  const bool same_type = !target || target->scalar_type() == type;

  Tensor loss = halves ? empty(x, {2}, wide) : empty(x, {}, wide), dx = torch::stable::empty_like(dense);
  dispatch(type, "patch_loss", [&](auto element) {
    using T = decltype(element);
    const auto function = same_type ? compute<T, T> : compute<T, Wide<T>>;
    const int64_t count = x.numel() / (halves ? 2 : 1);
    Wide<T>* losses = static_cast<Wide<T>*>(loss.data_ptr());
    const double all_of_dx = dx_weight * value_of(dx_scale);
    const auto take = [&](int64_t which, double value, int64_t part) {
      function(dense, target, addend, which, value, weight, all_of_dx, through_tanh, part * count, count, losses[part],
               dx);
    };
    take(kind, target_value, 0);
    if (halves) take(second_kind, second_value, 1);
  });
  const Tensor totals = sums ? channel_sums(dx, wide) : empty(x, {0}, wide);
  if (x.is_contiguous() || images) return {loss, dx, totals};
  Tensor like_x = torch::stable::empty_like(x);
  return {loss, torch::stable::copy_(like_x, dx), totals};
}

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CPU, m) { m.impl("patch_loss", TORCH_BOX(&fastp2p::patch_loss_cpu)); }
