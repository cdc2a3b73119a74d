// index_scores: the checks, and how the launch divides the work. Nothing is read from the device.
#include "attention/index_scores.h"

#include <algorithm>
#include <iterator>
#include <optional>
#include <string>

#include "attention/row_tables_checks.h"
#include "overlap.h"
#include "sgl_kernel_ops.h"
#include "stack.h"
#include "tensor_view.h"

namespace sgl_kernel {
namespace {

constexpr const char* kOp = "index_scores";
constexpr int64_t kVectorBytes = 16;  // that are read at once

enum Argument { kQuery, kWeights, kKeys, kPageTable, kTableRows, kLengths, kScores, kNumTensors };
constexpr const char* kNames[kNumTensors] = {"q_index",    "index_weights", "index_k", "page_table",
                                             "table_rows", "lengths",       "scores"};

struct Call {
  TensorView views[kNumTensors];
  int32_t device_index;
  bool in_runs = false;
  IndexScoresParams params{};
};

bool serves(int64_t heads, int64_t dim) {
  return dim == kIndexDim && std::find(std::begin(kIndexHeads), std::end(kIndexHeads), heads) != std::end(kIndexHeads);
}

// The queries, [rows, heads, dim]: all heads of all rows begin at multiples of 16 bytes.
void check_queries(TensorView& q, int32_t device) {
  check_tensor(kOp, q, {device, aoti_torch_dtype_bfloat16(), 3, 0, 0});
  if (!serves(q.rows, q.cols)) reject(kOp, q.name, "32 or 64 heads of 128", shape_text(q));
  check_row_alignment(kOp, q, kVectorBytes);
}

// Checks all arguments, and packs them.
Call make_call(const TensorHandle (&tensors)[kNumTensors], const RowTablesIntegers& integers, int64_t topk) {
  Call call;
  for (int k = 0; k < kNumTensors; ++k) {
    if (tensors[k] != nullptr) call.views[k] = view_tensor(tensors[k].get(), {kNames[k]});
  }
  TensorView &q = call.views[kQuery], &weights = call.views[kWeights], &keys = call.views[kKeys],
             &scores = call.views[kScores];
  const int32_t device = call.device_index = q.device_index, floats = aoti_torch_dtype_float32();
  const int64_t rows = q.planes;
  integers.check(kOp);
  check_range(kOp, {"topk"}, topk, 0, kMostRows);
  check_queries(q, device);
  check_tensor(kOp, weights, {device, floats, 2, rows, q.rows});
  check_tensor(kOp, keys, {device, aoti_torch_dtype_bfloat16(), 2, 0, q.cols});
  if (keys.cols != q.cols) reject(kOp, keys.name, "rows of " + std::to_string(q.cols), shape_text(keys));
  check_row_alignment(kOp, keys, kVectorBytes);
  IndexScoresParams& p = call.params;
  static_cast<RowTables&>(p) = check_row_tables(kOp, call.views[kPageTable], call.views[kTableRows],
                                                call.views[kLengths], integers, device, rows);
  check_tensor(kOp, scores, {device, floats, 2, rows, integers.width, /*written=*/true});
  check_row_alignment(kOp, scores, kVectorBytes);

  Access accesses[kNumTensors];
  for (int k = 0; k < kNumTensors; ++k) accesses[k] = {footprint_of(call.views[k]), &call.views[k], k == kScores, k};
  check_apart(kOp, accesses, accesses + kNumTensors, "input");

  p.q = reinterpret_cast<const uint16_t*>(q.data), p.q_stride = q.plane_stride, p.q_head_stride = q.row_stride;
  p.weights = reinterpret_cast<const float*>(weights.data), p.weights_stride = weights.row_stride;
  p.keys = reinterpret_cast<const uint16_t*>(keys.data), p.keys_stride = keys.row_stride;
  p.scores = reinterpret_cast<float*>(scores.data), p.scores_stride = scores.row_stride;
  p.heads = static_cast<int32_t>(q.rows), p.topk = static_cast<int32_t>(topk);
  return call;
}

int32_t divide_up(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

// Of rows whose table nobody shares each is a row block; in runs, whose ends the host does not know, a row block is as
// large as can be.
RowBlocks choose_row_blocks(const IndexScoresParams& p, bool in_runs) {
  RowBlocks blocks{};
  blocks.in_runs = in_runs && p.table_rows != nullptr;
  blocks.group_rows = p.table_rows == nullptr ? 1 : in_runs ? kMaxBlockRows : static_cast<int32_t>(p.rows_per_req);
  blocks.of_group = divide_up(blocks.group_rows, kMaxBlockRows);
  blocks.rows = divide_up(blocks.group_rows, blocks.of_group);
  blocks.before = blocks.in_runs ? 0 : static_cast<int32_t>(p.first_row % blocks.group_rows);
  blocks.count = divide_up(static_cast<int64_t>(p.rows) + blocks.before, blocks.group_rows) * blocks.of_group;
  return blocks;
}

void run(const Call& call) {
  const IndexScoresParams& p = call.params;
  if (p.rows == 0 || p.width == 0) return;
  backend::prepare(call.device_index);
  if (!backend::serves_index_scores(call.device_index)) {
    throw std::runtime_error("index_scores: needs a device of compute capability 9.0, and a library built for it");
  }
  const backend::Stream stream(call.device_index);
  backend::launch_index_scores(p, choose_row_blocks(p, call.in_runs), stream);
}

}  // namespace

void index_scores(StableIValue* stack, uint64_t, uint64_t) {
  const TensorHandle tensors[kNumTensors] = {
      take_tensor(stack[0]),          take_tensor(stack[1]), take_tensor(stack[2]), take_tensor(stack[3]),
      take_optional_tensor(stack[4]), take_tensor(stack[5]), take_tensor(stack[6])};
  const std::optional<int64_t> rows_per_req = take<std::optional<int64_t>>(stack[8]);
  const RowTablesIntegers integers{take<int64_t>(stack[7]), rows_per_req.value_or(1), take<int64_t>(stack[9])};
  Call call = make_call(tensors, integers, take<int64_t>(stack[10]));
  call.in_runs = !rows_per_req.has_value();
  run(call);
}

void index_scores_served(StableIValue* stack, uint64_t, uint64_t) {
  const int64_t device = take<int64_t>(stack[0]), heads = take<int64_t>(stack[1]), dim = take<int64_t>(stack[2]);
  const bool served = serves(heads, dim) && backend::serves_index_scores(static_cast<int32_t>(device));
  stack[0] = torch::stable::detail::from(served);
}

}  // namespace sgl_kernel
