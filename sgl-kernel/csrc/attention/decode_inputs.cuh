// What a decode step's model reads of each request: its last token, that token's position and its slot. The function
// that says so is shared by the CPU and the CUDA library; no torch in here.
#pragma once

#include <cstdint>

#include "backend.h"

namespace sgl_kernel {

struct DecodeInputsParams {
  const void* seq_lens;          // [bs], int64 where wide_seq_lens, else int32
  const void* req_pool_indices;  // the same
  const int32_t* token_pool;     // [pool, width]: the tokens of every request
  const int32_t* req_to_token;   // [pool, width]: their slots
  int64_t token_stride, slot_stride;
  int64_t pool, width;
  int32_t* input_ids;  // [bs], as the next two
  int32_t* out_cache_loc;
  int32_t* positions;
  int32_t bs;
  bool wide_seq_lens, wide_indices;

  bool counts_fit() const { return bs >= 0; }
};

SGLK_HOST_DEVICE int64_t read_index(const void* data, bool wide, int32_t i) {
  return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
}

// The row and the column of request i's last token. What lies outside of the tables counts as row 0, the row reserved
// for padding, and as the nearest column.
SGLK_HOST_DEVICE void write_decode_inputs(const DecodeInputsParams& p, int32_t i) {
  const int64_t index = read_index(p.req_pool_indices, p.wide_indices, i);
  const int64_t last = read_index(p.seq_lens, p.wide_seq_lens, i) - 1;
  const int64_t row = index >= 0 && index < p.pool ? index : 0;
  const int64_t position = last < 0 ? 0 : last < p.width ? last : p.width - 1;
  p.input_ids[i] = p.token_pool[row * p.token_stride + position];
  p.out_cache_loc[i] = p.req_to_token[row * p.slot_stride + position];
  p.positions[i] = static_cast<int32_t>(position);
}

#if defined(__CUDACC__)

__global__ void __launch_bounds__(kBlockThreads)
    decode_inputs_kernel(const __grid_constant__ DecodeInputsParams params) {
  const int32_t i = static_cast<int32_t>(blockIdx.x * kBlockThreads + threadIdx.x);
  if (i < params.bs) write_decode_inputs(params, i);
}

#endif  // __CUDACC__

}  // namespace sgl_kernel
