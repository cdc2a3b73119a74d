// CUDA backend: the launch of the index scores. Compiled for sm_90a, which no other architecture runs.
#include "attention/cuda_launch.h"
#include "attention/index_scores.cuh"
#include "backend.h"

namespace sgl_kernel {

void load_index_scores_kernels() {
  for (int32_t heads : kIndexHeads) {
    const IndexScoresKernel kernel = index_scores_kernel_of(heads);
    load_kernel(kernel, "loading index_scores_kernel");
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    index_scores_shared_bytes(heads, kMaxBlockRows)),
               "asking for index_scores_kernel's shared memory");
  }
}

namespace backend {

bool serves_index_scores(int32_t device_index) {
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_index), "asking for the device");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_index), "asking for the device");
  return major == 9 && minor == 0;
}

void launch_index_scores(const IndexScoresParams& params, const IndexScoresGrid& grid, const Stream& stream) {
  cudaLaunchConfig_t config = launch_config(stream, static_cast<uint32_t>(grid.blocks()), kScoresThreads);
  config.dynamicSmemBytes = static_cast<size_t>(index_scores_shared_bytes(params.heads, grid.block_rows));
  launch_dependent_kernel(index_scores_kernel_of(params.heads), "launch of index_scores_kernel", config, params, grid);
}

}  // namespace backend
}  // namespace sgl_kernel
