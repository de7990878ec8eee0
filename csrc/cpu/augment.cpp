// augment: each byte of the crop is read once, each value written once, through a table of the 256 normalised values,
// which are made in float; eager PyTorch makes some eight passes and a copy of each crop. Threads take rows of crops.
#include "checks.h"
#include "cpu/vector.h"

namespace fastp2p {
namespace {

template <typename T>
struct Batch {
  const uint8_t* pairs;
  int64_t height, width, channels;
  const int64_t *index, *offset;
  const bool* flip;
  int64_t crop_size, input_nc;
  T* real_A;
  float* real_B;
  float value[256];
  T value_A[256];  // the same, rounded
};

template <typename T, int64_t CHANNELS, int64_t INPUT_NC>
void copy_row(const Batch<T>& batch, int64_t image, int64_t row) {
  const int64_t channels = CHANNELS ? CHANNELS : batch.channels, input_nc = CHANNELS ? INPUT_NC : batch.input_nc;
  const int64_t top = batch.offset[2 * image], left = batch.offset[2 * image + 1], size = batch.crop_size;
  const uint8_t* pixel =
      batch.pairs + ((batch.index[image] * batch.height + top + row) * batch.width + left) * channels;
  const int64_t step = batch.flip[image] ? -channels : channels;
  if (batch.flip[image]) pixel += (size - 1) * channels;
  T* __restrict real_A = batch.real_A + (image * size + row) * size * input_nc;
  float* __restrict real_B = batch.real_B + (image * size + row) * size * (channels - input_nc);
  for (int64_t column = 0; column < size; ++column, pixel += step) {
    for (int64_t c = 0; c < input_nc; ++c) *real_A++ = batch.value_A[pixel[c]];
    for (int64_t c = input_nc; c < channels; ++c) *real_B++ = batch.value[pixel[c]];
  }
}

template <typename T>
void copy_rows(const Batch<T>& batch, int64_t begin, int64_t end) {
  const bool rgb = batch.channels == 6 && batch.input_nc == 3;
  for (int64_t i = begin; i < end; ++i) {
    const auto copy = rgb ? copy_row<T, 6, 3> : copy_row<T, 0, 0>;
    copy(batch, i / batch.crop_size, i % batch.crop_size);
  }
}

void check_crops(const Tensor& pairs, const Tensor& index, const Tensor& offset, int64_t crop_size) {
  const std::vector<int64_t> pair = values<int64_t>(index), corner = values<int64_t>(offset);
  for (size_t i = 0; i < pair.size(); ++i) {
    const int64_t top = corner[2 * i], left = corner[2 * i + 1];
    FASTP2P_CHECK("augment",
                  0 <= pair[i] && pair[i] < pairs.size(0) && 0 <= top && top <= pairs.size(1) - crop_size &&
                      0 <= left && left <= pairs.size(2) - crop_size,
                  "got index ", pair[i], ", offset (", top, ", ", left, "), crop_size ", crop_size, " for pairs ",
                  describe(pairs), ", expected a pair that is there and a crop within it");
  }
}

}  // namespace

std::tuple<Tensor, Tensor> augment_cpu(Tensor pairs, Tensor index, Tensor offset, Tensor flip, int64_t crop_size,
                                       int64_t input_nc, std::optional<ScalarType> A_dtype) {
  check_augment(pairs, index, offset, flip, crop_size, input_nc);
  check_crops(pairs, index, offset, crop_size);
  const ScalarType type = A_dtype.value_or(ScalarType::Float);
  const int64_t n = index.numel(), channels = pairs.size(3);
  const auto [real_A, real_B] = empty_crops(pairs, n, crop_size, input_nc, type);
  const Tensor dense_pairs = torch::stable::contiguous(pairs), dense_index = torch::stable::contiguous(index);
  const Tensor dense_offset = torch::stable::contiguous(offset), dense_flip = torch::stable::contiguous(flip);
  dispatch(type, "augment", [&](auto element) {
    using T = decltype(element);
    Batch<T> batch{.pairs = static_cast<const uint8_t*>(dense_pairs.data_ptr()),
                   .height = pairs.size(1),
                   .width = pairs.size(2),
                   .channels = channels,
                   .index = static_cast<const int64_t*>(dense_index.data_ptr()),
                   .offset = static_cast<const int64_t*>(dense_offset.data_ptr()),
                   .flip = static_cast<const bool*>(dense_flip.data_ptr()),
                   .crop_size = crop_size,
                   .input_nc = input_nc,
                   .real_A = static_cast<T*>(real_A.data_ptr()),
                   .real_B = static_cast<float*>(real_B.data_ptr()),
                   .value = {},
                   .value_A = {}};
    for (int byte = 0; byte < 256; ++byte) {
      batch.value[byte] = static_cast<float>(byte) / 255.0f * 2 - 1;  // in float for double, too
      batch.value_A[byte] = narrow<T>(batch.value[byte]);
    }
    const int64_t grain = std::max<int64_t>(1, GRAIN / (crop_size * channels));
    torch::stable::parallel_for(0, n * crop_size, grain,
                                [&](int64_t begin, int64_t end) { copy_rows(batch, begin, end); });
  });
  return {real_A, real_B};
}

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CPU, m) { m.impl("augment", TORCH_BOX(&fastp2p::augment_cpu)); }
