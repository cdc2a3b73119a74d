// CUDA backend: the launch of the index scores. Compiled for sm_90a, which no other architecture runs.
#include "attention/cuda_launch.h"
#include "attention/index_scores.cuh"
#include "backend.h"

namespace sgl_kernel {

void load_index_scores_kernels() {
  for (int32_t heads : kIndexHeads) {
    for (int32_t rows : kBlockRows) {
      const IndexScoresKernel kernel = index_scores_kernel_of(heads, rows);
      load_kernel(kernel.function, "loading index_scores_kernel");
      check_cuda(
          cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes),
          "asking for index_scores_kernel's shared memory");
    }
  }
}

namespace backend {

bool serves_index_scores(int32_t device_index) {
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_index), "asking for the device");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_index), "asking for the device");
  return major == 9 && minor == 0;
}

// A block for each multiprocessor.
void launch_index_scores(const IndexScoresParams& params, const RowBlocks& blocks, const Stream& stream) {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const IndexScoresKernel kernel = index_scores_kernel_of(params.heads, blocks.rows);
  cudaLaunchConfig_t config = launch_config(stream, static_cast<uint32_t>(multiprocessors(device)), kScoresThreads);
  config.dynamicSmemBytes = static_cast<size_t>(kernel.shared_bytes);
  launch_dependent_kernel(kernel.function, "launch of index_scores_kernel", config, params, blocks);
}

}  // namespace backend
}  // namespace sgl_kernel
