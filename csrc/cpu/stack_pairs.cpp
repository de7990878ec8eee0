// stack_pairs: every value is read once, A's twice from the cache, and written once, where PyTorch copies three times;
// threads take pixels.
#include "checks.h"
#include "cpu/operators.h"
#include "cpu/vector.h"

namespace fastp2p {
namespace {

// Writes B beside A, for `count` pixels of `out`.
template <typename T, typename B>
void write(const T* A, int64_t A_stride, int64_t A_channels, const B* images, int64_t B_stride, int64_t B_channels,
           int64_t count, T* __restrict out) {
  for (int64_t i = 0; i < count; ++i, A += A_stride, images += B_stride) {
    for (int64_t c = 0; c < A_channels; ++c) *out++ = A[c];
    for (int64_t c = 0; c < B_channels; ++c) {
      if constexpr (std::is_same_v<T, B>) {
        *out++ = images[c];
      } else {
        *out++ = narrow<T>(static_cast<Wide<T>>(widen(images[c])));
      }
    }
  }
}

}  // namespace

Tensor stack_pairs_cpu(Tensor real_A, Tensor fake_B, Tensor real_B) {
  check_images("stack_pairs", "real_A", real_A);
  check_images("stack_pairs", "real_B", real_B);
  const int64_t n = real_A.size(0), height = real_A.size(2), width = real_A.size(3);
  const std::vector<int64_t> shape = {n, real_B.size(1), height, width};
  check_tensor("stack_pairs", "fake_B", fake_B, real_A, {n, shape[1], height, width}, fake_B.scalar_type());
  check_tensor("stack_pairs", "real_B", real_B, real_A, {n, shape[1], height, width}, real_B.scalar_type());
  const Pixels A = pixels(real_A), fake = pixels(fake_B), real = pixels(real_B);
  const int64_t channels = A.channels + real.channels;
  const Tensor out = empty(real_A, {2 * n, channels, height, width}, real_A.scalar_type(), MemoryFormat::ChannelsLast);
  const auto write_half = [&](const Pixels& B, ScalarType B_type, int64_t begin) {
    dispatch(real_A.scalar_type(), "stack_pairs", [&](auto element) {
      dispatch(B_type, "stack_pairs", [&](auto B_element) {
        using T = decltype(element);
        using U = decltype(B_element);
        T* const at = static_cast<T*>(out.data_ptr()) + begin * channels;
        torch::stable::parallel_for(0, A.count, std::max<int64_t>(1, GRAIN / channels), [&](int64_t from, int64_t to) {
          write(A.data<T>() + from * A.stride, A.stride, A.channels, B.data<U>() + from * B.stride, B.stride,
                B.channels, to - from, at + from * channels);
        });
      });
    });
  };
  write_half(fake, fake_B.scalar_type(), 0);
  write_half(real, real_B.scalar_type(), A.count);
  return out;
}

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CPU, m) { m.impl("stack_pairs", TORCH_BOX(&fastp2p::stack_pairs_cpu)); }
