// CUDA backend: the launch of the top-k.
#include "attention/cuda_launch.h"
#include "attention/topk_slots.cuh"
#include "backend.h"

namespace sgl_kernel {

void load_topk_slots_kernels() {
  for (const TopkBlock& block : kTopkBlocks) load_kernel(topk_slots_kernel_of(block), "loading topk_slots_kernel");
}

namespace backend {

void launch_topk_slots(const TopkSlotsParams& params, const TopkLevel& level, const Stream& stream) {
  launch_dependent_kernel(topk_slots_kernel_of(level.block), "launch of topk_slots_kernel", stream,
                          static_cast<uint32_t>(params.rows * level.pieces), static_cast<uint32_t>(level.block.threads),
                          params, level);
}

}  // namespace backend
}  // namespace sgl_kernel
