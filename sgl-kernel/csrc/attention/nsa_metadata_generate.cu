// CUDA backend: the launch of the generation kernel.
#include "attention/cuda_launch.h"
#include "attention/nsa_metadata_generate.cuh"
#include "backend.h"

namespace sgl_kernel {

void load_generate_kernel() {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, nsa_metadata_generate_kernel), "loading nsa_metadata_generate_kernel");
}

namespace backend {

void launch_generate(const GenerateParams& params, int32_t device_index) {
  const int64_t table_blocks = params.num_tables > 0 ? static_cast<int64_t>(params.bs) * params.col_blocks : 0;
  const uint32_t blocks = static_cast<uint32_t>(params.num_vectors + table_blocks);
  if (blocks == 0) return;
  const DeviceScope scope(device_index);
  nsa_metadata_generate_kernel<<<blocks, kBlockThreads, 0, current_stream(device_index)>>>(params);
  check_cuda(cudaGetLastError(), "launch of nsa_metadata_generate_kernel");
}

}  // namespace backend
}  // namespace sgl_kernel
