// What conv, conv_transpose and conv_wgrad share. Each is either one of ATen's convolutions or, where that is measured
// to be slower, ATen's matrix product on the weight as it lies in memory: (O, KH, KW, C) of a channels_last weight is a
// matrix of O rows. oneDNN's convolutions first copy the weight into a layout of their own, at every call of training;
// for the deep layers of a U-Net, a few pixels against millions of weights, that copy is most of the time.
#pragma once

#include "cpu/choices.h"

namespace fastp2p {

struct Window {
  int64_t height, width, stride, padding;

  int64_t taps() const { return height * width; }

  // Pixels that a convolution leaves of a side; none where the kernel is larger than the padded side.
  int64_t output_size(int64_t size, int64_t kernel) const {
    const int64_t room = size + 2 * padding - kernel;
    return room < 0 ? 0 : room / stride + 1;
  }

  // Whether each tap of the kernel's side meets a pixel of the image's side somewhere, and not padding alone.
  bool every_tap_meets_a_pixel(int64_t size, int64_t kernel) const {
    for (int64_t tap = 0; tap < kernel; ++tap) {
      bool meets = false;
      for (int64_t i = 0; i < output_size(size, kernel) && !meets; ++i) {
        const int64_t place = i * stride - padding + tap;
        meets = 0 <= place && place < size;
      }
      if (!meets) return false;
    }
    return true;
  }
};

// The weight as (size(0), KH * KW * size(1)), or nothing where it is not laid out as channels_last.
std::optional<Tensor> weight_matrix(const Tensor& weight);

// Row m, the receptive field of output pixel m: (N * height * width, KH * KW * C), zero outside the image.
Tensor im2col(const Tensor& x, const Window& window, int64_t height, int64_t width);

// x, and beside its channels x2's: channels_last where there is an x2.
Tensor concatenate(const Tensor& x, const std::optional<Tensor>& x2);

// The pixels of a batch: (N * H * W, C).
Tensor pixel_matrix(const Tensor& x);

Tensor transpose(const Tensor& matrix);

// out = a @ b.
void multiply(const Tensor& a, const Tensor& b, const Tensor& out);

// out = a @ weight.T + bias, rounded once.
void linear(const Tensor& a, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& out);

// ATen's convolution, or transposed convolution; channels_last.
Tensor convolve(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Window& window,
                bool transposed, int64_t output_padding_height, int64_t output_padding_width);

// ATen's weight gradient of a convolution that takes `inner` to the size of `outer`; channels_last.
Tensor convolution_dweight(const Tensor& outer, const Tensor& inner, const Window& window);

// out = act(out), or with a gate out * act'(gate), in place; out is channels_last.
void activate_in_place(const Tensor& out, int64_t activation, double slope, const std::optional<Tensor>& gate);

// Raises unless the window is possible; before output_size, which divides by the stride.
void check_window(const char* operation, const Window& window);

// Raises unless the tensors go together and something is left of the images.
void check_convolution(const char* operation, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& gate, const Window& window, int64_t activation, Shape out_shape);

}  // namespace fastp2p
