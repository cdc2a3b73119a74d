// The CUDA kernels as a backend for CPU tensors, emulated. Blocks run last to first: no order may matter.
// clang-format off: torch must come before the emulation's macros, the kernels after them
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "cuda_emulation.h"

#include "attention/fused_metadata_copy.cuh"
#include "attention/nsa_metadata_generate.cuh"
#include "attention/paged_mqa_schedule.cuh"
// clang-format on

namespace sgl_kernel {

static_assert(kBlockThreads == emulation::kThreads);

namespace backend {

const char* device_name() { return "cpu"; }
int32_t device_type() { return aoti_torch_device_type_cpu(); }
void prepare(int32_t) {}
int32_t resident_blocks(int32_t) { return 6; }  // few, so that blocks take several tiles

void launch_copy(const CopyParams& params, int32_t) {
  gridDim.x = std::min(params.num_tiles, static_cast<uint32_t>(resident_blocks(0)));
  for (blockIdx.x = gridDim.x; blockIdx.x-- > 0;) {
    emulation::block.run([&] { fused_metadata_copy_kernel(params); });
  }
}

void launch_generate(const GenerateParams& params, int32_t) {
  const int32_t table_blocks = params.num_tables > 0 ? params.bs * params.col_blocks : 0;
  gridDim.x = static_cast<uint32_t>(params.num_vectors + table_blocks);
  for (blockIdx.x = gridDim.x; blockIdx.x-- > 0;) {
    emulation::block.run([&] { nsa_metadata_generate_kernel(params); });
  }
}

void launch_paged_mqa_schedule(const PagedMQAScheduleParams& params, int32_t) {
  gridDim.x = static_cast<uint32_t>(params.num_schedules);
  for (blockIdx.x = gridDim.x; blockIdx.x-- > 0;) {
    emulation::block.run([&] { paged_mqa_schedule_kernel(params); });
  }
}

}  // namespace backend
}  // namespace sgl_kernel
