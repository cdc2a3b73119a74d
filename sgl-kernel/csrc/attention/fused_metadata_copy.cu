// CUDA backend: device queries and the launch of the copy.
#include <algorithm>
#include <atomic>

#include "attention/cuda_launch.h"
#include "attention/fused_metadata_copy.cuh"
#include "backend.h"

namespace sgl_kernel {

void load_generate_kernel();            // nsa_metadata_generate.cu
void load_paged_mqa_schedule_kernel();  // paged_mqa_schedule.cu

namespace backend {

const char* device_name() { return "cuda"; }
int32_t device_type() { return aoti_torch_device_type_cuda(); }

void prepare(int32_t device_index) {
  const DeviceScope scope(device_index);
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, fused_metadata_copy_kernel), "loading fused_metadata_copy_kernel");
  load_generate_kernel();
  load_paged_mqa_schedule_kernel();
}

// Asked once per device.
int32_t resident_blocks(int32_t device_index) {
  static std::atomic<int32_t> known[64];
  if (device_index < 0 || device_index >= 64) return 132 * kBlocksPerSm;
  int32_t blocks = known[device_index].load(std::memory_order_relaxed);
  if (blocks == 0) {
    int sms = 0;
    check_cuda(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device_index), "counting SMs");
    blocks = sms * kBlocksPerSm;
    known[device_index].store(blocks, std::memory_order_relaxed);
  }
  return blocks;
}

// One block per tile while all blocks are resident together; beyond that every block takes several tiles.
void launch_copy(const CopyParams& params, int32_t device_index) {
  if (params.num_tiles == 0) return;
  const DeviceScope scope(device_index);
  const uint32_t blocks = std::min(params.num_tiles, static_cast<uint32_t>(resident_blocks(device_index)));
  fused_metadata_copy_kernel<<<blocks, kBlockThreads, 0, current_stream(device_index)>>>(params);
  check_cuda(cudaGetLastError(), "launch of fused_metadata_copy_kernel");
}

}  // namespace backend
}  // namespace sgl_kernel
