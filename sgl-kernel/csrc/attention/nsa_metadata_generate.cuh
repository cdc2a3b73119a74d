// The kernel of the generation: its first blocks write vectors, the others page tables.
#pragma once

#include "attention/nsa_metadata_tables.cuh"
#include "attention/nsa_metadata_vectors.cuh"

namespace sgl_kernel {

// Grid: num_vectors blocks, then grid.blocks. No length is needed for it, so that the launch can be captured.
template <Mode kMode>
__global__ void __launch_bounds__(kGenerateThreads, kGenerateBlocksPerSm)
    nsa_metadata_generate_kernel(const __grid_constant__ GenerateParams params,
                                 const __grid_constant__ TableGrid grid) {
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  if (block < params.num_vectors) {
    write_vectors<kMode>(params, params.vectors[block]);
  } else {
    write_tables<kMode>(params, grid, block - params.num_vectors);
  }
}

}  // namespace sgl_kernel
