// NSA metadata straight from seq_lens, req_pool_indices and req_to_token into every field of N destinations,
// in one launch. The functions that say what a length is are shared by the CPU and the CUDA library; no torch
// in here.
#pragma once

#include <cstdint>

#include "backend.h"

namespace sgl_kernel {

constexpr int kMaxGenerateDestinations = 32;  // destinations in one launch
constexpr int kColumnsPerThread = 4;
constexpr int kColumnsPerBlock = kBlockThreads * kColumnsPerThread;

enum class Mode : int32_t { kDecode = 0, kTargetVerify = 1, kDraftExtend = 2 };

// The per-request and per-row vectors of one destination; all int32, null where it does not have them.
struct GenerateVectors {
  int32_t* cache_seqlens;      // [bs]
  int32_t* cu_seqlens_k;       // [bs + 1]
  int32_t* nsa_cache_seqlens;  // [rows]
  int32_t* nsa_cu_seqlens_k;   // [rows + 1]
  int32_t* seqlens_expanded;   // [rows]
  int64_t seqlens_offset;      // added to every seq_len
};

// The page tables of one destination; one that is absent is null and 0 wide. Destinations that share their tables share
// one entry, those without tables have none.
struct GenerateTables {
  int32_t* page_table_1;     // [rows, width1], row stride stride1
  int32_t* real_page_table;  // [rows, width2], row stride stride2
  int64_t stride1;
  int64_t stride2;
  int64_t seqlens_offset;
  int32_t width1;
  int32_t width2;
};

struct GenerateParams {
  const void* seq_lens;          // [bs], int32 or int64
  const void* req_pool_indices;  // [bs], int32 or int64
  const int32_t* req_to_token;   // [pool_size, *], row stride token_stride
  const int32_t* accept_lens;    // [bs], DRAFT_EXTEND only
  int64_t token_stride;
  int64_t pool_size;
  int64_t max_offset;  // largest seqlens_offset of the tables
  int32_t topk;
  int32_t page_size;
  int32_t page_shift;  // log2(page_size), or -1 when it is no power of two
  int32_t bs;
  int32_t rows_per_req;  // row stride of a request (static layout); at most this many rows (packed)
  int32_t max_cols;      // columns of req_to_token that some table may need
  int32_t col_blocks;    // blocks side by side on one request
  int32_t num_vectors;
  int32_t num_tables;
  Mode mode;
  bool seq_lens_64;
  bool req_pool_indices_64;
  bool packed;   // DRAFT_EXTEND: rows of a request follow each other without gaps
  bool aligned;  // every table row and every row of req_to_token starts on 16 bytes
  GenerateVectors vectors[kMaxGenerateDestinations];
  GenerateTables tables[kMaxGenerateDestinations];
};
static_assert(sizeof(GenerateParams) <= 4096, "GenerateParams must fit in the kernel argument space");

SGLK_HOST_DEVICE int64_t load_integer(const void* data, bool is_64, int32_t i) {
  return is_64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
}

SGLK_HOST_DEVICE int64_t seq_len(const GenerateParams& p, int32_t i) {
  return load_integer(p.seq_lens, p.seq_lens_64, i);
}

// Length of a request's KV cache as seen by a destination: never negative.
SGLK_HOST_DEVICE int64_t kv_len(int64_t seq_len, int64_t offset) {
  const int64_t len = static_cast<int64_t>(static_cast<uint64_t>(seq_len) + static_cast<uint64_t>(offset));
  return len > 0 ? len : 0;
}

// Tokens that request i accepted, in [0, rows_per_req]; 0 outside DRAFT_EXTEND.
SGLK_HOST_DEVICE int32_t accept_len(const GenerateParams& p, int32_t i) {
  if (p.mode != Mode::kDraftExtend) return 0;
  const int32_t accepted = p.accept_lens[i];
  return accepted < 0 ? 0 : accepted < p.rows_per_req ? accepted : p.rows_per_req;
}

SGLK_HOST_DEVICE int32_t num_rows(const GenerateParams& p, int32_t accepted) {
  return p.packed ? accepted : p.rows_per_req;
}

SGLK_HOST_DEVICE int64_t cache_seqlen(const GenerateParams& p, int64_t kv) {
  return p.mode == Mode::kTargetVerify ? kv + p.rows_per_req : kv;
}

// Length that row j of a request attends to.
SGLK_HOST_DEVICE int64_t row_len(const GenerateParams& p, int64_t kv, int32_t accepted, int32_t j) {
  if (p.mode == Mode::kDecode) return kv;
  if (p.mode == Mode::kTargetVerify) return kv + 1 + j;
  const int64_t len = kv - accepted + 1 + j;
  return j < accepted && len > 0 ? len : 0;
}

// Pool indices come from the device: one that is out of range reads row 0, the row reserved for padding.
SGLK_HOST_DEVICE const int32_t* token_row(const GenerateParams& p, int32_t i) {
  const int64_t index = load_integer(p.req_pool_indices, p.req_pool_indices_64, i);
  return p.req_to_token + (index >= 0 && index < p.pool_size ? index : 0) * p.token_stride;
}

SGLK_HOST_DEVICE int32_t page_of_column(const GenerateParams& p, int32_t column) {
  return p.page_shift >= 0 ? column >> p.page_shift : column / p.page_size;
}

// Rounds down, as torch's // does.
SGLK_HOST_DEVICE int32_t page_of_token(const GenerateParams& p, int32_t token) {
  if (p.page_shift >= 0) return token >> p.page_shift;
  const int32_t quotient = token / p.page_size;
  return quotient - (token % p.page_size < 0);
}

SGLK_HOST_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

#if defined(__CUDACC__)

// What a thread needs of all threads before it. Sums are taken modulo 2^32, as the int32 results are.
struct Sums {
  uint32_t rows, kv, nsa;
};

__device__ __forceinline__ Sums operator+(Sums a, Sums b) { return {a.rows + b.rows, a.kv + b.kv, a.nsa + b.nsa}; }

// Exclusive prefix sum over the threads of the block.
__device__ __forceinline__ Sums block_exclusive_sum(Sums mine) {
  constexpr int kWarps = kBlockThreads / 32;
  __shared__ Sums warp_total[kWarps];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Sums inclusive = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Sums left{__shfl_up_sync(~0u, inclusive.rows, step), __shfl_up_sync(~0u, inclusive.kv, step),
                    __shfl_up_sync(~0u, inclusive.nsa, step)};
    if (lane >= step) inclusive = inclusive + left;
  }
  if (lane == 31) warp_total[warp] = inclusive;
  __syncthreads();
  Sums before{0, 0, 0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before = before + warp_total[w];
  }
  return {before.rows + inclusive.rows - mine.rows, before.kv + inclusive.kv - mine.kv,
          before.nsa + inclusive.nsa - mine.nsa};
}

// One block writes all vectors of one destination. Each thread owns consecutive requests: it sums them,
// learns what lies before them, and walks them again to write.
__device__ __forceinline__ void write_vectors(const GenerateParams& p, const GenerateVectors& out) {
  const int32_t per_thread = (p.bs + kBlockThreads - 1) / kBlockThreads;
  const int32_t begin = min(static_cast<int32_t>(threadIdx.x) * per_thread, p.bs);
  const int32_t end = min(begin + per_thread, p.bs);

  Sums sums{0, 0, 0};
  for (int32_t i = begin; i < end; ++i) {
    const int64_t kv = kv_len(seq_len(p, i), out.seqlens_offset);
    const int32_t accepted = accept_len(p, i), rows = num_rows(p, accepted);
    sums.rows += rows;
    sums.kv += static_cast<uint32_t>(cache_seqlen(p, kv));
    for (int32_t j = 0; j < rows; ++j) sums.nsa += static_cast<uint32_t>(smaller(row_len(p, kv, accepted, j), p.topk));
  }
  Sums at = block_exclusive_sum(sums);

  if (threadIdx.x == 0) {
    if (out.cu_seqlens_k != nullptr) out.cu_seqlens_k[0] = 0;
    if (out.nsa_cu_seqlens_k != nullptr) out.nsa_cu_seqlens_k[0] = 0;
  }
  for (int32_t i = begin; i < end; ++i) {
    const int64_t kv = kv_len(seq_len(p, i), out.seqlens_offset);
    const int32_t accepted = accept_len(p, i), rows = num_rows(p, accepted);
    const int64_t cached = cache_seqlen(p, kv);
    at.kv += static_cast<uint32_t>(cached);
    if (out.cache_seqlens != nullptr) out.cache_seqlens[i] = static_cast<int32_t>(cached);
    if (out.cu_seqlens_k != nullptr) out.cu_seqlens_k[i + 1] = static_cast<int32_t>(at.kv);
    for (int32_t j = 0; j < rows; ++j, ++at.rows) {
      const int64_t len = row_len(p, kv, accepted, j), kept = smaller(len, p.topk);
      at.nsa += static_cast<uint32_t>(kept);
      if (out.nsa_cache_seqlens != nullptr) out.nsa_cache_seqlens[at.rows] = static_cast<int32_t>(kept);
      if (out.nsa_cu_seqlens_k != nullptr) out.nsa_cu_seqlens_k[at.rows + 1] = static_cast<int32_t>(at.nsa);
      if (out.seqlens_expanded != nullptr) out.seqlens_expanded[at.rows] = static_cast<int32_t>(len);
    }
  }
}

// First row of request i when rows are packed: the accepted tokens of all requests before it. All threads
// return it.
__device__ __forceinline__ uint32_t packed_row(const GenerateParams& p, int32_t i) {
  __shared__ uint32_t total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  uint32_t mine = 0;
  for (int32_t k = threadIdx.x; k < i; k += kBlockThreads) mine += accept_len(p, k);
  mine = __reduce_add_sync(~0u, mine);
  if ((threadIdx.x & 31) == 0) atomicAdd(&total, mine);
  __syncthreads();
  return total;
}

// Writes columns of all rows of request i in all tables: block `col_block` of p.col_blocks. The columns are
// read once.
// kPageStarts: of a thread's columns only the first so many can start a page.
template <bool kAligned, int kPageStarts>
__device__ __forceinline__ void write_tables(const GenerateParams& p, int32_t i, int32_t col_block) {
  const int32_t accepted = accept_len(p, i), rows = num_rows(p, accepted);
  const int32_t last = p.mode == Mode::kDraftExtend ? accepted - 1 : rows - 1;  // the longest row
  if (last < 0) return;
  // Both loads are under way before either is needed: a launch this short is a chain of memory latencies.
  const int64_t seq = seq_len(p, i);
  const int32_t* const tokens = token_row(p, i);
  const int32_t bound =
      static_cast<int32_t>(smaller(row_len(p, kv_len(seq, p.max_offset), accepted, last), p.max_cols));
  if (col_block >= (bound + kColumnsPerBlock - 1) / kColumnsPerBlock) return;

  const int64_t row0 = p.packed ? packed_row(p, i) : static_cast<int64_t>(i) * p.rows_per_req;
  constexpr int32_t kStep = kAligned ? 1 : kBlockThreads;  // between the columns of one thread

  for (int64_t block = col_block; block * kColumnsPerBlock < bound; block += p.col_blocks) {
    const int32_t col0 = static_cast<int32_t>(block * kColumnsPerBlock) +
                         static_cast<int32_t>(threadIdx.x) * (kAligned ? kColumnsPerThread : 1);
    if (col0 >= bound) continue;
    int32_t token[kColumnsPerThread];
    if (kAligned && col0 + kColumnsPerThread <= bound) {
      const int4 four = __ldg(reinterpret_cast<const int4*>(tokens + col0));
      token[0] = four.x, token[1] = four.y, token[2] = four.z, token[3] = four.w;
    } else {
#pragma unroll
      for (int k = 0; k < kColumnsPerThread; ++k) {
        if (col0 + k * kStep < bound) token[k] = __ldg(tokens + col0 + k * kStep);
      }
    }
    uint32_t page_starts = 0;  // bit k: a page starts at my column k
#pragma unroll
    for (int k = 0; k < kPageStarts; ++k) {
      const int32_t col = col0 + k * kStep;
      if (col < bound && page_of_column(p, col) * p.page_size == col) page_starts |= 1u << k;
    }

    for (int32_t t = 0; t < p.num_tables; ++t) {
      const GenerateTables& table = p.tables[t];
      const int64_t kv = kv_len(seq, table.seqlens_offset);
      for (int32_t j = 0; j < rows; ++j) {
        const int64_t len = row_len(p, kv, accepted, j);
        const int32_t live = static_cast<int32_t>(smaller(len, table.width1));
        int32_t* const row = table.page_table_1 + (row0 + j) * table.stride1;
        if (kAligned && col0 + kColumnsPerThread <= live) {
          *reinterpret_cast<int4*>(row + col0) = make_int4(token[0], token[1], token[2], token[3]);
        } else {
#pragma unroll
          for (int k = 0; k < kColumnsPerThread; ++k) {
            if (col0 + k * kStep < live) row[col0 + k * kStep] = token[k];
          }
        }
        if (page_starts == 0 || table.real_page_table == nullptr) continue;
        int32_t* const pages = table.real_page_table + (row0 + j) * table.stride2;
#pragma unroll
        for (int k = 0; k < kPageStarts; ++k) {
          const int32_t col = col0 + k * kStep, page = page_of_column(p, col);
          if ((page_starts >> k & 1) && page < table.width2 && col < len) pages[page] = page_of_token(p, token[k]);
        }
      }
    }
  }
}

// Grid: num_vectors blocks for the vectors, then bs x col_blocks blocks for the tables. It depends on the
// plan alone, so that the launch can be captured; blocks past a request's length leave at once.
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerSm)
    nsa_metadata_generate_kernel(const __grid_constant__ GenerateParams params) {
  const int32_t num_vectors = params.num_vectors;
  if (static_cast<int32_t>(blockIdx.x) < num_vectors) {
    write_vectors(params, params.vectors[blockIdx.x]);
    return;
  }
  const int32_t block = static_cast<int32_t>(blockIdx.x) - num_vectors;
  const int32_t request = block / params.col_blocks, col_block = block - request * params.col_blocks;
  if (params.aligned && params.page_size % kColumnsPerThread == 0) {
    write_tables<true, 1>(params, request, col_block);
  } else if (params.aligned) {
    write_tables<true, kColumnsPerThread>(params, request, col_block);
  } else {
    write_tables<false, kColumnsPerThread>(params, request, col_block);
  }
}

#endif  // __CUDACC__

}  // namespace sgl_kernel
