// augment: each byte of the crop is read once, each value written once. A row is normalised through a table of the 256
// values, and dealt out to A and B from there; eager PyTorch makes some eight passes and a copy of each crop.
#include "cpu/operators.h"
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
  T *real_A, *real_B;
  T value[256];
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
  T* __restrict real_B = batch.real_B + (image * size + row) * size * (channels - input_nc);
  for (int64_t column = 0; column < size; ++column, pixel += step) {
    for (int64_t c = 0; c < input_nc; ++c) *real_A++ = batch.value[pixel[c]];
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

void check(const Tensor& pairs, const Tensor& index, const Tensor& offset, const Tensor& flip, int64_t crop_size,
           int64_t input_nc) {
  FASTP2P_CHECK("augment", pairs.is_cpu() && pairs.dim() == 4 && pairs.scalar_type() == ScalarType::Byte, "got pairs ",
                describe(pairs), ", expected (P, H, W, C) Byte on the CPU");
  const int64_t n = index.numel();
  FASTP2P_CHECK("augment", index.is_cpu() && has_shape(index, {n}) && index.scalar_type() == ScalarType::Long,
                "got index ", describe(index), ", expected (N) Long on the CPU");
  FASTP2P_CHECK("augment", offset.is_cpu() && has_shape(offset, {n, 2}) && offset.scalar_type() == ScalarType::Long,
                "got offset ", describe(offset), ", expected (", n, ", 2) Long on the CPU");
  FASTP2P_CHECK("augment", flip.is_cpu() && has_shape(flip, {n}) && flip.scalar_type() == ScalarType::Bool, "got flip ",
                describe(flip), ", expected (", n, ") Bool on the CPU");
  FASTP2P_CHECK(
      "augment",
      crop_size > 0 && crop_size <= std::min(pairs.size(1), pairs.size(2)) && input_nc > 0 && input_nc < pairs.size(3),
      "got crop_size ", crop_size, ", input_nc ", input_nc, " for pairs ", describe(pairs));
  const std::vector<int64_t> pair = values<int64_t>(index), corner = values<int64_t>(offset);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t top = corner[2 * i], left = corner[2 * i + 1];
    FASTP2P_CHECK("augment",
                  0 <= pair[i] && pair[i] < pairs.size(0) && 0 <= top && top + crop_size <= pairs.size(1) &&
                      0 <= left && left + crop_size <= pairs.size(2),
                  "got index ", pair[i], ", offset (", top, ", ", left, "), crop_size ", crop_size, " for pairs ",
                  describe(pairs));
  }
}

}  // namespace

std::tuple<Tensor, Tensor> augment_cpu(Tensor pairs, Tensor index, Tensor offset, Tensor flip, int64_t crop_size,
                                       int64_t input_nc, std::optional<ScalarType> dtype) {
  check(pairs, index, offset, flip, crop_size, input_nc);
  const ScalarType type = dtype.value_or(ScalarType::Float);
  const int64_t n = index.numel(), channels = pairs.size(3);
  Tensor real_A = empty(pairs, {n, input_nc, crop_size, crop_size}, type, MemoryFormat::ChannelsLast);
  Tensor real_B = empty(pairs, {n, channels - input_nc, crop_size, crop_size}, type, MemoryFormat::ChannelsLast);
  const Tensor dense[] = {torch::stable::contiguous(pairs), torch::stable::contiguous(index),
                          torch::stable::contiguous(offset), torch::stable::contiguous(flip)};
  dispatch(type, "augment", [&](auto element) {
    using T = decltype(element);
    Batch<T> batch{static_cast<const uint8_t*>(dense[0].data_ptr()),
                   pairs.size(1),
                   pairs.size(2),
                   channels,
                   static_cast<const int64_t*>(dense[1].data_ptr()),
                   static_cast<const int64_t*>(dense[2].data_ptr()),
                   static_cast<const bool*>(dense[3].data_ptr()),
                   crop_size,
                   input_nc,
                   static_cast<T*>(real_A.data_ptr()),
                   static_cast<T*>(real_B.data_ptr()),
                   {}};
    for (int byte = 0; byte < 256; ++byte) {
      batch.value[byte] = narrow<T>(static_cast<float>(byte) / 255.0f * 2 - 1);  // in float for double, too
    }
    const int64_t grain = std::max<int64_t>(1, GRAIN / (crop_size * channels));
    torch::stable::parallel_for(0, n * crop_size, grain,
                                [&](int64_t begin, int64_t end) { copy_rows(batch, begin, end); });
  });
  return {real_A, real_B};
}

}  // namespace fastp2p
