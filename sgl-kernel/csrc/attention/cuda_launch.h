// Small CUDA helpers of the launches: errors with text, torch's current stream, the right current device.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>
#include <string>

namespace sgl_kernel {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("sgl_kernel: ") + what + " failed: " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

// Makes `device_index` current for the life of the object.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t device_index) : device_(device_index) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device_) check_cuda(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceScope() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int device_;
  int previous_ = 0;
};

inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device_index, &stream) != 0) {
    throw std::runtime_error("sgl_kernel: torch did not tell the current CUDA stream");
  }
  return static_cast<cudaStream_t>(stream);
}

}  // namespace sgl_kernel
