// adam: reads 16 and writes 12 bytes for each parameter, and writes 2 more for the low-precision weights, in one pass;
// multi-tensor Adam followed by autocast's casts moves 84. A thread takes 4 elements of each buffer in accesses of 16
// bytes, or 8 of gradients in half precision, all four loads under way at once; buffers that are not so aligned, and
// float64, go one element a thread.
// Arithmetic is the parameters' type. The learning rate and the powers of the betas stay in device memory, where each
// thread makes the bias corrections of them, so nothing waits for the host and a CUDA graph replays with new values;
// 1 - power is in double, since 1 - 0.999 loses three digits in float. unscale stays there as well: a thread that reads
// 0 ends at once.
#include "checks.h"
#include "cuda/launch.h"

namespace fastp2p {
namespace {

constexpr int THREADS = 256;

template <typename A, typename Grad, typename Low>
struct Adam {
  A *param, *exp_avg, *exp_avg_sq;
  const Grad* grad;
  Low* low;  // may be null
  int64_t count;
  const A* lr;
  const double* powers;
  const A* unscale;  // may be null
  A beta1, beta2, one_minus_beta1, one_minus_beta2, eps;
};

template <typename A, typename T>
__device__ A as(T x) {  // Half and BFloat16 become float alone
  if constexpr (std::is_same_v<A, T>) return x;
  return static_cast<float>(x);
}

template <int WIDTH, typename A, typename Grad, typename Low>
__device__ void update(const Adam<A, Grad, Low>& adam, A unscale, int64_t begin) {
  const auto grad = load<WIDTH>(adam.grad + begin);
  auto param = load<WIDTH>(adam.param + begin);
  auto exp_avg = load<WIDTH>(adam.exp_avg + begin);
  auto exp_avg_sq = load<WIDTH>(adam.exp_avg_sq + begin);
  const A correction1 = static_cast<A>(1 - adam.powers[0]), correction2 = static_cast<A>(1 - adam.powers[1]);
  const A step_size = *adam.lr / correction1, root_correction2 = std::sqrt(correction2);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    const A g = as<A>(grad.value[i]) * unscale, m = exp_avg.value[i] * adam.beta1 + g * adam.one_minus_beta1;
    const A v = exp_avg_sq.value[i] * adam.beta2 + adam.one_minus_beta2 * g * g;
    exp_avg.value[i] = m;
    exp_avg_sq.value[i] = v;
    param.value[i] -= m / (std::sqrt(v) / root_correction2 + adam.eps) * step_size;
  }
  store(adam.param + begin, param);
  store(adam.exp_avg + begin, exp_avg);
  store(adam.exp_avg_sq + begin, exp_avg_sq);
  if (adam.low != nullptr) {
    Pack<Low, WIDTH> low;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) low.value[i] = static_cast<Low>(static_cast<float>(param.value[i]));
    store(adam.low + begin, low);
  }
}

// The first threads take WIDTH elements each; the few elements that are left, a thread each.
template <typename A, typename Grad, typename Low, int WIDTH>
__global__ void __launch_bounds__(THREADS) adam_kernel(const Adam<A, Grad, Low> adam) {
  const A unscale = adam.unscale == nullptr ? A{1} : *adam.unscale;
  if (unscale == 0) return;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  const int64_t packs = adam.count / WIDTH, rest = packs * WIDTH + (thread - packs);
  if (thread < packs) {
    update<WIDTH>(adam, unscale, thread * WIDTH);
  } else if (WIDTH > 1 && rest < adam.count) {
    update<1>(adam, unscale, rest);
  }
}

bool aligned(const void* data, size_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

template <typename A, typename Grad, typename Low>
void step(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& lr,
          const Tensor& powers, double beta1, double beta2, double eps, const std::optional<Tensor>& low,
          const std::optional<Tensor>& unscale) {
  const auto data = [](const Tensor& t) { return static_cast<A*>(t.data_ptr()); };
  const Adam<A, Grad, Low> adam{.param = data(param),
                                .exp_avg = data(exp_avg),
                                .exp_avg_sq = data(exp_avg_sq),
                                .grad = static_cast<const Grad*>(grad.data_ptr()),
                                .low = low ? static_cast<Low*>(low->data_ptr()) : nullptr,
                                .count = param.numel(),
                                .lr = data(lr),
                                .powers = static_cast<const double*>(powers.data_ptr()),
                                .unscale = unscale ? data(*unscale) : nullptr,
                                .beta1 = static_cast<A>(beta1),
                                .beta2 = static_cast<A>(beta2),
                                .one_minus_beta1 = static_cast<A>(1 - beta1),
                                .one_minus_beta2 = static_cast<A>(1 - beta2),
                                .eps = static_cast<A>(eps)};
  const auto launch = [&](auto kernel, int64_t threads) {
    const int64_t blocks = (threads + THREADS - 1) / THREADS;  // a grid has room for 2^31: more than any memory
    const CurrentStream on(param);
    kernel<<<static_cast<unsigned>(blocks), THREADS, 0, on.stream>>>(adam);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if constexpr (std::is_same_v<A, float>) {
    if (aligned(adam.param, 16) && aligned(adam.grad, 4 * sizeof(Grad)) && aligned(adam.exp_avg, 16) &&
        aligned(adam.exp_avg_sq, 16) && aligned(adam.low, 8)) {
      return launch(adam_kernel<A, Grad, Low, 4>, adam.count / 4 + adam.count % 4);
    }
  }
  launch(adam_kernel<A, Grad, Low, 1>, adam.count);
}

}  // namespace

void adam_cuda(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor lr, Tensor powers, double beta1,
               double beta2, double eps, std::optional<Tensor> low_precision, std::optional<Tensor> unscale) {
  check_adam(param, grad, exp_avg, exp_avg_sq, lr, powers, low_precision, unscale);
  if (param.numel() == 0) return;  // a grid has no fewer than one block
  const ScalarType type = param.scalar_type();
  const ScalarType low_precision_type = low_precision ? low_type(*low_precision) : ScalarType::BFloat16;
  const Tensor rate = torch::stable::to(lr, type), dense_powers = torch::stable::contiguous(powers);
  const std::optional<Tensor> factor = unscale ? std::optional(torch::stable::to(*unscale, type)) : std::nullopt;
  dispatch_adam(type, grad.scalar_type(), low_precision_type, [&](auto wide, auto gradient, auto low) {
    step<decltype(wide), decltype(gradient), decltype(low)>(param, grad, exp_avg, exp_avg_sq, rate, dense_powers, beta1,
                                                            beta2, eps, low_precision, factor);
  });
}

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CUDA, m) { m.impl("adam", TORCH_BOX(&fastp2p::adam_cuda)); }
