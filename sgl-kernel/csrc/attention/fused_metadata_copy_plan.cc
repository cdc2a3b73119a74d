// fused_metadata_copy through a plan: every check and all packing once, then a run that takes two integers.
#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "attention/plan_runs.h"
#include "sgl_kernel_ops.h"
#include "stack.h"

namespace sgl_kernel {
namespace {

constexpr const char* kOp = "fused_metadata_copy";
constexpr uint64_t kMagic = 0x636f70795f706c00u + kAbiVersion;
constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

struct PlanArgs {
  std::vector<torch::stable::Tensor> srcs, dsts;
  std::vector<int64_t> num_dsts, rows_expanded, rows_extra, cols_per;  // one per region
};

void check_counts(const PlanArgs& args) {
  const size_t regions = args.srcs.size();
  if (regions == 0) reject(kOp, {"regions"}, "at least one region", 0);
  if (args.num_dsts.size() != regions || args.rows_expanded.size() != regions || args.rows_extra.size() != regions ||
      args.cols_per.size() != regions) {
    reject(kOp, {"regions"}, "lists of one length", "lists of different lengths");
  }
  uint64_t total = 0;
  for (const int64_t n : args.num_dsts) {
    if (n < 0) reject(kOp, {"num_dsts"}, "counts of at least 0", n);
    total += static_cast<uint64_t>(n);
  }
  if (total != args.dsts.size()) reject(kOp, {"dsts"}, std::to_string(total) + " tensors", args.dsts.size());
}

CopyExtent check_source(TensorView& src, int r, const PlanArgs& args, int32_t device_index) {
  check_device(kOp, src, device_index);
  const int64_t size = src.element_size;
  if (size != 1 && size != 2 && size != 4 && size != 8) {
    reject(kOp, src.name, "a dtype of 1, 2, 4 or 8 bytes", dtype_name(src.dtype));
  }
  if (src.dim != 1 && src.dim != 2) reject(kOp, src.name, "rank 1 or 2", src.dim);
  check_stride(kOp, src, /*written=*/false);

  CopyExtent extent;
  extent.rows = src.rows, extent.cols = src.cols;
  extent.element_size = static_cast<int32_t>(size);
  extent.one_dimensional = src.dim == 1;
  extent.rows_expanded = args.rows_expanded[r] != 0;
  extent.rows_extra = args.rows_extra[r];
  extent.cols_per = args.cols_per[r];
  const int64_t most = extent.one_dimensional ? extent.cols : extent.rows;
  if (extent.rows_extra < 0 || extent.rows_extra > most || (extent.rows_extra > 0 && !extent.rows_expanded)) {
    reject(kOp, {"", "regions[%d].rows_extra", r},
           "0, or with rows=\"expanded\" at most the source's " + std::to_string(most) + " rows", extent.rows_extra);
  }
  if (extent.cols_per < 0 || (extent.cols_per > 0 && extent.one_dimensional)) {
    reject(kOp, {"", "regions[%d].cols_per", r}, "0, or at least 1 with a 2-D source", extent.cols_per);
  }
  if (extent.rows > std::numeric_limits<int32_t>::max()) {
    reject(kOp, src.name, "at most 2147483647 rows", extent.rows);
  }
  return extent;
}

PlanHeader make_header(const std::vector<RegionArgs>& regions, int32_t device_index, size_t launches) {
  PlanHeader header{kMagic, static_cast<int64_t>(launches), device_index, backend::device_type(), {kNoLimit, kNoLimit}};
  for (const RegionArgs& region : regions) {
    const CopyExtent& extent = region.extent;
    if (extent.rows_expanded) {
      const int64_t most = (extent.one_dimensional ? extent.cols : extent.rows) - extent.rows_extra;
      header.limits[0] = std::min(header.limits[0], most);
    }
    if (extent.cols_per > 0 && extent.cols <= kNoLimit / extent.cols_per) {
      header.limits[1] = std::min(header.limits[1], extent.cols * extent.cols_per);
    }
  }
  return header;
}

std::vector<CopyLaunch> pack(const std::vector<RegionArgs>& regions) {
  std::vector<CopyLaunch> launches;
  for (const RegionArgs& region : regions) {
    if (region.extent.rows == 0 || region.extent.cols == 0) continue;
    for (int next = 0; next < region.num_dsts;) {
      if (launches.empty() || !launches.back().add(region, next)) launches.emplace_back();
    }
  }
  for (CopyLaunch& launch : launches) {
    const uint64_t tiles = launch.set_full_extents();
    if (tiles > static_cast<uint64_t>(std::numeric_limits<int32_t>::max())) {
      reject(kOp, {"regions"}, "at most 2147483647 tiles of 4096 bytes in one launch", tiles);
    }
  }
  return launches;
}

void check_limit(const char* name, int64_t value, int64_t limit) {
  if (value < -1 || value > limit) {
    reject(kOp, {name}, "-1 (the full extent) or at most " + std::to_string(limit), value);
  }
}

// Checks and packs what the first six places of the stack hold.
Planned<CopyLaunch> make_copy_plan(StableIValue* stack) {
  PlanArgs args;
  args.srcs = take<std::vector<torch::stable::Tensor>>(stack[0]);
  args.dsts = take<std::vector<torch::stable::Tensor>>(stack[1]);
  args.num_dsts = take<std::vector<int64_t>>(stack[2]);
  args.rows_expanded = take<std::vector<int64_t>>(stack[3]);
  args.rows_extra = take<std::vector<int64_t>>(stack[4]);
  args.cols_per = take<std::vector<int64_t>>(stack[5]);
  check_counts(args);

  std::vector<TensorView> dsts(args.dsts.size());
  std::vector<RegionArgs> regions(args.srcs.size());
  int32_t device_index = 0;
  size_t d = 0;
  for (int r = 0; r < static_cast<int>(regions.size()); ++r) {
    RegionArgs& region = regions[r];
    region.src = view_tensor(args.srcs[r].get(), {"", "regions[%d].src", r});
    if (r == 0) device_index = region.src.device_index;
    region.extent = check_source(region.src, r, args, device_index);
    region.src.data = data_of(region.src);
    region.dsts = dsts.data() + d;
    region.num_dsts = static_cast<int>(args.num_dsts[r]);
    const Expected expected{device_index,       region.src.dtype,   region.src.dim,
                            region.extent.rows, region.extent.cols, /*written=*/true};
    for (int k = 0; k < region.num_dsts; ++k, ++d) {
      dsts[d] = view_tensor(args.dsts[d].get(), {"", "regions[%d].dsts[%d]", r, k});
      check_tensor(kOp, dsts[d], expected);
    }
  }
  std::vector<Access> accesses(regions.size() + dsts.size());
  check_overlaps(kOp, regions.data(), static_cast<int>(regions.size()), accesses.data());

  std::stable_sort(regions.begin(), regions.end(), [](const RegionArgs& a, const RegionArgs& b) {
    return a.extent.rows * a.extent.cols * a.extent.element_size >
           b.extent.rows * b.extent.cols * b.extent.element_size;
  });
  std::vector<CopyLaunch> launches = pack(regions);
  backend::prepare(device_index);
  std::vector<torch::stable::Tensor> tensors = std::move(args.srcs);
  tensors.insert(tensors.end(), args.dsts.begin(), args.dsts.end());
  return {make_header(regions, device_index, launches.size()), std::move(launches), std::move(tensors)};
}

CopyRun checked_run(const PlanView<CopyLaunch>& plan, int64_t expanded_rows, int64_t max_len) {
  check_limit("expanded_rows", expanded_rows, plan.header->limits[0]);
  check_limit("max_len", max_len, plan.header->limits[1]);
  return {plan, expanded_rows, max_len};
}

}  // namespace

CopyRun open_copy_run(AtenTensorHandle plan, int64_t expanded_rows, int64_t max_len) {
  return checked_run(open_plan<CopyLaunch>(kOp, plan, kMagic), expanded_rows, max_len);
}

CopyRun open_copy_run(const PlanHeader* plan, int64_t expanded_rows, int64_t max_len) {
  return checked_run(open_plan<CopyLaunch>(kOp, plan, kMagic), expanded_rows, max_len);
}

void CopyRun::enqueue(const backend::Stream& stream) const {
  for (const CopyLaunch* launch = plan.begin; launch != plan.end; ++launch) {
    CopyParams params = launch->params;  // a plan is never written: runs on several threads may share it
    launch->set_live_extents(params, expanded_rows, max_len);
    backend::launch_copy(params, stream);
  }
}

void fused_metadata_copy_plan(StableIValue* stack, uint64_t, uint64_t) {
  const auto plan = make_copy_plan(stack);
  stack[0] = torch::stable::detail::from(plan.as_tensor());
}

void fused_metadata_copy_run(StableIValue* stack, uint64_t, uint64_t) {
  const TensorHandle plan_tensor = take_tensor(stack[0]);
  const CopyRun run = open_copy_run(plan_tensor.get(), take<int64_t>(stack[1]), take<int64_t>(stack[2]));
  run.enqueue(backend::Stream(run.plan.header->device_index));
}

void fused_metadata_copy_once(StableIValue* stack, uint64_t, uint64_t) {
  const int64_t expanded_rows = take<int64_t>(stack[6]), max_len = take<int64_t>(stack[7]);
  const auto plan = make_copy_plan(stack);
  checked_run(plan.view(), expanded_rows, max_len).enqueue(backend::Stream(plan.header.device_index));
}

}  // namespace sgl_kernel
