// NSA metadata straight from seq_lens, req_pool_indices and req_to_token into every field of N destinations,
// in one launch. The functions that say what a length is are shared by the CPU and the CUDA library; no torch
// in here.
#pragma once

#include <cstdint>

#include "backend.h"

namespace sgl_kernel {

constexpr int kMaxGenerateDestinations = 32;  // destinations in one launch
constexpr int kGenerateThreads = 128;         // of a block
constexpr int kGenerateBlocksPerSm = 8;       // resident together: 64 registers a thread
constexpr int kLoadsInFlight = 4;             // of 16 bytes, a thread
constexpr int kColumnsPerLoad = 4;
constexpr int kWarpColumns = 32 * kLoadsInFlight * kColumnsPerLoad;
constexpr int kTileColumns = kGenerateThreads / 32 * kWarpColumns;

// Lengths, offsets and rows are bounded so that every length of a row fits in 32 bits.
constexpr int32_t kMaxLength = 1 << 30;  // a longer sequence counts as this long
constexpr int32_t kMaxOffset = 1 << 24;  // of seqlens_offset, either sign
constexpr int32_t kMaxRows = 1 << 24;

enum class Mode : int32_t { kDecode = 0, kTargetVerify = 1, kDraftExtend = 2 };

// Division of 0 .. 2^31 - 1 by a number that the host knows: a multiplication and a shift.
struct Divisor {
  uint32_t multiplier;  // ceil(2^(31 + shift) / number)
  uint32_t shift;       // ceil(log2(number))
};

inline Divisor divisor(int64_t number) {
  uint32_t shift = 0;
  while ((int64_t{1} << shift) < number) ++shift;
  const uint64_t d = static_cast<uint64_t>(number);
  return {static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + d - 1) / d), shift};
}

SGLK_HOST_DEVICE int32_t divide(int32_t value, Divisor by) {
  const uint64_t twice = static_cast<uint64_t>(static_cast<uint32_t>(value) * 2);
  return static_cast<int32_t>(static_cast<uint32_t>(twice * by.multiplier >> 32) >> by.shift);
}

// The per-request and per-row vectors of one destination; all int32, null where it does not have them.
struct GenerateVectors {
  int32_t* cache_seqlens;      // [bs]
  int32_t* cu_seqlens_k;       // [bs + 1]
  int32_t* nsa_cache_seqlens;  // [rows]
  int32_t* nsa_cu_seqlens_k;   // [rows + 1]
  int32_t* seqlens_expanded;   // [rows]
  int32_t seqlens_offset;      // added to every seq_len
};

// The page tables of one destination; one that is absent is null and 0 wide. Destinations that share their tables share
// one entry, those without tables have none.
struct GenerateTables {
  int32_t* page_table_1;     // [rows, width1], row stride stride1
  int32_t* real_page_table;  // [rows, width2], row stride stride2
  int64_t stride1;
  int64_t stride2;
  int32_t seqlens_offset;
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
  Mode mode;
  int32_t bs;
  int32_t rows_per_req;  // row stride of a request (static layout); at most this many rows (packed)
  int32_t topk;
  int32_t page_size;
  Divisor by_page_size;
  Divisor by_first_chunks;
  int32_t num_vectors;
  int32_t num_tables;
  int32_t max_cols;      // columns of req_to_token that some table may need
  int32_t max_offset;    // largest seqlens_offset of the tables
  int32_t common_cols;   // columns that every page_table_1 has; 0 where a row of a table is not aligned to 16 bytes
  int32_t min_offset;    // smallest seqlens_offset of the tables
  int32_t table_blocks;  // blocks that write tables
  int32_t first_chunks;  // tiles of every request that they write first
  bool seq_lens_64;
  bool req_pool_indices_64;
  bool packed;  // DRAFT_EXTEND: rows of a request follow each other without gaps
  bool has_pages;
  bool pages_by_warp;  // a warp's columns begin 32 pages at most, each with the first token of a load
  GenerateTables tables[kMaxGenerateDestinations];
  GenerateVectors vectors[kMaxGenerateDestinations];

  bool counts_fit() const {
    return num_vectors >= 0 && num_vectors <= kMaxGenerateDestinations && num_tables >= 0 &&
           num_tables <= kMaxGenerateDestinations;
  }
};
static_assert(sizeof(GenerateParams) <= 4096, "GenerateParams must fit in the kernel argument space");

SGLK_HOST_DEVICE int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
SGLK_HOST_DEVICE int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

SGLK_HOST_DEVICE int64_t load_integer(const void* data, bool is_64, int32_t i) {
  return is_64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
}

SGLK_HOST_DEVICE int32_t seq_len(const GenerateParams& p, int32_t i) {
  const int64_t len = load_integer(p.seq_lens, p.seq_lens_64, i);
  return len > kMaxLength ? kMaxLength : len < -kMaxLength ? -kMaxLength : static_cast<int32_t>(len);
}

// Length of a request's KV cache as seen by a destination: never negative.
SGLK_HOST_DEVICE int32_t kv_len(int32_t seq_len, int32_t offset) { return larger(seq_len + offset, 0); }

// Tokens that request i accepted, in [0, rows_per_req]; 0 outside DRAFT_EXTEND.
SGLK_HOST_DEVICE int32_t accept_len(const GenerateParams& p, Mode mode, int32_t i) {
  return mode == Mode::kDraftExtend ? smaller(larger(p.accept_lens[i], 0), p.rows_per_req) : 0;
}

// What a request gives to every destination.
struct Request {
  int32_t seq_len;
  int32_t accepted;
};

SGLK_HOST_DEVICE Request load_request(const GenerateParams& p, Mode mode, int32_t i) {
  return {seq_len(p, i), accept_len(p, mode, i)};
}

SGLK_HOST_DEVICE int32_t num_rows(const GenerateParams& p, Mode mode, int32_t accepted) {
  if (mode == Mode::kDecode) return 1;
  return mode == Mode::kDraftExtend && p.packed ? accepted : p.rows_per_req;
}

// Rows that attend to something; the rows behind them have length 0.
SGLK_HOST_DEVICE int32_t num_live_rows(const GenerateParams& p, Mode mode, int32_t accepted) {
  return mode == Mode::kDecode ? 1 : mode == Mode::kDraftExtend ? accepted : p.rows_per_req;
}

SGLK_HOST_DEVICE int32_t cache_seqlen(const GenerateParams& p, Mode mode, int32_t kv) {
  return mode == Mode::kTargetVerify ? kv + p.rows_per_req : kv;
}

// Length that row j of a request attends to.
SGLK_HOST_DEVICE int32_t row_len(Mode mode, int32_t kv, int32_t accepted, int32_t j) {
  if (mode == Mode::kDecode) return kv;
  if (mode == Mode::kTargetVerify) return kv + 1 + j;
  return j < accepted ? larger(kv - accepted + 1 + j, 0) : 0;
}

// Pool indices come from the device: one that is out of range reads row 0, the row reserved for padding.
SGLK_HOST_DEVICE const int32_t* token_row(const GenerateParams& p, int32_t i) {
  const int64_t index = load_integer(p.req_pool_indices, p.req_pool_indices_64, i);
  return p.req_to_token + (index >= 0 && index < p.pool_size ? index : 0) * p.token_stride;
}

// Rounds down, as torch's // does.
SGLK_HOST_DEVICE int32_t page_of_token(const GenerateParams& p, int32_t token) {
  const int32_t sign = token >> 31;
  return divide(token ^ sign, p.by_page_size) ^ sign;
}

#if defined(__CUDACC__)

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
template <int kCount>
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
  for (int w = 0; w < kGenerateThreads / 32; ++w) {
    if (w == warp) mine.add(carry);
    carry.add(warp_totals[w]);
  }
  return mine;
}

// One block writes all vectors of one destination, a thread those of one request at a time; the next one is loaded
// meanwhile.
template <Mode kMode>
__device__ __forceinline__ void write_vectors(const GenerateParams& p, const GenerateVectors& out) {
  enum { kKv, kNsa, kRows };  // the sums; rows may follow each other without gaps in DRAFT_EXTEND alone
  constexpr int kCount = kMode == Mode::kDraftExtend ? 3 : 2;
  __shared__ Sums<kCount> warp_totals[2][kGenerateThreads / 32];
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
  for (int32_t first = 0; first < p.bs; first += kGenerateThreads, parity ^= 1) {
    const int32_t i = first + thread;
    const Request request = ahead;
    if (i + kGenerateThreads < p.bs) ahead = load_request(p, kMode, i + kGenerateThreads);
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
      const Sums<kCount> end = block_inclusive_sum(mine, warp_totals[parity], carry);
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

// First row of request i when rows are packed: the accepted tokens of all requests before it.
__device__ __forceinline__ int64_t packed_row(const GenerateParams& p, int32_t i) {
  uint32_t before = 0;
  for (int32_t k = static_cast<int32_t>(threadIdx.x & 31); k < i; k += 32) {
    before += static_cast<uint32_t>(accept_len(p, Mode::kDraftExtend, k));
  }
  return __reduce_add_sync(~0u, before);
}

// Columns of a request that some table needs.
template <Mode kMode>
__device__ __forceinline__ int32_t needed_columns(const GenerateParams& p, Request request) {
  const int32_t rows = num_live_rows(p, kMode, request.accepted);
  if (rows == 0) return 0;
  return smaller(row_len(kMode, kv_len(request.seq_len, p.max_offset), request.accepted, rows - 1), p.max_cols);
}

// The same of the longest request. Every warp asks for itself.
template <Mode kMode>
__device__ __forceinline__ int32_t most_needed_columns(const GenerateParams& p) {
  int32_t most = 0;
#pragma unroll 4
  for (int32_t i = static_cast<int32_t>(threadIdx.x & 31); i < p.bs; i += 32) {
    most = larger(most, needed_columns<kMode>(p, load_request(p, kMode, i)));
  }
  return __reduce_max_sync(~0u, most);
}

// A tile in one request: where its columns come from and go to.
struct Tile {
  Request request;
  int32_t rows;  // live rows of the request
  int64_t row0;  // its first row
  const int32_t* tokens;
  int32_t begin, end;  // columns; all tables together need no more
};

// The pages that begin in a warp's part of a tile that all rows have whole, a lane each: their tokens are in registers
// of the warp, and their numbers leave it side by side.
__device__ __forceinline__ void write_warp_pages(const GenerateParams& p, const Tile& tile, int32_t begin,
                                                 const int4 (&tokens)[kLoadsInFlight]) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) & 31;
  const int32_t page = (begin == 0 ? 0 : divide(begin - 1, p.by_page_size) + 1) + lane;
  const int64_t at = int64_t{page} * p.page_size - begin;
  const int32_t load = static_cast<int32_t>(at) / (32 * kColumnsPerLoad);
  const int32_t owner = static_cast<int32_t>(at) / kColumnsPerLoad & 31;
  int32_t token = 0;
#pragma unroll
  for (int k = 0; k < kLoadsInFlight; ++k) {
    const int32_t theirs = __shfl_sync(~0u, tokens[k].x, owner);
    if (load == k) token = theirs;
  }
  if (at >= kWarpColumns) return;
  const int32_t value = page_of_token(p, token);
#pragma unroll 1
  for (int32_t t = 0; t < p.num_tables; ++t) {
    const GenerateTables& table = p.tables[t];
    if (page >= table.width2) continue;
    int32_t* pages = table.real_page_table + tile.row0 * table.stride2 + page;
#pragma unroll 1
    for (int32_t j = 0; j < tile.rows; ++j, pages += table.stride2) *pages = value;
  }
}

// A tile that all rows of all tables have whole. The columns of a warp are one piece.
__device__ __forceinline__ void copy_whole_tile(const GenerateParams& p, const Tile& tile) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) & 31;
  const int32_t begin = tile.begin + (static_cast<int32_t>(threadIdx.x) >> 5) * kWarpColumns;
  const int32_t column = begin + lane * kColumnsPerLoad;
  const int4* const source = reinterpret_cast<const int4*>(tile.tokens + column);
  int4 tokens[kLoadsInFlight];
#pragma unroll
  for (int k = 0; k < kLoadsInFlight; ++k) tokens[k] = __ldg(source + k * 32);
#pragma unroll 1
  for (int32_t t = 0; t < p.num_tables; ++t) {
    const GenerateTables& table = p.tables[t];
    if (table.page_table_1 == nullptr) continue;
    int32_t* row = table.page_table_1 + tile.row0 * table.stride1 + column;
#pragma unroll 1
    for (int32_t j = 0; j < tile.rows; ++j, row += table.stride1) {
#pragma unroll
      for (int k = 0; k < kLoadsInFlight; ++k) reinterpret_cast<int4*>(row)[k * 32] = tokens[k];
    }
  }
  if (p.pages_by_warp) write_warp_pages(p, tile, begin, tokens);
}

// A tile in which rows end, or whose rows are not aligned: as many bytes in flight, 4 at a time.
template <Mode kMode>
__device__ __forceinline__ void copy_ragged_tile(const GenerateParams& p, const Tile& tile) {
  constexpr int kColumns = kLoadsInFlight * kColumnsPerLoad;
  const int32_t column = tile.begin + static_cast<int32_t>(threadIdx.x);
  int32_t tokens[kColumns];
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    if (column + k * kGenerateThreads < tile.end) tokens[k] = __ldg(tile.tokens + column + k * kGenerateThreads);
  }
#pragma unroll 1
  for (int32_t t = 0; t < p.num_tables; ++t) {
    const GenerateTables& table = p.tables[t];
    if (table.page_table_1 == nullptr) continue;
    const int32_t kv = kv_len(tile.request.seq_len, table.seqlens_offset);
    int32_t* row = table.page_table_1 + tile.row0 * table.stride1 + column;
#pragma unroll 1
    for (int32_t j = 0; j < tile.rows; ++j, row += table.stride1) {
      const int32_t left = smaller(row_len(kMode, kv, tile.request.accepted, j), table.width1) - column;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        if (k * kGenerateThreads < left) row[k * kGenerateThreads] = tokens[k];
      }
    }
  }
}

// The pages that begin in a tile, a thread each. Their tokens were just loaded.
template <Mode kMode>
__device__ __forceinline__ void write_pages(const GenerateParams& p, const Tile& tile) {
  const int32_t first = tile.begin == 0 ? 0 : divide(tile.begin - 1, p.by_page_size) + 1;
  for (int64_t page = first + static_cast<int32_t>(threadIdx.x); page * p.page_size < tile.end;
       page += kGenerateThreads) {
    const int32_t column = static_cast<int32_t>(page) * p.page_size;
    const int32_t value = page_of_token(p, __ldg(tile.tokens + column));
#pragma unroll 1
    for (int32_t t = 0; t < p.num_tables; ++t) {
      const GenerateTables& table = p.tables[t];
      if (page >= table.width2) continue;
      const int32_t kv = kv_len(tile.request.seq_len, table.seqlens_offset);
      int32_t* pages = table.real_page_table + tile.row0 * table.stride2 + page;
#pragma unroll 1
      for (int32_t j = 0; j < tile.rows; ++j, pages += table.stride2) {
        if (column < row_len(kMode, kv, tile.request.accepted, j)) *pages = value;
      }
    }
  }
}

template <Mode kMode>
__device__ __forceinline__ void write_tile(const GenerateParams& p, int32_t i, int32_t chunk) {
  // Both loads are under way before either is needed: a launch this short is a chain of memory latencies.
  Tile tile;
  tile.request = load_request(p, kMode, i);
  tile.tokens = token_row(p, i);
  tile.begin = chunk * kTileColumns;
  tile.end = smaller(needed_columns<kMode>(p, tile.request), tile.begin + kTileColumns);
  if (tile.begin >= tile.end) return;
  tile.rows = num_live_rows(p, kMode, tile.request.accepted);
  const bool packed = kMode == Mode::kDraftExtend && p.packed;
  tile.row0 = packed ? packed_row(p, i) : static_cast<int64_t>(i) * p.rows_per_req;

  const int32_t shortest = row_len(kMode, kv_len(tile.request.seq_len, p.min_offset), tile.request.accepted, 0);
  const bool whole = tile.begin + kTileColumns <= smaller(shortest, p.common_cols);
  if (whole) {
    copy_whole_tile(p, tile);
  } else {
    copy_ragged_tile<kMode>(p, tile);
  }
  if (p.has_pages && !(whole && p.pages_by_warp)) write_pages<kMode>(p, tile);
}

// First the first tiles of every request, one for each block: short requests need no other, and a tile is found without
// the lengths of the others. Then what is left of the rows, row after row, since rows in turn cost more misses of the
// address translation; a block takes every table_blocks-th tile, so that few long requests keep all blocks busy.
template <Mode kMode>
__device__ __forceinline__ void write_tables(const GenerateParams& p, int32_t block) {
#pragma unroll 1
  for (int32_t tile = block; tile < p.first_chunks * p.bs; tile += p.table_blocks) {
    const int32_t i = divide(tile, p.by_first_chunks);
    write_tile<kMode>(p, i, tile - i * p.first_chunks);
  }
  if (p.first_chunks * int64_t{kTileColumns} >= p.max_cols) return;

  const int32_t left = (most_needed_columns<kMode>(p) + kTileColumns - 1) / kTileColumns - p.first_chunks;
  if (left <= 0) return;  // tiles of the longest request
  const int32_t requests = p.table_blocks / left, chunks = p.table_blocks - requests * left;
  int32_t i = block / left, chunk = block - i * left;
#pragma unroll 1
  while (i < p.bs) {
    write_tile<kMode>(p, i, p.first_chunks + chunk);
    i += requests, chunk += chunks;
    if (chunk >= left) chunk -= left, ++i;
  }
}

// Grid: num_vectors blocks for the vectors, then table_blocks for the tables. It depends on the plan alone, so that the
// launch can be captured.
template <Mode kMode>
__global__ void __launch_bounds__(kGenerateThreads, kGenerateBlocksPerSm)
    nsa_metadata_generate_kernel(const __grid_constant__ GenerateParams params) {
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  if (block < params.num_vectors) {
    write_vectors<kMode>(params, params.vectors[block]);
  } else {
    write_tables<kMode>(params, block - params.num_vectors);
  }
}

#endif  // __CUDACC__

}  // namespace sgl_kernel
