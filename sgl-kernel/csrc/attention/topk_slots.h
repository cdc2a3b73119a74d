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

// Float32 as unsigned integers in descending order, -0.0 equal to 0.0: the lowest key is the best. None is ~0.
SGLK_HOST_DEVICE uint32_t descending_key(uint32_t bits) {
  return static_cast<int32_t>(bits) < 0 ? bits - 1 : 0x7FFFFFFFu - bits;
}

// Its inverse; of 0.0 and -0.0 the first.
SGLK_HOST_DEVICE uint32_t bits_of_key(uint32_t key) { return key > 0x7FFFFFFFu ? key + 1 : 0x7FFFFFFFu - key; }

// The blocks that there are: two for many rows, of which a multiprocessor runs several, and those for few.
struct TopkBlock {
  int32_t threads, keys_per_thread;  // in registers

  SGLK_HOST_DEVICE int32_t keys() const { return threads * keys_per_thread; }
};
constexpr TopkBlock kTopkBlocks[] = {{224, 32}, {256, 32}, {512, 16}, {512, 32}, {1024, 32}};

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

// A block's work: which keys, and where their slots go to.
struct TopkPiece {
  int32_t row, first;  // position of its first key
  int32_t count;       // of keys
  const uint32_t* scores;
  int32_t* slots;
  uint32_t* best_scores;  // or null: the slots are the row's result
};

// How many candidates a row of several pieces leaves.
SGLK_HOST_DEVICE int32_t num_candidates(int32_t length, int32_t piece, int32_t topk) {
  const int32_t rest = length % piece;
  return length / piece * topk + (rest < topk ? rest : topk);
}

// The work of a block; false if it has none. The last rows come first: in a prefill they are the longest.
SGLK_HOST_DEVICE bool find_piece(const TopkSlotsParams& p, const TopkLevel& level, int32_t block, TopkPiece& piece) {
  const int32_t size = level.block.keys();
  const int32_t index = level.pieces == 1 ? 0 : block % level.pieces;
  piece.row = p.rows - 1 - (level.pieces == 1 ? block : block / level.pieces);
  piece.first = index * size;
  int32_t length = row_length(p, piece.row);
  for (int32_t l = 0; l < level.launches_before; ++l) {
    if (length <= size) return false;  // the row is done
    length = num_candidates(length, size, p.topk);
  }
  if (piece.first >= length && index > 0) return false;
  const bool ends = length <= size;
  const int64_t candidates = piece.row * level.candidate_stride + static_cast<int64_t>(index) * p.topk;
  piece.count = length - piece.first < size ? length - piece.first : size;
  piece.scores = level.scores + piece.row * level.stride + piece.first;
  piece.slots = ends ? p.slots + piece.row * p.slots_stride : level.candidate_slots + candidates;
  piece.best_scores = ends ? nullptr : level.candidate_scores + candidates;
  return true;
}

// The slots of a piece's keys.
SGLK_HOST_DEVICE const int32_t* slots_of(const TopkSlotsParams& p, const TopkLevel& level, const TopkPiece& piece) {
  return piece.first + (level.slots != nullptr ? level.slots + piece.row * level.stride : table_of(p, piece.row));
}

}  // namespace sgl_kernel
