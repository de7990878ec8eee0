// augment: reads 1 byte for each pixel and channel, and writes 4 for B and 4 (float) or 2 (bfloat16) for A: 2.0 or
// 1.6 MB for a 256 px pair. Each step of the chain crop, flip, cast, divide, scale, split would move about as much
// again. A block writes one row of A and of B, a thread 4 values side by side, of 16 or 8 bytes; one value where rows
// do not divide so. The bytes come from a row of the pair that lies in the cache. Arithmetic is float: the result has
// the reference's bits. Index, offset and flip are read here, so nothing waits for the host, and are not checked:
// torch.ops.fastp2p.augment trusts its caller, fastp2p.ops.augment does not.
#include <limits>

#include "checks.h"
#include "cuda/launch.h"

namespace fastp2p {
namespace {

constexpr unsigned THREADS = 128;  // times 4 values: a third of a 256 px row of colour to colour
constexpr int64_t MOST = std::numeric_limits<int32_t>::max();  // blocks of a grid, and values that a thread counts to

template <typename T>
struct Batch {
  const uint8_t* pairs;
  const int64_t *index, *offset;
  const bool* flip;
  T* real_A;
  float* real_B;
  int64_t height, width;
  unsigned crop_size, channels, input_nc;
};

// byte / 255 * 2 - 1. The fused steps give the correctly rounded quotient of each of the 256 bytes, as division would,
// but without its branch, past which the compiler moves no load. Doubling is exact, so fused or not it is the same.
__device__ float normalise(uint8_t byte) {
  const float x = byte, estimate = x * (1 / 255.0f);
  const float quotient = fmaf(fmaf(estimate, -255.0f, x), 1 / 255.0f, estimate);
  return quotient * 2 - 1;
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(THREADS) augment_kernel(const Batch<T> batch) {
  const unsigned size = batch.crop_size, channels = batch.channels, image = blockIdx.x / size;
  const unsigned nc_A = batch.input_nc, nc_B = channels - nc_A, values_A = size * nc_A;
  const int64_t row = batch.offset[2 * image] + blockIdx.x % size, left = batch.offset[2 * image + 1];
  const bool flip = batch.flip[image];
  const int step = flip ? -static_cast<int>(channels) : static_cast<int>(channels);  // to the next pixel's bytes
  const uint8_t* bytes = batch.pairs + ((batch.index[image] * batch.height + row) * batch.width + left) * channels +
                         (flip ? (size - 1) * channels : 0);
  T* row_A = batch.real_A + static_cast<int64_t>(blockIdx.x) * size * nc_A;
  float* row_B = batch.real_B + static_cast<int64_t>(blockIdx.x) * size * nc_B;
  for (unsigned i = threadIdx.x * WIDTH; i < size * channels; i += THREADS * WIDTH) {  // all of A's row, then B's
    const bool in_B = i >= values_A;
    const unsigned nc = in_B ? nc_B : nc_A, place = in_B ? i - values_A : i;
    const uint8_t* pixel = bytes + static_cast<int>(place / nc) * step + (in_B ? nc_A : 0);
    unsigned channel = place % nc;
    Pack<float, WIDTH> values;
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) {
      values.value[k] = normalise(__ldg(pixel + channel));
      if (++channel == nc) {
        channel = 0;
        pixel += step;
      }
    }
    if (in_B) {
      store(row_B + place, values);
      continue;
    }
    Pack<T, WIDTH> rounded;
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) rounded.value[k] = static_cast<T>(values.value[k]);
    store(row_A + place, rounded);
  }
}

template <typename T>
void launch(const Batch<T>& batch, int64_t blocks, cudaStream_t stream) {
  const unsigned values_A = batch.crop_size * batch.input_nc, values = batch.crop_size * batch.channels;
  const auto kernel = values_A % 4 == 0 && values % 4 == 0 ? augment_kernel<T, 4> : augment_kernel<T, 1>;
  kernel<<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(batch);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

std::tuple<Tensor, Tensor> augment_cuda(Tensor pairs, Tensor index, Tensor offset, Tensor flip, int64_t crop_size,
                                        int64_t input_nc, std::optional<ScalarType> A_dtype) {
  check_augment(pairs, index, offset, flip, crop_size, input_nc);
  const ScalarType type = A_dtype.value_or(ScalarType::Float);
  const int64_t n = index.numel(), channels = pairs.size(3);
  FASTP2P_CHECK("augment", n * crop_size <= MOST && crop_size * channels <= MOST, "got ", n, " crops of ", crop_size,
                " px from pairs ", describe(pairs), ", expected at most ", MOST, " rows, and as many values in a row");
  const auto [real_A, real_B] = empty_crops(pairs, n, crop_size, input_nc, type);
  const Tensor dense_pairs = torch::stable::contiguous(pairs), dense_index = torch::stable::contiguous(index);
  const Tensor dense_offset = torch::stable::contiguous(offset), dense_flip = torch::stable::contiguous(flip);
  dispatch(type, "augment", [&](auto element) {
    using T = decltype(element);
    const Batch<T> batch{.pairs = static_cast<const uint8_t*>(dense_pairs.data_ptr()),
                         .index = static_cast<const int64_t*>(dense_index.data_ptr()),
                         .offset = static_cast<const int64_t*>(dense_offset.data_ptr()),
                         .flip = static_cast<const bool*>(dense_flip.data_ptr()),
                         .real_A = static_cast<T*>(real_A.data_ptr()),
                         .real_B = static_cast<float*>(real_B.data_ptr()),
                         .height = pairs.size(1),
                         .width = pairs.size(2),
                         .crop_size = static_cast<unsigned>(crop_size),
                         .channels = static_cast<unsigned>(channels),
                         .input_nc = static_cast<unsigned>(input_nc)};
    const CurrentStream on(pairs);
    if (n > 0) launch(batch, n * crop_size, on.stream);  // a grid has no fewer than one block
  });
  return {real_A, real_B};
}

}  // namespace fastp2p

STABLE_TORCH_LIBRARY_IMPL(fastp2p, CUDA, m) { m.impl("augment", TORCH_BOX(&fastp2p::augment_cuda)); }
