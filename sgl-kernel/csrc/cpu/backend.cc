// The CPU as a backend: the same parameter blocks, walked by plain loops.
#include "backend.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "attention/decode_inputs.cuh"
#include "attention/fused_metadata_copy.cuh"
#include "attention/nsa_metadata_generate.h"
#include "attention/paged_mqa_schedule.cuh"
#include "attention/topk_slots.h"
#include "cpu/index_scores.h"

namespace sgl_kernel {
namespace {

void write_vectors(const GenerateParams& p, const GenerateVectors& out) {
  uint32_t kv_sum = 0, nsa_sum = 0;  // modulo 2^32, as the int32 results are
  int64_t row = 0;
  if (out.cu_seqlens_k != nullptr) out.cu_seqlens_k[0] = 0;
  if (out.nsa_cu_seqlens_k != nullptr) out.nsa_cu_seqlens_k[0] = 0;
  for (int32_t i = 0; i < p.bs; ++i) {
    const Request request = load_request(p, p.mode, i);
    const int32_t kv = kv_len(request.seq_len, out.seqlens_offset), cached = cache_seqlen(p, p.mode, kv);
    kv_sum += static_cast<uint32_t>(cached);
    if (out.cache_seqlens != nullptr) out.cache_seqlens[i] = cached;
    if (out.cu_seqlens_k != nullptr) out.cu_seqlens_k[i + 1] = static_cast<int32_t>(kv_sum);
    for (int32_t j = 0; j < num_rows(p, p.mode, request.accepted); ++j, ++row) {
      const int32_t len = row_len(p.mode, kv, request.accepted, j), kept = smaller(len, p.topk);
      nsa_sum += static_cast<uint32_t>(kept);
      if (out.nsa_cache_seqlens != nullptr) out.nsa_cache_seqlens[row] = kept;
      if (out.nsa_cu_seqlens_k != nullptr) out.nsa_cu_seqlens_k[row + 1] = static_cast<int32_t>(nsa_sum);
      if (out.seqlens_expanded != nullptr) out.seqlens_expanded[row] = len;
    }
  }
}

// The slots of a request's first `count` columns, which may follow from the first of each page.
void copy_slots(const GenerateParams& p, const int32_t* tokens, int32_t* slots, int32_t count) {
  if (!p.whole_pages) {
    if (count > 0) std::memcpy(slots, tokens, count * sizeof(int32_t));
    return;
  }
  for (int64_t first = 0; first < count; first += p.page_size) {
    const int64_t columns = std::min<int64_t>(p.page_size, count - first);
    for (int64_t c = 0; c < columns; ++c) slots[first + c] = tokens[first] + static_cast<int32_t>(c);
  }
}

void write_tables(const GenerateParams& p, const GenerateTables& table) {
  int64_t row = 0;
  for (int32_t i = 0; i < p.bs; ++i) {
    const int32_t* const tokens = token_row(p, i);
    const Request request = load_request(p, p.mode, i);
    const int32_t kv = kv_len(request.seq_len, table.seqlens_offset);
    for (int32_t j = 0; j < num_rows(p, p.mode, request.accepted); ++j, ++row) {
      const int32_t len = row_len(p.mode, kv, request.accepted, j);
      copy_slots(p, tokens, table.page_table_1 + row * table.stride1, smaller(len, table.width1));
      if (table.real_page_table == nullptr) continue;
      int32_t* const pages = table.real_page_table + row * table.stride2;
      for (int64_t c = 0; c < table.width2 && c * p.page_size < len; ++c) {
        pages[c] = page_of_token(p, tokens[c * p.page_size]);
      }
    }
  }
}

void write_schedule(const PagedMQAScheduleParams& p, const PagedMQASchedule& schedule) {
  uint64_t total = 0, before = 0;
  for (int32_t i = 0; i < schedule.batch; ++i) total += request_work(p, schedule, i);
  int32_t request = 0;
  for (int32_t sm = 0; sm <= schedule.num_sms; ++sm) {
    const uint64_t start = first_work(p, schedule, total, sm);
    for (; request < schedule.batch && before + request_work(p, schedule, request) <= start; ++request) {
      before += request_work(p, schedule, request);
    }
    write_start(p, schedule, sm, request, start - before);
  }
}

// The topk best positions of a piece that has more, ascending.
std::vector<int32_t> best_positions(const TopkPiece& piece, int32_t topk) {
  std::vector<int32_t> positions(piece.count);
  std::iota(positions.begin(), positions.end(), 0);
  const auto better = [&](int32_t a, int32_t b) {
    const uint32_t key_a = descending_key(piece.scores[a]), key_b = descending_key(piece.scores[b]);
    return key_a != key_b ? key_a < key_b : a < b;
  };
  std::nth_element(positions.begin(), positions.begin() + topk, positions.end(), better);
  positions.resize(topk);
  std::sort(positions.begin(), positions.end());
  return positions;
}

void select_piece(const TopkSlotsParams& p, const TopkPiece& piece, const int32_t* table) {
  std::vector<int32_t> positions(std::min(piece.count, p.topk));
  if (piece.count > p.topk) {
    positions = best_positions(piece, p.topk);
  } else {
    std::iota(positions.begin(), positions.end(), 0);
  }
  int32_t* slot = piece.slots;
  uint32_t* score = piece.best_scores;
  for (int32_t position : positions) {
    *slot++ = table[position];
    if (score != nullptr) *score++ = piece.scores[position];
  }
  if (score == nullptr) std::fill(slot, piece.slots + p.topk, p.padding_slot);
}

template <typename Params>
void copy(const Params& params) {
  for (uint32_t r = 0; r < params.num_regions; ++r) {
    const CopyRegion& region = params.regions[r];
    if (region.row_bytes == 0) continue;
    for (int64_t row = 0; row < region.rows; ++row) {
      const char* const src = region.src + row * region.src_stride;
      for (int s = region.slot_begin; s < region.slot_end; ++s) {
        std::memcpy(params.slots[s].data + row * params.slots[s].stride, src, region.row_bytes);
      }
    }
  }
}

}  // namespace

namespace backend {

const char* device_name() { return "cpu"; }
int32_t device_type() { return aoti_torch_device_type_cpu(); }
void prepare(int32_t) {}
Stream::Stream(int32_t) {}
Stream::~Stream() = default;
int32_t multiprocessors(int32_t) { return 1; }

void launch_copy(const CopyParams& params, const Stream&) { copy(params); }
void launch_copy(const ReplayCopyParams& params, const Stream&) { copy(params); }

void launch_generate(const GenerateParams& params, const TableGrid&, const Stream&) {
  for (int d = 0; d < params.num_vectors; ++d) write_vectors(params, params.vectors[d]);
  for (int t = 0; t < params.num_tables; ++t) write_tables(params, params.tables[t]);
}

void launch_paged_mqa_schedule(const PagedMQAScheduleParams& params, const Stream&) {
  for (int k = 0; k < params.num_schedules; ++k) write_schedule(params, params.schedules[k]);
}

void launch_decode_inputs(const DecodeInputsParams& params, const Stream&) {
  for (int32_t i = 0; i < params.bs; ++i) write_decode_inputs(params, i);
}

void launch_topk_slots(const TopkSlotsParams& params, const TopkLevel& level, const Stream&) {
  TopkPiece piece;
  for (int32_t block = 0; block < params.rows * level.pieces; ++block) {
    if (find_piece(params, level, block, piece)) select_piece(params, piece, slots_of(params, level, piece));
  }
}

bool serves_index_scores(int32_t) { return true; }

void launch_index_scores(const IndexScoresParams& params, const RowBlocks&, const Stream&) {
  for (int32_t row = 0; row < params.rows; ++row) write_index_scores(params, row);
}

}  // namespace backend
}  // namespace sgl_kernel
