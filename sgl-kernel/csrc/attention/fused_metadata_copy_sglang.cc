// SGLang's calls. One table says which fields there are and what of each is live; the schemas, the checks and the
// copies walk it. The parameter block is filled on the stack: no plan. These calls alone repair what SGLang repairs: a
// source whose elements are not side by side is made contiguous first.
#include <torch/csrc/stable/ops.h>

#include <iterator>
#include <string>
#include <vector>

#include "attention/copy_launch.h"
#include "sgl_kernel_ops.h"
#include "stack.h"

namespace sgl_kernel {
namespace {

enum class Live { kRequests, kRequestPrefix, kPages, kRows, kRowPrefix, kRealPages, kSplits, kWhole };

struct Field {
  const char* name;
  const char* dst_name;
  int64_t dim;  // 0: any, taken as its elements in order
  bool optional;
  bool in_multi;
  Live live;
};

// E = seqlens_expanded_size; rows = bs in DECODE, those of page_indices_src in the other modes. Element 0 of a prefix
// sum is left alone.
constexpr Field kFields[] = {
    {"cache_seqlens", "cache_seqlens", 1, false, true, Live::kRequests},           // [0, bs)
    {"cu_seqlens_k", "cu_seqlens_k", 1, false, true, Live::kRequestPrefix},        // [1, bs + 1)
    {"page_indices", "page_table_1", 2, false, true, Live::kPages},                // rows x max_len or max_seqlen_k
    {"nsa_cache_seqlens", "nsa_cache_seqlens", 1, false, true, Live::kRows},       // [0, E)
    {"seqlens_expanded", "seqlens_expanded", 1, true, false, Live::kRows},         // [0, E), not in DECODE
    {"nsa_cu_seqlens_k", "nsa_cu_seqlens_k", 1, false, true, Live::kRowPrefix},    // [1, E + 1)
    {"real_page_table", "real_page_table", 2, true, true, Live::kRealPages},       // rows x the source's columns
    {"flashmla_num_splits", "flashmla_num_splits", 1, true, true, Live::kSplits},  // [0, E + 1)
    {"flashmla_metadata", "flashmla_metadata", 0, true, true, Live::kWhole},       // all of the source
};
constexpr int kNumFields = std::size(kFields);
constexpr int kPageIndices = 2;  // in both calls
constexpr int kMultiDestinations = 3;
static_assert(kNumFields <= kMaxCopyRegions && kNumFields * kMultiDestinations <= kMaxCopySlots);

struct Sizes {
  int64_t mode, bs, max_cols, expanded;
  int64_t rows = 0;
};

struct Part {  // the live part of a field
  int64_t first, rows, cols;
};

Part live_part(Live live, const Sizes& sizes, const TensorView& src) {
  switch (live) {
    case Live::kRequests:
      return {0, 1, sizes.bs};
    case Live::kRequestPrefix:
      return {1, 1, sizes.bs};
    case Live::kPages:
      return {0, sizes.rows, sizes.max_cols};
    case Live::kRows:
      return {0, 1, sizes.expanded};
    case Live::kRowPrefix:
      return {1, 1, sizes.expanded};
    case Live::kRealPages:
      return {0, sizes.rows, src.cols};
    case Live::kSplits:
      return {0, 1, sizes.expanded + 1};
    case Live::kWhole:
      return {0, src.rows, src.cols};
  }
  return {0, 0, 0};
}

void check_size(const char* op, const char* name, int64_t value) {
  if (value < 0 || value > 0x7fffffff) reject(op, {name}, "0 .. 2147483647", value);
}

// A tensor of any rank as a vector of all its elements; its stride tells whether they lie side by side.
TensorView flattened(TensorView view) {
  int64_t* sizes = nullptr;
  bool contiguous = false;
  check_shim(aoti_torch_get_sizes(view.handle, &sizes), "a shape");
  check_shim(aoti_torch_is_contiguous(view.handle, &contiguous), "whether a tensor is contiguous");
  view.cols = 1;
  for (int64_t d = 0; d < view.dim; ++d) view.cols *= sizes[d];
  view.dim = 1, view.rows = 1, view.row_stride = 0, view.col_stride = contiguous ? 1 : 0;
  return view;
}

// SGLang's message.
void check_int32(const char* op, const TensorView& view, int32_t device_index) {
  check_device(op, view, device_index);
  if (view.dtype == aoti_torch_dtype_int32()) return;
  throw std::runtime_error(std::string(op) + ": Tensor " + view.name.str() + " must have dtype int32, found " +
                           dtype_name(view.dtype));
}

// The views of a field's source and destinations, from the same fields of all sets of handles. A source that cannot be
// read in place is replaced by a copy, which lives in `copies`.
struct FieldTensors {
  const char* op;
  const Field& field;
  int32_t device_index;
  std::vector<torch::stable::Tensor>& copies;

  TensorView source(const TensorHandle& handle) const {
    TensorView view = view_of(handle.get(), {field.name, "_src"});
    if (view.cols > 1 && view.col_stride != 1) {
      AtenTensorHandle shared = nullptr;
      check_shim(aoti_torch_new_tensor_handle(handle.get(), &shared), "a tensor again");
      copies.push_back(torch::stable::contiguous(torch::stable::Tensor(shared)));
      view = view_of(copies.back().get(), view.name);
    }
    return view;
  }

  TensorView view_of(AtenTensorHandle handle, FieldName name) const {
    const TensorView view = view_tensor(handle, name);
    check_int32(op, view, device_index);
    return field.dim == 0 ? flattened(view) : view;
  }
};

// `fields`: which of kFields the call has; `handles`: their sources, then each destination's, in the order of
// the table.
void copy_sets(const char* op, const Field* const* fields, int num_fields, const TensorHandle* handles, int num_dsts,
               Sizes sizes) {
  if (sizes.mode == 0 && sizes.expanded != sizes.bs) {
    reject(op, {"seqlens_expanded_size"}, "bs (" + std::to_string(sizes.bs) + ") in DECODE", sizes.expanded);
  }
  RegionArgs regions[kNumFields];
  TensorView dsts[kNumFields * kMultiDestinations];
  int num_regions = 0, num_views = 0;
  const int32_t device_index = view_tensor(handles[0].get(), {fields[0]->name, "_src"}).device_index;
  sizes.rows = sizes.mode == 0 ? sizes.bs : view_tensor(handles[kPageIndices].get(), {"page_indices_src"}).rows;
  std::vector<torch::stable::Tensor> copies;
  for (int f = 0; f < num_fields; ++f) {
    const Field& field = *fields[f];
    const bool only_expanded = field.optional && field.live == Live::kRows;
    if (only_expanded && sizes.mode == 0) continue;
    if (!handles[f]) {
      if (only_expanded) reject(op, {field.name, "_src"}, "a tensor in TARGET_VERIFY and DRAFT_EXTEND", "None");
      continue;
    }
    RegionArgs& region = regions[num_regions++];
    const FieldTensors tensors{op, field, device_index, copies};
    region.src = tensors.source(handles[f]);
    const Part part = live_part(field.live, sizes, region.src);
    Expected expected{device_index, aoti_torch_dtype_int32(), field.dim == 0 ? 1 : field.dim, part.rows,
                      part.first + part.cols};
    check_tensor(op, region.src, expected);
    region.src.data += part.first * 4;
    region.extent.rows = part.rows, region.extent.cols = part.cols;
    region.dsts = dsts + num_views;
    expected.written = true;
    for (int d = 0; d < num_dsts; ++d) {
      TensorView& dst = dsts[num_views];
      const FieldName name{field.dst_name, num_dsts == 1 ? "_dst" : "_dst%d", d};
      const TensorHandle& handle = handles[(d + 1) * num_fields + f];
      if (!handle) reject(op, name, "a tensor, since its source is given", "None");
      dst = tensors.view_of(handle.get(), name);
      if (field.dim == 0 && dst.col_stride != 1) reject(op, name, "a contiguous tensor", "one with gaps");
      check_tensor(op, dst, expected);
      dst.data += part.first * 4;
      // SGLang lets its int32 seq_lens buffer be source and destination at once: a copy onto itself, nothing
      // to do.
      const bool itself = dst.data == region.src.data && (part.rows <= 1 || dst.row_stride == region.src.row_stride);
      if (!itself) ++num_views, ++region.num_dsts;
    }
    if (part.rows == 0 || part.cols == 0 || region.num_dsts == 0) --num_regions, region = RegionArgs{};
  }
  Access accesses[kNumFields * (1 + kMultiDestinations)];
  check_overlaps(op, regions, num_regions, accesses);

  backend::prepare(device_index);  // the kernels, once: this has no plan that could
  CopyLaunch launch;
  for (int r = 0; r < num_regions; ++r) {
    int next = 0;
    launch.add(regions[r], next);
  }
  launch.set_full_extents();
  backend::launch_copy(launch.params, backend::Stream(device_index));
}

std::string schema(const char* name, bool multi, const char* integers) {
  std::string text = std::string(name) + "(";
  int alias = 0;
  for (int set = 0; set <= (multi ? kMultiDestinations : 1); ++set) {
    for (const Field& field : kFields) {
      if (multi && !field.in_multi) continue;
      const std::string mutated = set > 0 ? "(a" + std::to_string(alias++) + "!)" : "";
      const std::string side = set == 0 ? "_src" : multi ? "_dst" + std::to_string(set - 1) : "_dst";
      text +=
          "Tensor" + mutated + (field.optional ? "? " : " ") + (set == 0 ? field.name : field.dst_name) + side + ", ";
    }
  }
  return text + integers + ") -> ()";
}

// Takes `sets` sets of tensors off the stack; returns the first place after them.
int take_sets(StableIValue* stack, bool multi, int sets, TensorHandle* handles, const Field** fields, int& num_fields) {
  num_fields = 0;
  for (const Field& field : kFields) {
    if (!multi || field.in_multi) fields[num_fields++] = &field;
  }
  for (int k = 0; k < sets * num_fields; ++k) {
    handles[k] = fields[k % num_fields]->optional ? take_optional_tensor(stack[k]) : take_tensor(stack[k]);
  }
  return sets * num_fields;
}

}  // namespace

std::string fused_metadata_copy_schema() {
  return schema("fused_metadata_copy", false,
                "int forward_mode, int bs, int max_len, int max_seqlen_k, int seqlens_expanded_size");
}

std::string fused_metadata_copy_multi_schema() {
  return schema("fused_metadata_copy_multi", true, "int bs, int max_len, int seqlens_expanded_size");
}

void fused_metadata_copy(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* kOp = "fused_metadata_copy_cuda";
  TensorHandle handles[2 * kNumFields];
  const Field* fields[kNumFields];
  int num_fields = 0;
  const StableIValue* const integers = stack + take_sets(stack, false, 2, handles, fields, num_fields);
  const int64_t mode = take<int64_t>(integers[0]), bs = take<int64_t>(integers[1]);
  const int64_t max_len = take<int64_t>(integers[2]), max_seqlen_k = take<int64_t>(integers[3]);
  const int64_t expanded = take<int64_t>(integers[4]);
  if (mode < 0 || mode > 2) reject(kOp, {"forward_mode"}, "0 (DECODE), 1 (TARGET_VERIFY) or 2 (DRAFT_EXTEND)", mode);
  check_size(kOp, "bs", bs);
  check_size(kOp, "max_len", max_len);
  check_size(kOp, "max_seqlen_k", max_seqlen_k);
  check_size(kOp, "seqlens_expanded_size", expanded);
  copy_sets(kOp, fields, num_fields, handles, 1, {mode, bs, mode == 0 ? max_len : max_seqlen_k, expanded});
}

void fused_metadata_copy_multi(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* kOp = "fused_metadata_copy_multi_cuda";
  TensorHandle handles[(1 + kMultiDestinations) * kNumFields];
  const Field* fields[kNumFields];
  int num_fields = 0;
  const StableIValue* const integers =
      stack + take_sets(stack, true, 1 + kMultiDestinations, handles, fields, num_fields);
  const int64_t bs = take<int64_t>(integers[0]), max_len = take<int64_t>(integers[1]);
  const int64_t expanded = take<int64_t>(integers[2]);
  check_size(kOp, "bs", bs);
  check_size(kOp, "max_len", max_len);
  check_size(kOp, "seqlens_expanded_size", expanded);
  copy_sets(kOp, fields, num_fields, handles, kMultiDestinations, {0, bs, max_len, expanded});
}

}  // namespace sgl_kernel
