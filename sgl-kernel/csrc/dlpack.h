// Tensors out of Python objects by DLPack's C exchange API, which torch.Tensor offers: neither torch's C++ ABI nor its
// dispatcher is between. The layouts are DLPack's, version 1; torch's own header of them is not for its stable ABI.
#pragma once

#include <cstdint>

#include "tensor_view.h"

namespace sgl_kernel::dlpack {

constexpr int32_t kCpu = 1, kCuda = 2;  // of device_type

struct Tensor {
  void* data;
  int32_t device_type, device_index;
  int32_t dim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *sizes, *strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  const ExchangeApi* previous;
  void* managed[3];
  int (*view)(void* object, Tensor* out);  // borrows; 0, or Python has an error set
  void* current_stream;
};

// torch's number; -1 for what no operator takes.
inline int32_t dtype_of(const Tensor& tensor) {
  struct Known {
    int code, bits;
    int32_t (*number)();
  };
  constexpr int kInt = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4, kBool = 6;
  static constexpr Known kKnown[] = {
      {kInt, 32, aoti_torch_dtype_int32},     {kInt, 64, aoti_torch_dtype_int64},
      {kUnsigned, 8, aoti_torch_dtype_uint8}, {kInt, 8, aoti_torch_dtype_int8},
      {kBool, 8, aoti_torch_dtype_bool},      {kInt, 16, aoti_torch_dtype_int16},
      {kFloat, 32, aoti_torch_dtype_float32}, {kFloat, 64, aoti_torch_dtype_float64},
      {kFloat, 16, aoti_torch_dtype_float16}, {kBfloat, 16, aoti_torch_dtype_bfloat16},
  };
  for (const Known& known : kKnown) {
    if (known.code == tensor.code && known.bits == tensor.bits && tensor.lanes == 1) return known.number();
  }
  return -1;
}

inline TensorView view_tensor(const Tensor& tensor, FieldName name) {
  TensorView view;
  view.name = name;
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.dtype = dtype_of(tensor);
  view.element_size = tensor.bits / 8;
  view.device_type = view.device_index = -1;
  if (tensor.device_type == kCpu) {
    view.device_type = aoti_torch_device_type_cpu();
  } else if (tensor.device_type == kCuda) {
    view.device_type = aoti_torch_device_type_cuda(), view.device_index = tensor.device_index;
  }
  set_shape(view, tensor.dim, tensor.sizes, tensor.strides);
  return view;
}

}  // namespace sgl_kernel::dlpack
