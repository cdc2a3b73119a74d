// decode_inputs through a plan: every check and all addresses once, then a run without arguments.
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "attention/decode_inputs.cuh"
#include "overlap.h"
#include "plan.h"
#include "sgl_kernel_ops.h"
#include "stack.h"

namespace sgl_kernel {
namespace {

constexpr const char* kOp = "decode_inputs";
constexpr uint64_t kMagic = 0x6465636f6465u * 256 + kAbiVersion;

enum Argument { kSeqLens, kIndices, kSlots, kTokens, kInputIds, kOutCacheLoc, kPositions, kNumTensors };
constexpr const char* kNames[kNumTensors] = {"seq_lens",  "req_pool_indices", "req_to_token", "token_pool",
                                             "input_ids", "out_cache_loc",    "positions"};

void check_argument(TensorView& view, int argument, int32_t device_index, int64_t bs) {
  const bool table = argument == kSlots || argument == kTokens, index = argument == kSeqLens || argument == kIndices;
  check_device(kOp, view, device_index);
  const bool wide = index && view.dtype == aoti_torch_dtype_int64();
  if (index && !wide && view.dtype != aoti_torch_dtype_int32()) {
    reject(kOp, view.name, "int32 or int64", dtype_name(view.dtype));
  }
  const int64_t least = bs > 0 ? 1 : 0;
  check_tensor(kOp, view,
               {device_index, wide ? view.dtype : aoti_torch_dtype_int32(), table ? 2 : 1, least, table ? least : bs,
                /*written=*/argument >= kInputIds});
}

// Checks and packs what the first eight places of the stack hold.
Planned<DecodeInputsParams> make_decode_inputs_plan(StableIValue* stack) {
  const int64_t bs = take<int64_t>(stack[0]);
  std::vector<torch::stable::Tensor> tensors;
  for (int k = 0; k < kNumTensors; ++k) tensors.push_back(take<torch::stable::Tensor>(stack[k + 1]));
  if (bs < 0 || bs > std::numeric_limits<int32_t>::max()) reject(kOp, {"bs"}, "0 .. 2147483647", bs);
  TensorView views[kNumTensors];
  Access accesses[kNumTensors];
  const int32_t device_index = view_tensor(tensors[0].get(), {kNames[0]}).device_index;
  for (int k = 0; k < kNumTensors; ++k) {
    views[k] = view_tensor(tensors[k].get(), {kNames[k]});
    check_argument(views[k], k, device_index, bs);
    const int64_t size = views[k].element_size, cols = views[k].dim == 2 ? views[k].cols : bs;
    accesses[k] = {
        {views[k].data, views[k].rows, cols * size, views[k].row_stride * size}, &views[k], k >= kInputIds, k};
  }
  const TensorView &slots = views[kSlots], &tokens = views[kTokens];
  if (slots.rows != tokens.rows || slots.cols != tokens.cols) {
    reject(kOp, tokens.name, "the shape of req_to_token, " + shape_text(slots), shape_text(tokens));
  }
  check_apart(kOp, accesses, accesses + kNumTensors, "input");

  const auto ints = [&](int k) { return reinterpret_cast<int32_t*>(views[k].data); };
  DecodeInputsParams params{};
  params.seq_lens = views[kSeqLens].data, params.wide_seq_lens = views[kSeqLens].element_size == 8;
  params.req_pool_indices = views[kIndices].data, params.wide_indices = views[kIndices].element_size == 8;
  params.token_pool = ints(kTokens), params.token_stride = tokens.row_stride;
  params.req_to_token = ints(kSlots), params.slot_stride = slots.row_stride;
  params.pool = slots.rows, params.width = slots.cols, params.bs = static_cast<int32_t>(bs);
  params.input_ids = ints(kInputIds), params.out_cache_loc = ints(kOutCacheLoc), params.positions = ints(kPositions);
  backend::prepare(device_index);
  return {{kMagic, 1, device_index, backend::device_type(), {0, 0}}, {params}, std::move(tensors)};
}

void run(const PlanView<DecodeInputsParams>& plan) {
  if (plan.begin->bs > 0) backend::launch_decode_inputs(*plan.begin, backend::Stream(plan.header->device_index));
}

}  // namespace

void decode_inputs_plan(StableIValue* stack, uint64_t, uint64_t) {
  const auto plan = make_decode_inputs_plan(stack);
  stack[0] = torch::stable::detail::from(plan.as_tensor());
}

void decode_inputs_run(StableIValue* stack, uint64_t, uint64_t) {
  const TensorHandle plan = take_tensor(stack[0]);
  run(open_plan<DecodeInputsParams>(kOp, plan.get(), kMagic));
}

void decode_inputs_once(StableIValue* stack, uint64_t, uint64_t) {
  const auto plan = make_decode_inputs_plan(stack);
  run(plan.view());
}

}  // namespace sgl_kernel
