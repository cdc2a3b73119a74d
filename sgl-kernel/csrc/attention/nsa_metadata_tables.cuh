// The page tables of all destinations, in tiles.
#pragma once

#include "attention/nsa_metadata_generate.h"

namespace sgl_kernel {

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

// A tile of one request: where its columns come from and go to.
struct Tile {
  Request request;
  int32_t rows;  // live rows of the request
  int64_t row0;  // its first row
  const int32_t* tokens;
  int32_t begin, end;  // columns; all tables together need no more
};

// The page that a lane writes of a warp's columns, `begin` and on, all of which are in the registers of the warp.
struct LanePage {
  int32_t page, value;
  bool exists;
};
__device__ __forceinline__ LanePage lane_page(const GenerateParams& p, int32_t begin,
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
  return {page, page_of_token(p, token), at < kWarpColumns};
}

// The first `count` columns of the four that a thread loads and stores at once.
template <bool kWholePages>
__device__ __forceinline__ int4 load_columns(const GenerateParams& p, const int32_t* tokens, int32_t column,
                                             int32_t count) {
  const int32_t* const at = tokens + column;
  if constexpr (kWholePages) {
    const int32_t in_page = column & (p.page_size - 1);
    const uint32_t slot = static_cast<uint32_t>(count > 0 ? __ldg(at - in_page) : 0) + in_page;
    return make_int4(slot, slot + 1, slot + 2, slot + 3);
  }
  if (count >= kColumnsPerLoad) return __ldg(reinterpret_cast<const int4*>(at));
  int4 columns{};
  if (count > 0) columns.x = __ldg(at);
  if (count > 1) columns.y = __ldg(at + 1);
  if (count > 2) columns.z = __ldg(at + 2);
  return columns;
}
__device__ __forceinline__ void store_columns(int32_t* at, const int4& columns, int32_t count) {
  if (count >= kColumnsPerLoad) {
    *reinterpret_cast<int4*>(at) = columns;
    return;
  }
  if (count > 0) at[0] = columns.x;
  if (count > 1) at[1] = columns.y;
  if (count > 2) at[2] = columns.z;
}

// A tile of rows that are aligned, `kWhole`: which all rows of all tables have whole. The columns of a warp are one
// piece, and with them the pages that begin there: their numbers leave the warp side by side.
template <Mode kMode, bool kWholePages, bool kWhole>
__device__ __forceinline__ void copy_aligned_tile(const GenerateParams& p, const Tile& tile) {
  constexpr int kApart = 32 * kColumnsPerLoad;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) & 31;
  const int32_t begin = tile.begin + (static_cast<int32_t>(threadIdx.x) >> 5) * kWarpColumns;
  const int32_t column = begin + lane * kColumnsPerLoad;
  int4 tokens[kLoadsInFlight];
#pragma unroll
  for (int k = 0; k < kLoadsInFlight; ++k) {
    const int32_t left = kWhole ? kColumnsPerLoad : tile.end - column - k * kApart;
    tokens[k] = load_columns<kWholePages>(p, tile.tokens, column + k * kApart, left);
  }
  LanePage mine{};
  if (p.pages_by_warp) mine = lane_page(p, begin, tokens);
  const int64_t page_column = int64_t{mine.page} * p.page_size;
#pragma unroll 1
  for (int32_t t = 0; t < p.num_tables; ++t) {
    const GenerateTables& table = p.tables[t];
    const int32_t kv = kWhole ? 0 : kv_len(tile.request.seq_len, table.seqlens_offset);
    const auto len = [&](int32_t j) { return kWhole ? kMaxLength : row_len(kMode, kv, tile.request.accepted, j); };
    if (table.page_table_1 != nullptr) {
      int32_t* row = table.page_table_1 + tile.row0 * table.stride1 + column;
#pragma unroll 1
      for (int32_t j = 0; j < tile.rows; ++j, row += table.stride1) {
        const int32_t left = smaller(len(j), table.width1) - column;
#pragma unroll
        for (int k = 0; k < kLoadsInFlight; ++k) {
          store_columns(row + k * kApart, tokens[k], kWhole ? kColumnsPerLoad : left - k * kApart);
        }
      }
    }
    if (mine.exists && mine.page < table.width2) {
      int32_t* pages = table.real_page_table + tile.row0 * table.stride2 + mine.page;
#pragma unroll 1
      for (int32_t j = 0; j < tile.rows; ++j, pages += table.stride2) {
        if (kWhole || page_column < len(j)) *pages = mine.value;
      }
    }
  }
}

// A tile of rows that are not aligned: as many bytes in flight, 4 at a time.
template <Mode kMode, int kThreads>
__device__ __forceinline__ void copy_unaligned_tile(const GenerateParams& p, const Tile& tile) {
  constexpr int kColumns = kLoadsInFlight * kColumnsPerLoad;
  const int32_t column = tile.begin + static_cast<int32_t>(threadIdx.x);
  int32_t tokens[kColumns];
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    if (column + k * kThreads < tile.end) tokens[k] = __ldg(tile.tokens + column + k * kThreads);
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
        if (k * kThreads < left) row[k * kThreads] = tokens[k];
      }
    }
  }
}

// The pages that begin in a tile, a thread each. Their tokens were just loaded.
template <Mode kMode, int kThreads>
__device__ __forceinline__ void write_pages(const GenerateParams& p, const Tile& tile) {
  const int32_t first = tile.begin == 0 ? 0 : divide(tile.begin - 1, p.by_page_size) + 1;
  for (int64_t page = first + static_cast<int32_t>(threadIdx.x); page * p.page_size < tile.end; page += kThreads) {
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

// A block writes every `pieces`-th tile of one request, up to the longest of its rows, whatever the host knew of that.
template <Mode kMode, int kThreads, bool kWholePages>
__device__ __forceinline__ void write_tables(const GenerateParams& p, const TableGrid& grid, int32_t block) {
  constexpr int32_t kTile = tile_columns(kThreads);
  const int32_t i = divide(block, grid.by_pieces), piece = block - i * grid.pieces;
  // Both loads are under way before either is needed: a launch this short is a chain of memory latencies.
  Tile tile;
  tile.request = load_request(p, kMode, i);
  tile.tokens = token_row(p, i);
  tile.begin = piece * kTile;
  const int32_t needed = needed_columns<kMode>(p, tile.request);
  if (tile.begin >= needed) return;
  tile.rows = num_live_rows(p, kMode, tile.request.accepted);
  const bool packed = kMode == Mode::kDraftExtend && p.packed;
  tile.row0 = packed ? packed_row(p, i) : static_cast<int64_t>(i) * p.rows_per_req;

  const int32_t shortest = row_len(kMode, kv_len(tile.request.seq_len, p.min_offset), tile.request.accepted, 0);
  const int32_t common = smaller(shortest, p.common_cols);
#pragma unroll 1
  for (; tile.begin < needed; tile.begin += grid.pieces * kTile) {
    tile.end = smaller(needed, tile.begin + kTile);
    if (tile.begin + kTile <= common) {
      copy_aligned_tile<kMode, kWholePages, true>(p, tile);
    } else if (kWholePages || p.common_cols > 0) {
      copy_aligned_tile<kMode, kWholePages, false>(p, tile);
    } else {
      copy_unaligned_tile<kMode, kThreads>(p, tile);
    }
    if (p.has_pages && !(p.pages_by_warp && p.common_cols > 0)) write_pages<kMode, kThreads>(p, tile);
  }
}

}  // namespace sgl_kernel
