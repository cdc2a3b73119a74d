// The copy of what a captured graph reads besides its metadata: the sources are new tensors at every step, the
// destinations stay. So the sources' addresses, the batch size and the live width are arguments of the launch; the rest
// is in the plan. The kernel is that of fused_metadata_copy.
#include <algorithm>
#include <cctype>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "attention/copy_launch.h"
#include "dlpack.h"
#include "plan.h"
#include "python_builtin.h"
#include "sgl_kernel_ops.h"
#include "stack.h"

namespace sgl_kernel {
namespace {

constexpr uint64_t kMagic = 0x7265706c6179u * 256 + kAbiVersion;
static_assert(kMaxReplayFields == kMaxReplayRegions);
constexpr int64_t kMost = 0x7fffffff;  // of the two integers of a run

// One destination: [most requests + extra], or a table [most requests, most columns]; int32.
struct ReplayField {
  char name[32];
  char* data;
  int64_t dim, rows, cols, row_stride;  // as in TensorView
  int64_t extra;                        // 1-D: live elements beyond the batch size

  // The live part: one row of a vector, or rows of a table.
  int64_t live_rows(int64_t batch_size) const { return dim == 1 ? 1 : batch_size; }
  int64_t live_cols(int64_t batch_size, int64_t width) const { return dim == 1 ? batch_size + extra : width; }
};

struct ReplayFields {
  int64_t count = 0;
  ReplayField fields[kMaxReplayFields];

  bool counts_fit() const { return count > 0 && count <= kMaxReplayFields; }

  void add(const char* op, const char* name, int64_t extra, AtenTensorHandle destination, int32_t device_index) {
    ReplayField& field = fields[count++];
    std::strncpy(field.name, name, sizeof(field.name) - 1);
    field.name[sizeof(field.name) - 1] = '\0';
    TensorView view = view_tensor(destination, {"dst_", field.name});
    const Expected expected{device_index,    aoti_torch_dtype_int32(), view.dim == 2 ? 2 : 1, view.rows, view.cols,
                            /*written=*/true};
    check_tensor(op, view, expected);
    field.data = view.data, field.dim = view.dim, field.extra = extra;
    field.rows = view.rows, field.cols = view.cols, field.row_stride = view.row_stride;
  }
};

TensorView destination_of(const ReplayField& field) {
  TensorView view;
  view.name = {"dst_", field.name};
  view.data = field.data, view.dim = field.dim;
  view.rows = field.rows, view.cols = field.cols, view.row_stride = field.row_stride;
  return view;
}

void check_size(const char* op, const char* name, int64_t value) {
  if (value < 0 || value > kMost) reject(op, {name}, "0 .. 2147483647", value);
}

TensorView view_source(const TensorHandle& source, FieldName name) { return view_tensor(source.get(), name); }
TensorView view_source(const torch::stable::Tensor& source, FieldName name) { return view_tensor(source.get(), name); }
TensorView view_source(const dlpack::Tensor& source, FieldName name) { return dlpack::view_tensor(source, name); }

// One launch; none for an empty batch. `sources`: a tensor for each field.
template <typename Source>
void copy_fields(const char* op, const ReplayFields& plan, const Source* sources, int64_t batch_size, int64_t width,
                 int32_t device_index) {
  RegionArgs regions[kMaxReplayFields];
  TensorView dsts[kMaxReplayFields];
  for (int f = 0; f < plan.count; ++f) {
    const ReplayField& field = plan.fields[f];
    const int64_t rows = field.live_rows(batch_size), cols = field.live_cols(batch_size, width);
    dsts[f] = destination_of(field);
    check_shape(op, dsts[f], rows, cols);
    RegionArgs& region = regions[f];
    region.src = view_source(sources[f], {"src_", field.name});
    check_tensor(op, region.src, {device_index, aoti_torch_dtype_int32(), field.dim, rows, cols});
    region.dsts = &dsts[f], region.num_dsts = 1;
    region.extent.rows = rows, region.extent.cols = cols;
  }
  if (batch_size == 0) return;
  Access accesses[2 * kMaxReplayFields];
  check_overlaps(op, regions, static_cast<int>(plan.count), accesses);
  CopyLaunchOf<ReplayCopyParams> launch;
  for (int f = 0; f < plan.count; ++f) {
    int next = 0;
    if (regions[f].extent.cols > 0) launch.add(regions[f], next);
  }
  launch.set_full_extents();
  backend::launch_copy(launch.params, backend::Stream(device_index));
}

// ---- the plan: any fields, described by data --------------------------------------------------------------------

constexpr const char* kOp = "replay_copy";

std::vector<std::string> split_names(const std::string& text) {
  std::vector<std::string> names(1);
  for (const char c : text) {
    if (c == ',') {
      names.emplace_back();
    } else {
      names.back() += c;
    }
  }
  return names;
}

void check_name(const std::string& name) {
  const bool fits = !name.empty() && name.size() < sizeof(ReplayField::name);
  if (fits && std::all_of(name.begin(), name.end(), [](unsigned char c) { return std::isalnum(c) || c == '_'; }))
    return;
  reject(kOp, {"names"}, "names of 1 .. 31 letters, digits and underscores", "'" + name + "'");
}

// Checks and packs what the first three places of the stack hold.
Planned<ReplayFields> make_replay_plan(StableIValue* stack) {
  auto dsts = take<std::vector<torch::stable::Tensor>>(stack[0]);
  const std::vector<std::string> names = split_names(take<std::string>(stack[1]));
  const auto extras = take<std::vector<int64_t>>(stack[2]);
  if (dsts.empty() || dsts.size() > kMaxReplayFields) {
    reject(kOp, {"fields"}, "1 .. " + std::to_string(kMaxReplayFields), dsts.size());
  }
  if (names.size() != dsts.size() || extras.size() != dsts.size()) {
    reject(kOp, {"fields"}, "lists of one length", "lists of different lengths");
  }
  ReplayFields plan;
  int32_t device_index = 0;
  check_shim(aoti_torch_get_device_index(dsts[0].get(), &device_index), "a device index");
  for (size_t f = 0; f < dsts.size(); ++f) {
    check_name(names[f]);
    plan.add(kOp, names[f].c_str(), extras[f], dsts[f].get(), device_index);
    const ReplayField& field = plan.fields[f];
    if (extras[f] < 0 || extras[f] > (field.dim == 1 ? field.cols : 0)) {
      reject(kOp, {"dst_", field.name}, "an extra of 0, or of at most its elements where it is 1-D", extras[f]);
    }
  }
  Access accesses[kMaxReplayFields];
  TensorView views[kMaxReplayFields];
  for (int64_t f = 0; f < plan.count; ++f) {
    views[f] = destination_of(plan.fields[f]);
    const Footprint bytes{views[f].data, views[f].rows, views[f].cols * 4, views[f].row_stride * 4};
    accesses[f] = {bytes, &views[f], true, f};
  }
  check_apart(kOp, accesses, accesses + plan.count, "source");
  backend::prepare(device_index);
  return {{kMagic, 1, device_index, backend::device_type(), {0, 0}}, {plan}, std::move(dsts)};
}

template <typename Source>
void run(const PlanView<ReplayFields>& plan, const Source* sources, int64_t num_sources, int64_t batch_size,
         int64_t width) {
  check_size(kOp, "batch_size", batch_size);
  check_size(kOp, "width", width);
  const int64_t wanted = plan.begin->count;
  if (num_sources != wanted) reject(kOp, {"srcs"}, std::to_string(wanted) + " tensors", num_sources);
  copy_fields(kOp, *plan.begin, sources, batch_size, width, plan.header->device_index);
}

// `self`: a tuple that begins with the addresses of a plan and of torch's exchange API; what follows keeps the plan
// alive. `arguments`: batch_size, width, sources.
PyObject* replay(PyObject* self, PyObject* const* arguments, std::ptrdiff_t count) {
  const auto* const plan = held_address<PlanHeader>(self, 0);
  const auto* const exchange = held_address<dlpack::ExchangeApi>(self, 1);
  const std::ptrdiff_t num_sources = count - 2;
  int64_t batch_size = 0, width = 0;
  if (num_sources < 0 || num_sources > kMaxReplayFields) {
    return fail(std::string(kOp) + ": expected batch_size, width and up to " + std::to_string(kMaxReplayFields) +
                " sources, found " + std::to_string(count) + " arguments");
  }
  if (!take_integer(arguments[0], batch_size) || !take_integer(arguments[1], width)) return nullptr;
  dlpack::Tensor sources[kMaxReplayFields];  // of the arguments, which live as long as the call
  for (std::ptrdiff_t s = 0; s < num_sources; ++s) {
    if (exchange->view(arguments[s + 2], &sources[s]) != 0) return nullptr;
  }
  return run_without_lock(
      [&] { run(open_plan<ReplayFields>(kOp, plan, kMagic), sources, num_sources, batch_size, width); });
}

PyMethodDef kReplay{"replay_copy", reinterpret_cast<void*>(replay), kManyArguments,
                    "replay_copy(batch_size: int, width: int, *sources: torch.Tensor) -> None"};

// ---- the call: mini-sglang's six ----------------------------------------------------------------------------------

struct NamedField {
  const char* name;
  int64_t extra;
};
constexpr NamedField kReplayData[] = {{"input_ids", 0}, {"out_loc", 0},  {"cu_seqlens_k", 1},
                                      {"positions", 0}, {"seq_lens", 0}, {"page_table", 0}};
constexpr int kReplayDataFields = std::size(kReplayData);
constexpr int kPageTable = kReplayDataFields - 1;

}  // namespace

void replay_copy_plan(StableIValue* stack, uint64_t, uint64_t) {
  const auto plan = make_replay_plan(stack);
  stack[0] = torch::stable::detail::from(plan.as_tensor());
}

std::string replay_copy_run_name(int num_sources) { return "replay_copy_run_" + std::to_string(num_sources); }

std::string replay_copy_run_schema(int num_sources) {
  std::string text = replay_copy_run_name(num_sources) + "(Tensor(a!) plan, int batch_size, int width";
  for (int s = 0; s < num_sources; ++s) text += ", Tensor src_" + std::to_string(s);
  return text + ") -> ()";
}

void replay_copy_run(StableIValue* stack, uint64_t num_inputs, uint64_t) {
  const TensorHandle plan = take_tensor(stack[0]);
  const int64_t batch_size = take<int64_t>(stack[1]), width = take<int64_t>(stack[2]);
  const int num_sources = static_cast<int>(num_inputs) - 3;
  TensorHandle sources[kMaxReplayFields];
  for (int s = 0; s < num_sources; ++s) sources[s] = take_tensor(stack[s + 3]);
  run(open_plan<ReplayFields>(kOp, plan.get(), kMagic), sources, num_sources, batch_size, width);
}

// () -> the address of the builtin's PyMethodDef.
void replay_copy_method(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = torch::stable::detail::from(static_cast<int64_t>(reinterpret_cast<uintptr_t>(&kReplay)));
}

void replay_copy_once(StableIValue* stack, uint64_t, uint64_t) {
  const auto sources = take<std::vector<torch::stable::Tensor>>(stack[3]);
  const int64_t batch_size = take<int64_t>(stack[4]), width = take<int64_t>(stack[5]);
  const auto plan = make_replay_plan(stack);
  run(plan.view(), sources.data(), static_cast<int64_t>(sources.size()), batch_size, width);
}

std::string fused_copy_replay_data_schema() {
  std::string text = "fused_copy_replay_data(";
  for (const NamedField& field : kReplayData) text += std::string("Tensor src_") + field.name + ", ";
  for (int f = 0; f < kReplayDataFields; ++f) {
    text += "Tensor(" + std::string(1, static_cast<char>('a' + f)) + "!) dst_" + kReplayData[f].name + ", ";
  }
  return text + "int batch_size, int max_seqlen_k) -> ()";
}

void fused_copy_replay_data(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* kCall = "fused_copy_replay_data";
  TensorHandle handles[2 * kReplayDataFields];
  for (int k = 0; k < 2 * kReplayDataFields; ++k) handles[k] = take_tensor(stack[k]);
  const TensorHandle *const sources = handles, *const destinations = handles + kReplayDataFields;
  const int64_t batch_size = take<int64_t>(stack[2 * kReplayDataFields]);
  const int64_t max_seqlen_k = take<int64_t>(stack[2 * kReplayDataFields + 1]);
  check_size(kCall, "batch_size", batch_size);
  check_size(kCall, "max_seqlen_k", max_seqlen_k);

  int32_t device_index = 0;
  check_shim(aoti_torch_get_device_index(destinations[0].get(), &device_index), "a device index");
  ReplayFields plan;
  for (int f = 0; f < kReplayDataFields; ++f) {
    plan.add(kCall, kReplayData[f].name, kReplayData[f].extra, destinations[f].get(), device_index);
    const int64_t rank = f == kPageTable ? 2 : 1;
    if (plan.fields[f].dim != rank) {
      reject(kCall, {"dst_", kReplayData[f].name}, "rank " + std::to_string(rank), plan.fields[f].dim);
    }
  }
  backend::prepare(device_index);  // the kernels, once: this has no plan that could
  copy_fields(kCall, plan, sources, batch_size, max_seqlen_k, device_index);
}

}  // namespace sgl_kernel
