// CUDA backend: the launch of the generation kernel, of which there is one for each mode.
#include "attention/cuda_launch.h"
#include "attention/nsa_metadata_generate.cuh"
#include "backend.h"

namespace sgl_kernel {
namespace {

using Kernel = void (*)(const GenerateParams);
constexpr Kernel kKernels[] = {nsa_metadata_generate_kernel<Mode::kDecode>,
                               nsa_metadata_generate_kernel<Mode::kTargetVerify>,
                               nsa_metadata_generate_kernel<Mode::kDraftExtend>};

}  // namespace

void load_generate_kernels() {
  for (const Kernel kernel : kKernels) load_kernel(kernel, "loading nsa_metadata_generate_kernel");
}

namespace backend {

void launch_generate(const GenerateParams& params, int32_t device_index) {
  const uint32_t blocks = static_cast<uint32_t>(params.num_vectors + params.table_blocks);
  if (blocks == 0) return;
  launch_kernel(kKernels[static_cast<int32_t>(params.mode)], "launch of nsa_metadata_generate_kernel", blocks,
                kGenerateThreads, params, device_index);
}

}  // namespace backend
}  // namespace sgl_kernel
