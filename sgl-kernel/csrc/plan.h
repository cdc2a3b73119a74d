// A plan is a byte tensor on the CPU: a header and one parameter block per launch. The Python object that
// owns it also keeps alive the tensors whose addresses it holds.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "tensor_view.h"

namespace sgl_kernel {

struct PlanHeader {
  uint64_t magic;  // which operator's plan, and which layout
  int64_t num_launches;
  int32_t device_index;
  int32_t device_type;
  int64_t limits[2];  // fused_metadata_copy: the largest expanded_rows and max_len
};

template <typename Launch>
AtenTensorHandle make_plan(const PlanHeader& header, const std::vector<Launch>& launches) {
  static_assert(std::is_trivially_copyable_v<Launch>);
  const int64_t size = static_cast<int64_t>(sizeof(PlanHeader) + launches.size() * sizeof(Launch)), stride = 1;
  AtenTensorHandle plan = nullptr;
  check_shim(
      aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0, &plan),
      "memory for a plan");
  void* data = nullptr;
  check_shim(aoti_torch_get_data_ptr(plan, &data), "a data pointer");
  std::memcpy(data, &header, sizeof(header));
  if (!launches.empty()) {
    std::memcpy(static_cast<char*>(data) + sizeof(header), launches.data(), launches.size() * sizeof(Launch));
  }
  return plan;
}

template <typename Launch>
struct PlanView {
  const PlanHeader* header;
  const Launch* begin;
  const Launch* end;
};

// A plan before it is a tensor, with the tensors whose addresses it holds.
template <typename Launch>
struct Planned {
  PlanHeader header;
  std::vector<Launch> launches;
  std::vector<torch::stable::Tensor> tensors;

  AtenTensorHandle as_tensor() const { return make_plan(header, launches); }
  PlanView<Launch> view() const { return {&header, launches.data(), launches.data() + launches.size()}; }
};

// The bytes of a tensor that may be a plan; null if it cannot be one.
inline const PlanHeader* plan_header(AtenTensorHandle plan, int64_t size) {
  int32_t device_type = 0, dtype = 0;
  int64_t dim = 0;
  bool contiguous = false;
  check_shim(aoti_torch_get_device_type(plan, &device_type), "a device type");
  check_shim(aoti_torch_get_dtype(plan, &dtype), "a dtype");
  check_shim(aoti_torch_get_dim(plan, &dim), "a rank");
  check_shim(aoti_torch_is_contiguous(plan, &contiguous), "whether a tensor is contiguous");
  if (device_type != aoti_torch_device_type_cpu() || dtype != aoti_torch_dtype_uint8() || dim != 1 || !contiguous ||
      size < static_cast<int64_t>(sizeof(PlanHeader))) {
    return nullptr;
  }
  void* data = nullptr;
  check_shim(aoti_torch_get_data_ptr(plan, &data), "a data pointer");
  return reinterpret_cast<uintptr_t>(data) % alignof(PlanHeader) == 0 ? static_cast<PlanHeader*>(data) : nullptr;
}

inline bool is_plan_of(const PlanHeader& header, uint64_t magic) {
  return header.magic == magic && header.device_type == backend::device_type();
}

template <typename Launch>
PlanView<Launch> view_plan(const PlanHeader* header) {
  static_assert(alignof(Launch) <= alignof(PlanHeader) && sizeof(PlanHeader) % alignof(Launch) == 0);
  const Launch* const first = reinterpret_cast<const Launch*>(header + 1);
  return {header, first, first + header->num_launches};
}

// Cheap enough for every run: refuses what make_plan did not make for this operator and device. Launch::counts_fit says
// whether the counts of a parameter block lie within its arrays.
template <typename Launch>
PlanView<Launch> open_plan(const char* op, AtenTensorHandle plan, uint64_t magic) {
  int64_t size = 0;
  check_shim(aoti_torch_get_numel(plan, &size), "a size");
  const PlanHeader* const header = plan_header(plan, size);
  constexpr int64_t kSize = static_cast<int64_t>(sizeof(Launch));
  const int64_t payload = size - static_cast<int64_t>(sizeof(PlanHeader));
  if (header != nullptr && is_plan_of(*header, magic) && payload % kSize == 0 &&
      header->num_launches == payload / kSize) {
    const PlanView<Launch> view = view_plan<Launch>(header);
    if (std::all_of(view.begin, view.end, [](const Launch& launch) { return launch.counts_fit(); })) return view;
  }
  reject(op, {"plan"}, std::string("a plan made by this operator for ") + backend::device_name(),
         "a tensor of " + std::to_string(size) + " elements that is none");
}

// The same of a plan whose owner gives its address: that it is whole was seen to when it was made.
template <typename Launch>
PlanView<Launch> open_plan(const char* op, const PlanHeader* plan, uint64_t magic) {
  if (is_plan_of(*plan, magic)) return view_plan<Launch>(plan);
  reject(op, {"plan"}, std::string("a plan made by this operator for ") + backend::device_name(), "another");
}

}  // namespace sgl_kernel
