// The top-k: what its launches are given, and which keys a block of each has. Shared by the CPU and the CUDA library;
// no torch in here.
#pragma once

#include <cstdint>

#include "attention/row_tables.h"
#include "backend.h"

namespace sgl_kernel {

struct TopkSlotsParams : RowTables {
  const uint32_t* scores;  // [rows, >= width]: the bits of float32
  int32_t* slots;          // [rows, topk]
  int64_t scores_stride, slots_stride;
  int32_t topk, padding_slot;
};

// Float32 as unsigned integers in descending order, -0.0 equal to 0.0: the lowest key is the best.
SGLK_HOST_DEVICE uint32_t descending_key(uint32_t bits) {
  const uint32_t negative = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31);
  return bits == 0x80000000u ? 0x7FFFFFFFu : bits ^ (~negative & 0x7FFFFFFFu);
}

// The blocks that there are.
struct TopkBlock {
  int32_t threads, keys_per_thread;  // in registers

  SGLK_HOST_DEVICE int32_t keys() const { return threads * keys_per_thread; }
};
constexpr TopkBlock kTopkBlocks[] = {{512, 16}, {512, 32}, {1024, 32}};

// One launch: of the first the row is its scores, of the others the candidates that the one before has left.
struct TopkLevel {
  const uint32_t* scores;      // [rows, stride]
  const int32_t* slots;        // [rows, stride]; null: the page table's
  uint32_t* candidate_scores;  // [rows, candidate_stride]
  int32_t* candidate_slots;
  int64_t stride, candidate_stride;
  int32_t launches_before;
  TopkBlock block;
  int32_t pieces;  // of a row as wide as can be: a block for each
};

// What shared memory holds positions of, and at most half a piece where a row has several.
constexpr int32_t kMaxTopk = 8192;

// A block's work: which keys, and where their slots come from and go to.
struct TopkPiece {
  const uint32_t* scores;
  const int32_t* table;
  int32_t* slots;
  uint32_t* best_scores;  // or null: the slots are the row's result
  int32_t count;          // of keys
};

// How many candidates a row of several pieces leaves.
SGLK_HOST_DEVICE int32_t num_candidates(int32_t length, int32_t piece, int32_t topk) {
  const int32_t rest = length % piece;
  return length / piece * topk + (rest < topk ? rest : topk);
}

// The work of a block; false if it has none.
SGLK_HOST_DEVICE bool find_piece(const TopkSlotsParams& p, const TopkLevel& level, int32_t block, TopkPiece& piece) {
  const int32_t size = level.block.keys();
  const int32_t row = block / level.pieces, index = block % level.pieces, first = index * size;
  int32_t length = row_length(p, row);
  for (int32_t l = 0; l < level.launches_before; ++l) {
    if (length <= size) return false;  // the row is done
    length = num_candidates(length, size, p.topk);
  }
  if (first >= length && index > 0) return false;
  const bool ends = length <= size;
  const int64_t begin = row * level.stride + first;
  const int64_t candidates = row * level.candidate_stride + static_cast<int64_t>(index) * p.topk;
  piece.scores = level.scores + begin;
  piece.table = level.slots != nullptr ? level.slots + begin : table_of(p, row) + first;
  piece.slots = ends ? p.slots + row * p.slots_stride : level.candidate_slots + candidates;
  piece.best_scores = ends ? nullptr : level.candidate_scores + candidates;
  piece.count = length - first < size ? length - first : size;
  return true;
}

}  // namespace sgl_kernel
