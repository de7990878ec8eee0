#include "cpu/convolution.h"

#include <array>

#include "cpu/activation.h"

// The last error's message; PyTorch has it from 2.13 on.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fastp2p {

namespace {

using Sizes = std::vector<int64_t>;
using torch::stable::detail::from;
using torch::stable::detail::to;

// Calls PyTorch's dispatcher, which replaces the arguments on the stack by the results.
void call_dispatcher(const char* name, const char* overload, StableIValue* stack) {
  if (torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS) return;
  const bool told = torch_exception_get_what_without_backtrace != nullptr;
  fail(name, told ? torch_exception_get_what_without_backtrace() : "failed; PyTorch tells why from 2.13 on");
}

// Calls an operator that returns one tensor.
template <typename... Args>
Tensor call_aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{from(args)...};
  call_dispatcher(name, overload, stack.data());
  return to<Tensor>(stack[0]);
}

Tensor strided(const Tensor& t, const Sizes& sizes, const Sizes& strides) {
  return call_aten("aten::as_strided", "", t, sizes, strides, std::optional<int64_t>());
}

template <typename T>
FASTP2P_INLINE void activate_row(const Activation<Wide<T>>& activation, const T* __restrict gate, T* __restrict out,
                                 int64_t n) {
  const Activation<Wide<T>> act = activation;
  if (gate == nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] = narrow<T>(act.template apply<false>(widen(out[i])));
  } else if (act.tanh) {
    for (int64_t i = 0; i < n; ++i) out[i] = narrow<T>(widen(out[i]) * (1 - widen(gate[i]) * widen(gate[i])));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = narrow<T>(widen(out[i]) * act.template derivative<false>(widen(gate[i])));
  }
}

#define INSTANTIATE(CLONES, T)                                                               \
  CLONES void run(const Activation<Wide<T>>& activation, const T* gate, T* out, int64_t n) { \
    activate_row<T>(activation, gate, out, n);                                               \
  }
INSTANTIATE(FASTP2P_CLONES, float)
INSTANTIATE(FASTP2P_CLONES, BFloat16)
INSTANTIATE(, Half)
INSTANTIATE(, double)
#undef INSTANTIATE

}  // namespace

std::optional<Tensor> weight_matrix(const Tensor& weight) {
  if (pixel_stride(weight) != weight.size(1)) return std::nullopt;
  const int64_t rows = weight.size(0), columns = weight.numel() / rows;
  return strided(weight, {rows, columns}, {columns, 1});
}

Tensor im2col(const Tensor& x, const Window& window, int64_t height, int64_t width) {
  const Pixels source = pixels(x);
  const int64_t x_height = x.size(2), x_width = x.size(3), element = static_cast<int64_t>(x.element_size());
  const int64_t pixel = source.channels * element, pixel_step = source.stride * element;
  const int64_t taps_row = window.width * pixel, row = window.height * taps_row, rows = x.size(0) * height * width;
  Tensor columns = empty(x, {rows, window.taps() * source.channels}, x.scalar_type());
  const char* from = static_cast<const char*>(source.tensor.data_ptr());
  char* to = static_cast<char*>(columns.data_ptr());
  const auto copy_rows = [=](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t image = m / (height * width), top = m / width % height * window.stride - window.padding;
      const int64_t left = m % width * window.stride - window.padding;
      const int64_t first = std::clamp<int64_t>(-left, 0, window.width);  // taps within the image: [first, last)
      const int64_t last = std::clamp<int64_t>(x_width - left, first, window.width);
      for (int64_t tap = 0; tap < window.height; ++tap) {
        char* out = to + m * row + tap * taps_row;
        const int64_t y = top + tap;
        if (y < 0 || y >= x_height || first == last) {
          std::memset(out, 0, taps_row);
          continue;
        }
        std::memset(out, 0, first * pixel);
        const char* in = from + ((image * x_height + y) * x_width + left + first) * pixel_step;
        if (pixel_step == pixel) {
          std::memcpy(out + first * pixel, in, (last - first) * pixel);
        } else {
          for (int64_t i = first; i < last; ++i, in += pixel_step) std::memcpy(out + i * pixel, in, pixel);
        }
        std::memset(out + last * pixel, 0, (window.width - last) * pixel);
      }
    }
  };
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, GRAIN * 4 / row), copy_rows);
  return columns;
}

Tensor concatenate(const Tensor& x, const std::optional<Tensor>& x2) {
  if (!x2) return x;
  const Pixels parts[] = {pixels(x), pixels(*x2)};
  Tensor both = empty_images(x, x.size(0), x.size(1) + x2->size(1), x.size(2), x.size(3));
  const int64_t element = static_cast<int64_t>(x.element_size()), row = both.size(1) * element;
  torch::stable::parallel_for(0, parts[0].count, std::max<int64_t>(1, GRAIN * 4 / row),
                              [&](int64_t begin, int64_t end) {
    char* to = static_cast<char*>(both.data_ptr()) + begin * row;
    for (int64_t m = begin; m < end; ++m) {
      for (const Pixels& part : parts) {
        const char* from = static_cast<const char*>(part.tensor.data_ptr()) + m * part.stride * element;
        std::memcpy(to, from, part.channels * element);
        to += part.channels * element;
      }
    }
  });
  return both;
}

Tensor pixel_matrix(const Tensor& x) {
  const Pixels rows = pixels(x);
  return strided(rows.tensor, {rows.count, rows.channels}, {rows.stride, 1});
}

Tensor transpose(const Tensor& matrix) {
  return strided(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

void multiply(const Tensor& a, const Tensor& b, const Tensor& out) { call_aten("aten::mm", "out", a, b, out); }

void linear(const Tensor& a, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& out) {
  const std::optional<Tensor> rounded = bias ? std::optional(torch::stable::to(*bias, a.scalar_type())) : std::nullopt;
  call_aten("aten::linear", "out", a, weight, rounded, out);
}

Tensor convolve(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Window& window,
                bool transposed, int64_t output_padding_height, int64_t output_padding_width) {
  const std::optional<Tensor> rounded = bias ? std::optional(torch::stable::to(*bias, x.scalar_type())) : std::nullopt;
  const Sizes stride(2, window.stride), padding(2, window.padding), dilation{1, 1};
  const Sizes output_padding{output_padding_height, output_padding_width};
  const Tensor out = call_aten("aten::convolution", "", torch::stable::contiguous(x, MemoryFormat::ChannelsLast),
                               weight, rounded, stride, padding, dilation, transposed, output_padding, int64_t{1});
  return torch::stable::contiguous(out, MemoryFormat::ChannelsLast);
}

Tensor convolution_dweight(const Tensor& outer, const Tensor& inner, const Window& window) {
  // ATen reads the weight's shape and layout alone.
  const Tensor weight = empty(inner, {outer.size(1), inner.size(1), window.height, window.width}, inner.scalar_type(),
                              MemoryFormat::ChannelsLast);
  const Sizes stride(2, window.stride), padding(2, window.padding), dilation{1, 1}, output_padding{0, 0};
  const bool wanted[] = {false, true, false};
  const torch::headeronly::HeaderOnlyArrayRef<bool> mask(wanted, 3);
  std::array<StableIValue, 11> stack{from(torch::stable::contiguous(outer, MemoryFormat::ChannelsLast)),
                                     from(torch::stable::contiguous(inner, MemoryFormat::ChannelsLast)),
                                     from(weight),
                                     from(std::optional<Sizes>()),
                                     from(stride),
                                     from(padding),
                                     from(dilation),
                                     from(false),
                                     from(output_padding),
                                     from(int64_t{1}),
                                     from(mask)};
  call_dispatcher("aten::convolution_backward", "", stack.data());
  const Tensor dx = to<Tensor>(stack[0]), dweight = to<Tensor>(stack[1]), dbias = to<Tensor>(stack[2]);  // to own them
  return torch::stable::contiguous(dweight, MemoryFormat::ChannelsLast);
}

void activate_in_place(const Tensor& out, int64_t activation, double slope, const std::optional<Tensor>& gate) {
  if (activation == NONE) return;
  if (activation == TANH && !gate) {
    call_aten("aten::tanh", "out", out, out);
    return;
  }
  const std::optional<Pixels> gates = gate ? std::optional(pixels(*gate)) : std::nullopt;
  dispatch(out.scalar_type(), "activation", [&](auto element) {
    using T = decltype(element);
    const Activation<Wide<T>> act(activation, slope);
    T* data = static_cast<T*>(out.data_ptr());
    // Without a gate, or with a dense one, the whole batch is one row.
    const bool flat = !gates || gates->stride == gates->channels;
    const int64_t row = flat ? 1 : out.size(1), gate_step = flat ? 1 : gates->stride;
    const T* gate_data = gates ? gates->template data<T>() : nullptr;
    torch::stable::parallel_for(0, out.numel() / row, std::max<int64_t>(1, GRAIN / row),
                                [&](int64_t begin, int64_t end) {
      if (flat) return run(act, gate_data ? gate_data + begin : nullptr, data + begin, end - begin);
      for (int64_t m = begin; m < end; ++m) run(act, gate_data + m * gate_step, data + m * row, row);
    });
  });
}

void check_window(const char* operation, const Window& window) {
  constexpr int64_t MOST = 1 << 30;  // so that no sum of sizes overflows
  FASTP2P_CHECK(operation, 0 < window.stride && window.stride <= MOST && 0 <= window.padding && window.padding <= MOST,
                "got stride ", window.stride, ", padding ", window.padding,
                ", expected at least 1 and 0, at most 2^30");
}

void check_convolution(const char* operation, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& gate, const Window& window, int64_t activation, Shape out_shape) {
  check_images(operation, "x", x);
  check_images(operation, "weight", weight);
  check_alike(operation, "weight", weight, x);
  check_window(operation, window);
  FASTP2P_CHECK(operation, is_activation(activation), "got activation ", activation, ", expected 0 to 3");
  FASTP2P_CHECK(operation, std::all_of(out_shape.begin(), out_shape.end(), [](int64_t size) { return size > 0; }),
                "got x ", describe(x), ", weight ", describe(weight), ", expected something to be left of the image");
  if (bias) check_tensor(operation, "bias", *bias, x, {out_shape.begin()[1]}, bias->scalar_type());
  if (gate) check_tensor(operation, "gate", *gate, x, out_shape, x.scalar_type());
}

}  // namespace fastp2p
