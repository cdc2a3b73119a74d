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

// A runtime serves under drivers of its own major version and later. Asked before anything else of the runtime, whose
// own error does not say what to do.
inline void check_driver() {
  int runtime = 0, driver = 0;
  check_cuda(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  check_cuda(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  if (driver / 1000 >= runtime / 1000) return;
  const auto text = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  throw std::runtime_error("sgl_kernel: the NVIDIA driver is too old: the library was built with CUDA " +
                           text(runtime) + ", the driver serves up to CUDA " + text(driver) +
                           "; update the driver, or take a build of a CUDA " + std::to_string(driver / 1000) +
                           " compiler");
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

// Loads a kernel now: the driver would load it at its first launch, which may be in a capture. The calls that capturing
// forbids to a thread are allowed meanwhile; loading is none of the captured work.
template <typename Kernel>
void load_kernel(Kernel* kernel, const char* name) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  check_cuda(status, name);
}

// Enqueues a kernel, whose one argument is `params`, on the current stream. The status is that of this launch.
template <typename Params>
void launch_kernel(void (*kernel)(Params), const char* name, uint32_t blocks, uint32_t threads, const Params& params,
                   int32_t device_index) {
  const DeviceScope scope(device_index);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = current_stream(device_index);
  void* arguments[] = {const_cast<Params*>(&params)};
  check_cuda(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments), name);
}

}  // namespace sgl_kernel
