// NSA metadata straight from seq_lens, req_pool_indices and req_to_token into every field of N destinations,
// in one launch. The functions that say what a length is are shared by the CPU and the CUDA library; no torch
// in here.
#pragma once

#include <cstdint>

#include "backend.h"

namespace sgl_kernel {

constexpr int kMaxGenerateDestinations = 32;  // destinations in one launch
constexpr int kLoadsInFlight = 4;             // of 16 bytes, a thread
constexpr int kColumnsPerLoad = 4;
constexpr int kWarpColumns = 32 * kLoadsInFlight * kColumnsPerLoad;

// Threads of a block, of which there are two kernels. Where each block has one tile, smaller tiles keep the memory busy
// until the end (1.7 % of a large table); where it has several, or many requests' vectors, more threads are faster.
constexpr int kFewThreads = 64, kManyThreads = 128;
constexpr int kResidentThreads = 1024;  // of an SM: 64 registers each
SGLK_HOST_DEVICE constexpr int tile_columns(int threads) { return threads / 32 * kWarpColumns; }

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
  int32_t num_vectors;
  int32_t num_tables;
  int32_t max_cols;     // columns of req_to_token that some table may need
  int32_t max_offset;   // largest seqlens_offset of the tables
  int32_t common_cols;  // columns that every page_table_1 has; 0 where rows do not move 16 bytes at a time
  int32_t min_offset;   // smallest seqlens_offset of the tables
  bool seq_lens_64;
  bool req_pool_indices_64;
  bool packed;  // DRAFT_EXTEND: rows of a request follow each other without gaps
  // A column's slot is that of its page's first column and the distance to it: only those are read. The page size is
  // then a power of two, four columns that move at once are of one page, and the tables' rows are aligned.
  bool whole_pages;
  bool has_pages;
  bool pages_by_warp;  // a warp's columns begin 32 pages at most, each with the first token of a load
  GenerateTables tables[kMaxGenerateDestinations];
  GenerateVectors vectors[kMaxGenerateDestinations];

  bool counts_fit() const {
    return num_vectors >= 0 && num_vectors <= kMaxGenerateDestinations && num_tables >= 0 &&
           num_tables <= kMaxGenerateDestinations;
  }
};

// The blocks that write tables: `pieces` for each request, of which each takes every `pieces`-th tile.
struct TableGrid {
  int32_t threads;  // of every block of the launch
  int32_t blocks;
  int32_t pieces;
  Divisor by_pieces;
};
static_assert(sizeof(GenerateParams) + sizeof(TableGrid) <= 4096, "both must fit in the kernel argument space");

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

}  // namespace sgl_kernel
