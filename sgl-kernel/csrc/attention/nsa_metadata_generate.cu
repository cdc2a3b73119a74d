// CUDA backend: the launch of the generation kernel, of which there is one for each mode.
#include "attention/cuda_launch.h"
#include "attention/nsa_metadata_generate.cuh"
#include "backend.h"

namespace sgl_kernel {
namespace {

using Kernel = void (*)(const GenerateParams, const TableGrid);
constexpr Kernel kKernels[] = {nsa_metadata_generate_kernel<Mode::kDecode>,
                               nsa_metadata_generate_kernel<Mode::kTargetVerify>,
                               nsa_metadata_generate_kernel<Mode::kDraftExtend>};

}  // namespace

void load_generate_kernels() {
  for (const Kernel kernel : kKernels) load_kernel(kernel, "loading nsa_metadata_generate_kernel");
}

namespace backend {

void launch_generate(const GenerateParams& params, const TableGrid& grid, const Stream& stream) {
  const uint32_t blocks = static_cast<uint32_t>(params.num_vectors + grid.blocks);
  if (blocks == 0) return;
  launch_kernel(kKernels[static_cast<int32_t>(params.mode)], "launch of nsa_metadata_generate_kernel", stream, blocks,
                kGenerateThreads, params, grid);
}

}  // namespace backend
}  // namespace sgl_kernel
