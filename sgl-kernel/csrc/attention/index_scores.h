// The indexer's scores: what a launch is given, and how it divides the work. Shared by the CPU and the CUDA library; no
// torch in here.
#pragma once

#include <cstdint>

#include "attention/row_tables.h"
#include "backend.h"

namespace sgl_kernel {

constexpr int kIndexDim = 128;           // of queries and keys
constexpr int kIndexHeads[] = {32, 64};  // of a row

struct IndexScoresParams : RowTables {
  const uint16_t* q;     // [rows, heads, kIndexDim]: the bits of bfloat16
  const float* weights;  // [rows, heads]
  const uint16_t* keys;  // [slots, kIndexDim]: the bits of bfloat16
  float* scores;         // [rows, >= width]: written below each row's length, where that is more than topk
  int64_t q_stride, q_head_stride, weights_stride, keys_stride, scores_stride;
  int32_t heads, topk;
};

// Keys of a row whose scores are written.
SGLK_HOST_DEVICE int32_t scored_keys(const IndexScoresParams& p, int32_t row) {
  const int32_t length = row_length(p, row);
  return length > p.topk ? length : 0;
}

// Which rows are multiplied with the same keys at a time. A group has the rows of a request, where their number is
// fixed; each of its row blocks has an equal part of them.
struct RowBlocks {
  int32_t rows;        // of a row block, at most
  int32_t group_rows;  // of a group
  int32_t of_group;    // row blocks of a group
  int32_t count;       // row blocks of all
  int32_t before;      // rows of the first group that are not the call's
  bool in_runs;        // each row has table_rows of its own, and those that follow each other may read one table
};

struct RowRange {
  int32_t begin, end;
};

SGLK_HOST_DEVICE RowRange rows_of(const IndexScoresParams& p, const RowBlocks& blocks, int32_t index) {
  const int32_t group = index / blocks.of_group * blocks.group_rows - blocks.before;
  const int32_t begin = group + index % blocks.of_group * blocks.rows, end = begin + blocks.rows;
  const int32_t group_end = group + blocks.group_rows, last = group_end < p.rows ? group_end : p.rows;
  return {begin > 0 ? begin : 0, end < last ? end : last};
}

// Rows that a row block can have, ascending: there is a kernel for each. Of the most, and 64 heads, the queries fit an
// SM's shared memory.
constexpr int kBlockRows[] = {1, 2, 3, 4, 5, 6, 8, 10};
constexpr int kMaxBlockRows = 10;

}  // namespace sgl_kernel
