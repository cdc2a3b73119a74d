// The indexer's scores: what a launch is given. Shared by the CPU and the CUDA library; no torch in here.
#pragma once

#include <cstdint>

#include "attention/row_tables.h"
#include "backend.h"

namespace sgl_kernel {

constexpr int kIndexDim = 128;           // of queries and keys
constexpr int kIndexHeads[] = {32, 64};  // of a row
constexpr int kMaxBlockRows = 6;         // two blocks with so many rows of 64 heads fit an SM's shared memory
constexpr int kBlockKeys = 128;          // that a block takes at a time
constexpr int kScoresBlocksPerSm = 2;    // resident together

struct IndexScoresParams : RowTables {
  const uint16_t* q;     // [rows, heads, kIndexDim]: the bits of bfloat16
  const float* weights;  // [rows, heads]
  const uint16_t* keys;  // [slots, kIndexDim]: the bits of bfloat16
  float* scores;         // [rows, >= width]: written below each row's length, where that is more than topk
  int64_t q_stride, q_head_stride, weights_stride, keys_stride, scores_stride;
  int32_t heads, topk;
};

// How the blocks of a launch divide rows and keys; the scores do not depend on it.
struct IndexScoresGrid {
  int32_t block_rows, row_blocks;  // rows of a block, blocks for all rows
  int32_t chunks;                  // blocks for the keys of a block's rows: each takes every so manieth kBlockKeys

  int32_t blocks() const { return row_blocks * chunks; }
};

// Keys of a row whose scores are written.
SGLK_HOST_DEVICE int32_t scored_keys(const IndexScoresParams& p, int32_t row) {
  const int32_t length = row_length(p, row);
  return length > p.topk ? length : 0;
}

}  // namespace sgl_kernel
