// Arguments off the stack of the stable ABI. A handle on the stack is ours: taking it means deleting it
// later.
#pragma once

#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>

namespace sgl_kernel {

struct DeleteTensor {
  void operator()(AtenTensorOpaque* handle) const { aoti_torch_delete_tensor_object(handle); }
};
using TensorHandle = std::unique_ptr<AtenTensorOpaque, DeleteTensor>;

inline TensorHandle take_tensor(StableIValue value) {
  return TensorHandle(torch::stable::detail::to<AtenTensorHandle>(value));
}

inline TensorHandle take_optional_tensor(StableIValue value) {
  return TensorHandle(torch::stable::detail::to<std::optional<AtenTensorHandle>>(value).value_or(nullptr));
}

template <typename T>
T take(StableIValue value) {
  return torch::stable::detail::to<T>(value);
}

}  // namespace sgl_kernel
