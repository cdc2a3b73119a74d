// CUDA backend: the launch of the generation kernels.
#include "attention/cuda_launch.h"
#include "attention/nsa_metadata_generate.cuh"
#include "backend.h"

namespace sgl_kernel {

void load_generate_kernels() {
  for (const Mode mode : {Mode::kDecode, Mode::kTargetVerify, Mode::kDraftExtend}) {
    for (const int threads : {kFewThreads, kManyThreads}) {
      for (const bool whole_pages : {false, true}) {
        load_kernel(generate_kernel(mode, threads, whole_pages), "loading nsa_metadata_generate_kernel");
      }
    }
  }
}

namespace backend {

void launch_generate(const GenerateParams& params, const TableGrid& grid, const Stream& stream) {
  const uint32_t blocks = static_cast<uint32_t>(params.num_vectors + grid.blocks);
  if (blocks == 0) return;
  launch_kernel(generate_kernel(params.mode, grid.threads, params.whole_pages),
                "launch of nsa_metadata_generate_kernel", stream, blocks, static_cast<uint32_t>(grid.threads), grid,
                params);
}

}  // namespace backend
}  // namespace sgl_kernel
