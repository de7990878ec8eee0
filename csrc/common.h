// What every operator needs: checks that say what they got and expected, and how a batch of images lies in memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace fastp2p {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// "(2, 3, 4, 4) BFloat16 of strides (48, 1, 12, 3)"
inline std::string describe(const Tensor& t) {
  std::ostringstream out;
  const auto list = [&out](auto numbers) {
    for (size_t i = 0; i < numbers.size(); ++i) out << (i == 0 ? "(" : ", ") << numbers[i];
    out << (numbers.size() == 0 ? "()" : ")");
  };
  list(t.sizes());
  out << ' ' << torch::headeronly::toString(t.scalar_type()) << " of strides ";
  list(t.strides());
  return out.str();
}

// The type of arithmetic and statistics: float, or double for double.
inline ScalarType wide_type(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

inline bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  return static_cast<size_t>(t.dim()) == shape.size() && std::equal(shape.begin(), shape.end(), t.sizes().begin());
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type,
                    MemoryFormat format = MemoryFormat::Contiguous) {
  const std::vector<int64_t> sizes(shape);
  return torch::stable::empty(sizes, type, std::nullopt, like.device(), std::nullopt, format);
}

inline Tensor empty_images(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  return empty(like, {n, c, h, w}, like.scalar_type(), MemoryFormat::ChannelsLast);
}

// A (N, C, H, W) batch as rows of pixels: pixel m of N * H * W begins at data + m * stride, its channels side by side.
// A slice of the channels of a channels_last tensor is one, with a stride above C.
struct Pixels {
  Tensor tensor;
  int64_t count, channels, stride;

  template <typename T>
  const T* data() const {
    return static_cast<const T*>(tensor.data_ptr());
  }
};

// The row stride, or -1 where the batch does not lie in rows of pixels.
inline int64_t pixel_stride(const Tensor& x) {
  const auto n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  if (c > 1 && x.stride(1) != 1) return -1;
  const int64_t stride = w > 1 ? x.stride(3) : h > 1 ? x.stride(2) : n > 1 ? x.stride(0) : c;
  const bool rows = (h == 1 || x.stride(2) == w * stride) && (n == 1 || x.stride(0) == h * w * stride);
  return rows && stride >= c ? stride : -1;
}

// Any batch as rows of pixels; one that does not lie so is copied.
inline Pixels pixels(const Tensor& x) {
  const int64_t stride = pixel_stride(x), count = x.size(0) * x.size(2) * x.size(3);
  if (stride > 0) return {x, count, x.size(1), stride};
  return {torch::stable::contiguous(x, MemoryFormat::ChannelsLast), count, x.size(1), x.size(1)};
}

// The elements of a small tensor, as T.
template <typename T>
std::vector<T> values(const Tensor& t) {
  const Tensor dense = torch::stable::contiguous(t);
  const T* data = static_cast<const T*>(dense.data_ptr());
  return {data, data + dense.numel()};
}

template <typename... Parts>
[[noreturn]] void fail(const char* operation, const Parts&... parts) {
  std::ostringstream message;
  message << operation << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace fastp2p

// Raises RuntimeError unless the condition holds; the parts of the message are made only then.
#define FASTP2P_CHECK(operation, condition, ...)               \
  do {                                                         \
    if (!(condition)) ::fastp2p::fail(operation, __VA_ARGS__); \
  } while (false)
