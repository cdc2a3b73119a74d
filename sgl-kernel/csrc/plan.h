// A plan is a byte tensor on the CPU: a header and one parameter block per launch. The Python object that
// owns it also keeps alive the tensors whose addresses it holds.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

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

// Cheap enough for every run: refuses anything that make_plan did not make for this operator and device.
template <typename Launch>
PlanView<Launch> open_plan(const char* op, AtenTensorHandle plan, uint64_t magic) {
  int32_t device_type = 0;
  int64_t size = 0;
  void* data = nullptr;
  check_shim(aoti_torch_get_device_type(plan, &device_type), "a device type");
  check_shim(aoti_torch_get_numel(plan, &size), "a size");
  if (device_type == aoti_torch_device_type_cpu() && size >= static_cast<int64_t>(sizeof(PlanHeader))) {
    check_shim(aoti_torch_get_data_ptr(plan, &data), "a data pointer");
    const PlanHeader* const header = static_cast<const PlanHeader*>(data);
    const int64_t payload = size - static_cast<int64_t>(sizeof(PlanHeader));
    if (header->magic == magic && header->device_type == backend::device_type() &&
        payload == header->num_launches * static_cast<int64_t>(sizeof(Launch))) {
      const Launch* const first = reinterpret_cast<const Launch*>(header + 1);
      return {header, first, first + header->num_launches};
    }
  }
  reject(op, {"plan"}, std::string("a plan made by this operator for ") + backend::device_name(),
         "a tensor of " + std::to_string(size) + " elements that is none");
}

}  // namespace sgl_kernel
