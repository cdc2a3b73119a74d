// topk_slots: the checks, and as many launches as the width needs. Nothing is read from the device.
#include "attention/topk_slots.h"

#include <limits>
#include <string>

#include "attention/row_tables_checks.h"
#include "overlap.h"
#include "sgl_kernel_ops.h"
#include "stack.h"
#include "tensor_view.h"

namespace sgl_kernel {
namespace {

constexpr const char* kOp = "topk_slots";
constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
constexpr int64_t kVectorBytes = 16;  // that are read at once
constexpr int64_t kManyRows = 128;    // fill the device in smaller blocks; fewer should be fast each

enum Argument { kScores, kPageTable, kTableRows, kLengths, kSlots, kNumTensors };
constexpr const char* kNames[kNumTensors] = {"scores", "page_table", "table_rows", "lengths", "slots"};

struct Call {
  TensorView views[kNumTensors];
  int32_t device_index;
  TopkSlotsParams params{};
};

// Checks all arguments, and packs them.
Call make_call(const TensorHandle (&tensors)[kNumTensors], const RowTablesIntegers& integers, int64_t padding_slot) {
  Call call;
  for (int k = 0; k < kNumTensors; ++k) {
    if (tensors[k] != nullptr) call.views[k] = view_tensor(tensors[k].get(), {kNames[k]});
  }
  TensorView &scores = call.views[kScores], &slots = call.views[kSlots];
  const int32_t device = call.device_index = scores.device_index;
  const int64_t rows = slots.rows, topk = slots.cols;
  integers.check(kOp);
  check_range(kOp, {"padding_slot"}, padding_slot, std::numeric_limits<int32_t>::min(), kMost);
  check_tensor(kOp, slots, {device, aoti_torch_dtype_int32(), 2, 0, 1, /*written=*/true});
  check_range(kOp, {"topk"}, topk, 1, kMaxTopk);
  check_tensor(kOp, scores, {device, aoti_torch_dtype_float32(), 2, rows, integers.width});
  check_row_alignment(kOp, scores, kVectorBytes);
  TopkSlotsParams& p = call.params;
  static_cast<RowTables&>(p) = check_row_tables(kOp, call.views[kPageTable], call.views[kTableRows],
                                                call.views[kLengths], integers, device, rows);

  Access accesses[kNumTensors];
  for (int k = 0; k < kNumTensors; ++k) accesses[k] = {footprint_of(call.views[k]), &call.views[k], k == kSlots, k};
  check_apart(kOp, accesses, accesses + kNumTensors, "input");

  p.scores = reinterpret_cast<const uint32_t*>(scores.data), p.scores_stride = scores.row_stride;
  p.slots = reinterpret_cast<int32_t*>(slots.data), p.slots_stride = slots.row_stride;
  p.topk = static_cast<int32_t>(topk), p.padding_slot = static_cast<int32_t>(padding_slot);
  return call;
}

// Scores and slots of candidates: [2, rows, stride], the same dtype for both, on the scores' device.
TensorHandle empty_candidates(const Call& call, int64_t stride) {
  const int64_t sizes[] = {2, call.params.rows, stride}, strides[] = {call.params.rows * stride, stride, 1};
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(3, sizes, strides, aoti_torch_dtype_int32(), backend::device_type(), call.device_index,
                               &handle) != 0) {
    throw std::runtime_error("topk_slots: no memory for the candidates of rows of " +
                             std::to_string(call.params.width));
  }
  return TensorHandle(handle);
}

// The smallest block that holds a row; for few rows a large one, as each should be fast. Where none holds it, many rows
// have those of which a multiprocessor runs two. As measured (docs/results/2026-11-21-h200-prefill).
TopkBlock choose_block(int64_t rows, int64_t width) {
  constexpr int kFirstLarge = 2, kMiddle = 3, kLast = 4;
  const bool many = rows >= kManyRows;
  for (int b = many ? 0 : kFirstLarge; b < kLast; ++b) {
    if (width <= kTopkBlocks[b].keys()) return kTopkBlocks[b];
  }
  return kTopkBlocks[many && width > kTopkBlocks[kLast].keys() ? kMiddle : kLast];
}

// One launch after the other, until a row as wide as can be fits a block.
void run(const Call& call) {
  const TopkSlotsParams& p = call.params;
  if (p.rows == 0) return;
  backend::prepare(call.device_index);
  const backend::Stream stream(call.device_index);
  TopkLevel level{};
  level.scores = p.scores, level.stride = p.scores_stride, level.block = choose_block(p.rows, p.width);
  const int32_t piece = level.block.keys();
  TensorHandle read, written;
  for (int32_t width = p.width;; ++level.launches_before) {
    level.pieces = width <= piece ? 1 : (width - 1) / piece + 1;
    if (level.pieces > kMost / p.rows) reject(kOp, {"width"}, "fewer pieces of rows than 2^31", width);
    if (level.pieces > 1) {
      width = num_candidates(width, piece, p.topk);
      level.candidate_stride = (width + 3) / 4 * 4;  // whole vectors
      written = empty_candidates(call, level.candidate_stride);
      void* data = nullptr;
      check_shim(aoti_torch_get_data_ptr(written.get(), &data), "a data pointer");
      level.candidate_scores = static_cast<uint32_t*>(data);
      level.candidate_slots = static_cast<int32_t*>(data) + p.rows * level.candidate_stride;
    }
    backend::launch_topk_slots(p, level, stream);
    if (level.pieces == 1) return;
    level.scores = level.candidate_scores, level.slots = level.candidate_slots, level.stride = level.candidate_stride;
    read = std::move(written);  // lives until it has been read
  }
}

}  // namespace

void topk_slots(StableIValue* stack, uint64_t, uint64_t) {
  const TensorHandle tensors[kNumTensors] = {take_tensor(stack[0]), take_tensor(stack[1]),
                                             take_optional_tensor(stack[2]), take_tensor(stack[3]),
                                             take_tensor(stack[4])};
  const RowTablesIntegers integers{take<int64_t>(stack[5]), take<int64_t>(stack[6]), take<int64_t>(stack[7])};
  run(make_call(tensors, integers, take<int64_t>(stack[8])));
}

}  // namespace sgl_kernel
