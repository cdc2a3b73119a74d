// The kernel of the generation: its first blocks write vectors, the others page tables.
#pragma once

#include "attention/nsa_metadata_tables.cuh"
#include "attention/nsa_metadata_vectors.cuh"

namespace sgl_kernel {

// Grid: num_vectors blocks, then grid.blocks. No length is needed for it, so that the launch can be captured.
template <Mode kMode, int kThreads>
__global__ void __launch_bounds__(kThreads, kResidentThreads / kThreads)
    nsa_metadata_generate_kernel(const __grid_constant__ TableGrid grid,
                                 const __grid_constant__ GenerateParams params) {
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  if (block < params.num_vectors) {
    write_vectors<kMode, kThreads>(params, params.vectors[block]);
  } else {
    write_tables<kMode, kThreads>(params, grid, block - params.num_vectors);
  }
}

using GenerateKernel = void (*)(const TableGrid, const GenerateParams);

inline GenerateKernel generate_kernel(Mode mode, int threads) {
  constexpr GenerateKernel kFew[] = {nsa_metadata_generate_kernel<Mode::kDecode, kFewThreads>,
                                     nsa_metadata_generate_kernel<Mode::kTargetVerify, kFewThreads>,
                                     nsa_metadata_generate_kernel<Mode::kDraftExtend, kFewThreads>};
  constexpr GenerateKernel kMany[] = {nsa_metadata_generate_kernel<Mode::kDecode, kManyThreads>,
                                      nsa_metadata_generate_kernel<Mode::kTargetVerify, kManyThreads>,
                                      nsa_metadata_generate_kernel<Mode::kDraftExtend, kManyThreads>};
  return (threads == kFewThreads ? kFew : kMany)[static_cast<int32_t>(mode)];
}

}  // namespace sgl_kernel
