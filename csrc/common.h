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

using Shape = std::initializer_list<int64_t>;

template <typename List>
std::string describe_list(const List& numbers) {  // "(2, 3)"
  std::ostringstream out;
  for (const int64_t number : numbers) out << (out.str().empty() ? "(" : ", ") << number;
  return numbers.size() == 0 ? "()" : out.str() + ")";
}

inline std::string describe_device(const Tensor& t) {
  return t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
}

// "(2, 3, 4, 4) BFloat16 of strides (48, 1, 12, 3) on cpu"
inline std::string describe(const Tensor& t) {
  return describe_list(t.sizes()) + " " + torch::headeronly::toString(t.scalar_type()) + " of strides " +
         describe_list(t.strides()) + " on " + describe_device(t);
}

template <typename... Parts>
[[noreturn]] void fail(const char* operation, const Parts&... parts) {
  std::ostringstream message;
  message << operation << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Raises RuntimeError unless the condition holds; the parts of the message are made only then. STD_TORCH_CHECK would
// put the function, the file and the line before the message.
#define FASTP2P_CHECK(operation, condition, ...)               \
  do {                                                         \
    if (!(condition)) ::fastp2p::fail(operation, __VA_ARGS__); \
  } while (false)

inline bool has_shape(const Tensor& t, Shape shape) {
  return static_cast<size_t>(t.dim()) == shape.size() && std::equal(shape.begin(), shape.end(), t.sizes().begin());
}

// Raises unless t lies on like's device and has this shape and dtype; `name` is the argument's in the schema.
inline void check_tensor(const char* operation, const char* name, const Tensor& t, const Tensor& like, Shape shape,
                         ScalarType type) {
  FASTP2P_CHECK(operation, t.device() == like.device() && has_shape(t, shape) && t.scalar_type() == type, "got ", name,
                " ", describe(t), ", expected ", describe_list(shape), " ", type, " on ", describe_device(like));
}

// Raises unless t has like's dtype and device.
inline void check_alike(const char* operation, const char* name, const Tensor& t, const Tensor& like) {
  FASTP2P_CHECK(operation, t.device() == like.device() && t.scalar_type() == like.scalar_type(), "got ", name, " ",
                describe(t), ", expected ", like.scalar_type(), " on ", describe_device(like));
}

inline bool is_computed(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
         type == ScalarType::Double;
}

// Raises unless x is a batch (N, C, H, W) with elements of a dtype that kernels compute.
inline void check_images(const char* operation, const char* name, const Tensor& x) {
  FASTP2P_CHECK(operation, x.dim() == 4 && x.numel() > 0 && is_computed(x.scalar_type()), "got ", name, " ",
                describe(x), ", expected (N, C, H, W) Float, BFloat16, Half or Double, with elements");
}

// Calls f with a value of the C++ type that `type` stands for.
template <typename F>
auto dispatch(ScalarType type, const char* operation, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float());
    case ScalarType::BFloat16: return f(BFloat16());
    case ScalarType::Half: return f(Half());
    case ScalarType::Double: return f(double());
    default: fail(operation, "got ", type, ", expected Float, BFloat16, Half or Double");
  }
}

// The type of arithmetic and statistics: float, or double for double.
inline ScalarType wide_type(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

inline Tensor empty(const Tensor& like, Shape shape, ScalarType type, MemoryFormat format = MemoryFormat::Contiguous) {
  const std::vector<int64_t> sizes(shape);
  return torch::stable::empty(sizes, type, std::nullopt, like.device(), std::nullopt, format);
}

inline Tensor empty_images(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  return empty(like, {n, c, h, w}, like.scalar_type(), MemoryFormat::ChannelsLast);
}

// A (N, C, H, W) batch as rows of pixels: pixel m of N * H * W begins at data + m * stride, its channels side by side.
// A slice of the channels of a channels_last tensor is one, with a stride above C.
struct Pixels {
  Pixels(const Tensor& images, int64_t stride)
      : tensor(images), memory(images.data_ptr()), count(images.size(0) * images.size(2) * images.size(3)),
        channels(images.size(1)), stride(stride) {}

  template <typename T>
  const T* data() const {
    return static_cast<const T*>(memory);
  }

  Tensor tensor;
  const void* memory;
  int64_t count, channels, stride;
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
  const int64_t stride = pixel_stride(x);
  if (stride > 0) return {x, stride};
  return {torch::stable::contiguous(x, MemoryFormat::ChannelsLast), x.size(1)};
}

// The elements of a small tensor, as T.
template <typename T>
std::vector<T> values(const Tensor& t) {
  const Tensor dense = torch::stable::contiguous(t);
  const T* data = static_cast<const T*>(dense.data_ptr());
  return {data, data + dense.numel()};
}

}  // namespace fastp2p
