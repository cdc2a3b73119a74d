// paged_mqa_schedule through a plan: every check and all addresses once, then a run without arguments.
#include <limits>
#include <utility>
#include <vector>

#include "attention/paged_mqa_schedule.cuh"
#include "overlap.h"
#include "plan.h"
#include "sgl_kernel_ops.h"
#include "stack.h"

namespace sgl_kernel {
namespace {

constexpr const char* kOp = "paged_mqa_schedule";
constexpr uint64_t kMagic = 0x6d71615f7363u * 256 + kAbiVersion;
constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

struct ScheduleArgs {
  TensorView context_lens, schedule;
  int64_t atoms;
};

// [B] or [B, next_n], any strides: only a request's last length is read.
void check_lengths(TensorView& lens, int32_t device_index) {
  check_device(kOp, lens, device_index);
  if (lens.dtype != aoti_torch_dtype_int32()) reject(kOp, lens.name, "int32", dtype_name(lens.dtype));
  if (lens.dim != 1 && lens.dim != 2) reject(kOp, lens.name, "rank 1 or 2", lens.dim);
  if (lens.dim == 1) {  // one length a request
    lens.rows = lens.cols, lens.row_stride = lens.col_stride, lens.cols = 1, lens.col_stride = 1;
  }
  if (lens.cols == 0) reject(kOp, lens.name, "at least one length a request", 0);
  lens.data = data_of(lens);
}

void check_schedule(TensorView& schedule, int32_t device_index) {
  check_tensor(kOp, schedule, {device_index, aoti_torch_dtype_int32(), 2, 2, 2, /*written=*/true});
  check_range(kOp, schedule.name, schedule.rows, 2, kMost);
  if (schedule.cols != 2 || schedule.row_stride != 2) {
    reject(kOp, schedule.name, "a contiguous tensor of two columns",
           std::to_string(schedule.cols) + " columns, row stride " + std::to_string(schedule.row_stride));
  }
}

Footprint whole(const TensorView& view) {
  return {view.data, view.rows, ((view.cols - 1) * view.col_stride + 1) * 4, view.row_stride * 4};
}

void check_overlaps(const std::vector<ScheduleArgs>& all) {
  std::vector<Access> accesses;
  for (size_t k = 0; k < all.size(); ++k) {
    accesses.push_back({whole(all[k].context_lens), &all[k].context_lens, false, 0});
    accesses.push_back({whole(all[k].schedule), &all[k].schedule, true, static_cast<int64_t>(k)});
  }
  check_apart(kOp, accesses.data(), accesses.data() + accesses.size(), "length");
}

std::vector<PagedMQAScheduleParams> make_launches(const std::vector<ScheduleArgs>& all,
                                                  const PagedMQAScheduleParams& common) {
  std::vector<PagedMQAScheduleParams> launches;
  for (size_t k = 0; k < all.size(); ++k) {
    if (k % kMaxPagedMQASchedules == 0) launches.push_back(common);
    const TensorView &lens = all[k].context_lens, &schedule = all[k].schedule;
    launches.back().schedules[launches.back().num_schedules++] = {
        reinterpret_cast<const int32_t*>(lens.data) + (lens.cols - 1) * lens.col_stride,
        reinterpret_cast<int32_t*>(schedule.data),
        lens.row_stride,
        static_cast<int32_t>(lens.rows),
        static_cast<int32_t>(all[k].atoms),
        static_cast<int32_t>(schedule.rows - 1)};
  }
  return launches;
}

// Checks and packs what the first six places of the stack hold.
Planned<PagedMQAScheduleParams> make_schedule_plan(StableIValue* stack) {
  auto context_lens = take<std::vector<torch::stable::Tensor>>(stack[0]);
  const auto schedules = take<std::vector<torch::stable::Tensor>>(stack[1]);
  const auto atoms = take<std::vector<int64_t>>(stack[2]);
  const int64_t segment = take<int64_t>(stack[3]);
  PagedMQAScheduleParams common{};
  common.remainder_last = take<bool>(stack[4]);
  common.segment_major = take<bool>(stack[5]);
  if (context_lens.empty() || context_lens.size() != schedules.size() || atoms.size() != schedules.size()) {
    reject(kOp, {"schedules"}, "at least one, and lists of one length", schedules.size());
  }
  check_range(kOp, {"segment"}, segment, 1, kMost);
  common.segment = static_cast<int32_t>(segment);

  std::vector<ScheduleArgs> all(schedules.size());
  for (int k = 0; k < static_cast<int>(all.size()); ++k) {
    ScheduleArgs& args = all[k];
    args.context_lens = view_tensor(context_lens[k].get(), {"", "schedules[%d].context_lens", k});
    args.schedule = view_tensor(schedules[k].get(), {"", "schedules[%d].schedule", k});
    args.atoms = atoms[k];
    check_lengths(args.context_lens, all[0].context_lens.device_index);
    check_schedule(args.schedule, all[0].context_lens.device_index);
    check_range(kOp, {"", "schedules[%d].atoms", k}, args.atoms, 1, kMost);
    if (args.context_lens.rows > kMost / args.atoms) {
      reject(kOp, args.context_lens.name, "at most 2147483647 atoms in all requests",
             std::to_string(args.context_lens.rows) + " requests of " + std::to_string(args.atoms));
    }
  }
  check_overlaps(all);

  std::vector<PagedMQAScheduleParams> launches = make_launches(all, common);
  const int32_t device_index = all[0].context_lens.device_index;
  backend::prepare(device_index);
  context_lens.insert(context_lens.end(), schedules.begin(), schedules.end());
  return {{kMagic, static_cast<int64_t>(launches.size()), device_index, backend::device_type(), {0, 0}},
          std::move(launches),
          std::move(context_lens)};
}

void run(const PlanView<PagedMQAScheduleParams>& plan) {
  const backend::Stream stream(plan.header->device_index);
  for (const PagedMQAScheduleParams* launch = plan.begin; launch != plan.end; ++launch) {
    backend::launch_paged_mqa_schedule(*launch, stream);
  }
}

}  // namespace

void paged_mqa_schedule_plan(StableIValue* stack, uint64_t, uint64_t) {
  const auto plan = make_schedule_plan(stack);
  stack[0] = torch::stable::detail::from(plan.as_tensor());
}

void paged_mqa_schedule_run(StableIValue* stack, uint64_t, uint64_t) {
  const TensorHandle plan_tensor = take_tensor(stack[0]);
  run(open_plan<PagedMQAScheduleParams>(kOp, plan_tensor.get(), kMagic));
}

void paged_mqa_schedule_once(StableIValue* stack, uint64_t, uint64_t) {
  const auto plan = make_schedule_plan(stack);
  run(plan.view());
}

}  // namespace sgl_kernel
