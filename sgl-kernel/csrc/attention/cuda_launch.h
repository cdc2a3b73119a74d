// Small CUDA helpers of the launches: errors with text, the right current device.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "backend.h"

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

inline cudaLaunchConfig_t launch_config(const backend::Stream& stream, uint32_t blocks, uint32_t threads) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream.get());
  return config;
}

// Enqueues a kernel with its parameters. The status is that of this launch.
template <typename... Params>
void launch_kernel(void (*kernel)(Params...), const char* name, const cudaLaunchConfig_t& config,
                   const std::remove_const_t<Params>&... params) {
  const void* arguments[] = {&params...};
  check_cuda(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), const_cast<void**>(arguments)), name);
}

template <typename... Params>
void launch_kernel(void (*kernel)(Params...), const char* name, const backend::Stream& stream, uint32_t blocks,
                   uint32_t threads, const std::remove_const_t<Params>&... params) {
  launch_kernel(kernel, name, launch_config(stream, blocks, threads), params...);
}

// The same of a kernel that waits inside for all kernels before (`griddepcontrol.wait`): where the device can (Hopper
// and later), it starts while they still run.
template <typename... Params>
void launch_dependent_kernel(void (*kernel)(Params...), const char* name, cudaLaunchConfig_t config,
                             const std::remove_const_t<Params>&... params) {
  int device = 0, major = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking for the architecture");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = major >= 9 ? 1 : 0;
  launch_kernel(kernel, name, config, params...);
}

template <typename... Params>
void launch_dependent_kernel(void (*kernel)(Params...), const char* name, const backend::Stream& stream,
                             uint32_t blocks, uint32_t threads, const std::remove_const_t<Params>&... params) {
  launch_dependent_kernel(kernel, name, launch_config(stream, blocks, threads), params...);
}

}  // namespace sgl_kernel
