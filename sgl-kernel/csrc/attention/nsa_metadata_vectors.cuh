// The per-request and per-row vectors of one destination, by one block.
#pragma once

#include "attention/nsa_metadata_generate.h"

namespace sgl_kernel {

// Sums over requests, modulo 2^32, as the int32 results are.
template <int kCount>
struct Sums {
  uint32_t value[kCount];

  __device__ __forceinline__ void add(const Sums& other) {
#pragma unroll
    for (int s = 0; s < kCount; ++s) value[s] += other.value[s];
  }
};

// Prefix sums over the threads of the block, their own values included; `carry` is what lies before the block and grows
// by all of them. One barrier: calls that follow each other must alternate between two `warp_totals`.
template <int kThreads, int kCount>
__device__ __forceinline__ Sums<kCount> block_inclusive_sum(Sums<kCount> mine, Sums<kCount>* warp_totals,
                                                            Sums<kCount>& carry) {
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      const uint32_t left = __shfl_up_sync(~0u, mine.value[s], step);
      mine.value[s] += lane >= step ? left : 0;
    }
  }
  if (lane == 31) warp_totals[warp] = mine;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w == warp) mine.add(carry);
    carry.add(warp_totals[w]);
  }
  return mine;
}

// One block writes all vectors of one destination, a thread those of one request at a time; the next one is loaded
// meanwhile.
template <Mode kMode, int kThreads>
__device__ __forceinline__ void write_vectors(const GenerateParams& p, const GenerateVectors& out) {
  enum { kKv, kNsa, kRows };  // the sums; rows may follow each other without gaps in DRAFT_EXTEND alone
  constexpr int kCount = kMode == Mode::kDraftExtend ? 3 : 2;
  __shared__ Sums<kCount> warp_totals[2][kThreads / 32];
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const bool packed = kMode == Mode::kDraftExtend && p.packed;
  const bool needs_sums = out.cu_seqlens_k != nullptr || out.nsa_cu_seqlens_k != nullptr || packed;
  Request ahead{0, 0};
  if (thread < p.bs) ahead = load_request(p, kMode, thread);
  if (thread == 0) {
    if (out.cu_seqlens_k != nullptr) out.cu_seqlens_k[0] = 0;
    if (out.nsa_cu_seqlens_k != nullptr) out.nsa_cu_seqlens_k[0] = 0;
  }
  Sums<kCount> carry{};
  int parity = 0;
#pragma unroll 1
  for (int32_t first = 0; first < p.bs; first += kThreads, parity ^= 1) {
    const int32_t i = first + thread;
    const Request request = ahead;
    if (i + kThreads < p.bs) ahead = load_request(p, kMode, i + kThreads);
    const int32_t rows = i < p.bs ? num_rows(p, kMode, request.accepted) : 0;
    const int32_t kv = kv_len(request.seq_len, out.seqlens_offset), cached = cache_seqlen(p, kMode, kv);
    int32_t row = i * p.rows_per_req;
    uint32_t nsa = 0, kv_end = 0;
    if (needs_sums) {
      Sums<kCount> mine{};
      mine.value[kKv] = i < p.bs ? static_cast<uint32_t>(cached) : 0;
      for (int32_t j = 0; j < rows; ++j) {
        nsa += static_cast<uint32_t>(smaller(row_len(kMode, kv, request.accepted, j), p.topk));
      }
      mine.value[kNsa] = nsa;
      if constexpr (kMode == Mode::kDraftExtend) mine.value[kRows] = static_cast<uint32_t>(rows);
      const Sums<kCount> end = block_inclusive_sum<kThreads>(mine, warp_totals[parity], carry);
      kv_end = end.value[kKv];
      nsa = end.value[kNsa] - nsa;
      if constexpr (kMode == Mode::kDraftExtend) row = packed ? static_cast<int32_t>(end.value[kRows]) - rows : row;
    }
    if (i >= p.bs) continue;

    if (out.cache_seqlens != nullptr) out.cache_seqlens[i] = cached;
    if (out.cu_seqlens_k != nullptr) out.cu_seqlens_k[i + 1] = static_cast<int32_t>(kv_end);
    for (int32_t j = 0; j < rows; ++j, ++row) {
      const int32_t len = row_len(kMode, kv, request.accepted, j), kept = smaller(len, p.topk);
      nsa += static_cast<uint32_t>(kept);
      if (out.nsa_cache_seqlens != nullptr) out.nsa_cache_seqlens[row] = kept;
      if (out.nsa_cu_seqlens_k != nullptr) out.nsa_cu_seqlens_k[row + 1] = static_cast<int32_t>(nsa);
      if (out.seqlens_expanded != nullptr) out.seqlens_expanded[row] = len;
    }
  }
}

}  // namespace sgl_kernel
