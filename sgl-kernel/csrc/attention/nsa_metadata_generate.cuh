// The kernel of the generation: its first blocks write vectors, the others page tables.
#pragma once

#include "attention/nsa_metadata_tables.cuh"
#include "attention/nsa_metadata_vectors.cuh"

namespace sgl_kernel {

// Grid: num_vectors blocks, then grid.blocks. No length is needed for it, so that the launch can be captured.
template <Mode kMode, int kThreads, bool kWholePages>
__global__ void __launch_bounds__(kThreads, kResidentThreads / kThreads)
    nsa_metadata_generate_kernel(const __grid_constant__ TableGrid grid,
                                 const __grid_constant__ GenerateParams params) {
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  if (block < params.num_vectors) {
    write_vectors<kMode, kThreads>(params, params.vectors[block]);
  } else {
    write_tables<kMode, kThreads, kWholePages>(params, grid, block - params.num_vectors);
  }
}

using GenerateKernel = void (*)(const TableGrid, const GenerateParams);

template <bool kWholePages>
GenerateKernel generate_kernel(Mode mode, int threads) {
  constexpr GenerateKernel kFew[] = {nsa_metadata_generate_kernel<Mode::kDecode, kFewThreads, kWholePages>,
                                     nsa_metadata_generate_kernel<Mode::kTargetVerify, kFewThreads, kWholePages>,
                                     nsa_metadata_generate_kernel<Mode::kDraftExtend, kFewThreads, kWholePages>};
  constexpr GenerateKernel kMany[] = {nsa_metadata_generate_kernel<Mode::kDecode, kManyThreads, kWholePages>,
                                      nsa_metadata_generate_kernel<Mode::kTargetVerify, kManyThreads, kWholePages>,
                                      nsa_metadata_generate_kernel<Mode::kDraftExtend, kManyThreads, kWholePages>};
  return (threads == kFewThreads ? kFew : kMany)[static_cast<int32_t>(mode)];
}

inline GenerateKernel generate_kernel(Mode mode, int threads, bool whole_pages) {
  return whole_pages ? generate_kernel<true>(mode, threads) : generate_kernel<false>(mode, threads);
}

}  // namespace sgl_kernel
