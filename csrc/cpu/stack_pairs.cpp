// stack_pairs: every value is read once, A's twice, and written once, where PyTorch copies three times; threads take
// pixels.
#include "checks.h"
#include "cpu/operators.h"
#include "cpu/vector.h"

namespace fastp2p {
namespace {

// Writes some images' pixels beside A's, rounded to A's type.
template <typename T, typename U>
void write(const Pixels& A, const Pixels& B, int64_t begin, int64_t end, T* __restrict out) {
  const T* from_A = A.data<T>() + begin * A.stride;
  const U* from_B = B.data<U>() + begin * B.stride;
  for (int64_t i = begin; i < end; ++i, from_A += A.stride, from_B += B.stride) {
    for (int64_t c = 0; c < A.channels; ++c) *out++ = from_A[c];
    for (int64_t c = 0; c < B.channels; ++c) {
      if constexpr (std::is_same_v<T, U>) {
        *out++ = from_B[c];
      } else {
        *out++ = narrow<T>(static_cast<Wide<T>>(widen(from_B[c])));
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
          write<T, U>(A, B, from, to, at + from * channels);
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
