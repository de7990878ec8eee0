// What every kernel needs: tensors on one device, PyTorch's current stream there, and wide accesses to memory.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "common.h"

namespace fastp2p {

// While one lives, its tensor's device is the current one. Not PyTorch's default stream but its current one: that is
// the one that a CUDA graph is captured on.
struct CurrentStream {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit CurrentStream(const Tensor& t) : guard(t.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

// What a thread moves at once: 16 bytes for 4 floats, 8 for 4 halves. Its place in memory is a multiple of its size.
template <typename T, int WIDTH>
struct alignas(WIDTH * sizeof(T)) Pack {
  T value[WIDTH];
};

template <int WIDTH, typename T>
__device__ Pack<T, WIDTH> load(const T* data) {
  return *reinterpret_cast<const Pack<T, WIDTH>*>(data);
}

template <int WIDTH, typename T>
__device__ void store(T* data, const Pack<T, WIDTH>& pack) {
  *reinterpret_cast<Pack<T, WIDTH>*>(data) = pack;
}

}  // namespace fastp2p
