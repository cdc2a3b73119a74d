// Tensors at the operator boundary: a plain description of each, and the checks that every operator makes, in
// one fixed order: device, dtype, rank, shape, stride, overlap. No check reads the memory of a device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "backend.h"

namespace sgl_kernel {

// The name of an argument, put together only when a message needs it.
struct FieldName {
  const char* stem;
  const char* suffix = "";  // may hold up to two %d
  int a = 0;
  int b = 0;
  std::string str() const {
    char text[96];
    std::snprintf(text, sizeof(text), suffix, a, b);
    return std::string(stem) + text;
  }
};

// No streams: their locale facets crash where a toolchain links libstdc++ statically into this library and the process
// has another copy of it.
inline std::string text_of(const std::string& text) { return text; }
template <typename Integer, typename = std::enable_if_t<std::is_integral_v<Integer>>>
std::string text_of(Integer number) {
  return std::to_string(number);
}

// Every rejection reads: <operator>: <field>: expected <what>, found <what>.
template <typename Expected, typename Found>
[[noreturn]] void reject(const char* op, const FieldName& field, const Expected& expected, const Found& found) {
  throw std::runtime_error(std::string(op) + ": " + field.str() + ": expected " + text_of(expected) + ", found " +
                           text_of(found));
}

inline void check_range(const char* op, const FieldName& name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return;
  reject(op, name, std::to_string(least) + " .. " + std::to_string(most), value);
}

inline void check_shim(AOTITorchError status, const char* what) {
  if (status != 0) throw std::runtime_error(std::string("sgl_kernel: torch failed to tell ") + what);
}

struct TensorView {
  FieldName name;
  AtenTensorHandle handle = nullptr;
  char* data = nullptr;  // where there is a handle set by check_tensor, after the device is known to be right
  int32_t device_type = 0, device_index = 0, dtype = 0;
  int64_t element_size = 0;
  int64_t dim = 0, rows = 1, cols = 1;     // a 1-D tensor is one row
  int64_t planes = 1, plane_stride = 0;    // of a 3-D tensor
  int64_t row_stride = 0, col_stride = 1;  // elements
};

inline void set_shape(TensorView& view, int64_t dim, const int64_t* sizes, const int64_t* strides) {
  view.dim = dim;
  if (dim == 1) {
    view.cols = sizes[0], view.col_stride = strides[0];
  } else if (dim == 2) {
    view.rows = sizes[0], view.cols = sizes[1], view.row_stride = strides[0], view.col_stride = strides[1];
  } else if (dim == 3) {
    set_shape(view, 2, sizes + 1, strides + 1);
    view.dim = dim, view.planes = sizes[0], view.plane_stride = strides[0];
  }
}

inline TensorView view_tensor(AtenTensorHandle handle, FieldName name) {
  TensorView view;
  view.name = name;
  view.handle = handle;
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  check_shim(aoti_torch_get_device_type(handle, &view.device_type), "a device type");
  check_shim(aoti_torch_get_device_index(handle, &view.device_index), "a device index");
  check_shim(aoti_torch_get_dtype(handle, &view.dtype), "a dtype");
  check_shim(aoti_torch_get_dim(handle, &dim), "a rank");
  check_shim(aoti_torch_get_sizes(handle, &sizes), "a shape");
  check_shim(aoti_torch_get_strides(handle, &strides), "strides");
  view.element_size = static_cast<int64_t>(aoti_torch_dtype_element_size(view.dtype));
  set_shape(view, dim, sizes, strides);
  return view;
}

inline std::string dtype_name(int32_t dtype) {
  struct Known {
    int32_t (*number)();
    const char* name;
  };
  static constexpr Known kKnown[] = {
      {aoti_torch_dtype_int32, "int32"},     {aoti_torch_dtype_int64, "int64"},
      {aoti_torch_dtype_uint8, "uint8"},     {aoti_torch_dtype_int8, "int8"},
      {aoti_torch_dtype_bool, "bool"},       {aoti_torch_dtype_int16, "int16"},
      {aoti_torch_dtype_float32, "float32"}, {aoti_torch_dtype_float64, "float64"},
      {aoti_torch_dtype_float16, "float16"}, {aoti_torch_dtype_bfloat16, "bfloat16"},
  };
  for (const Known& known : kKnown) {
    if (known.number() == dtype) return known.name;
  }
  return "dtype number " + std::to_string(dtype);
}

inline std::string device_text(int32_t type, int32_t index) {
  const std::string name = type == aoti_torch_device_type_cpu()    ? "cpu"
                           : type == aoti_torch_device_type_cuda() ? "cuda"
                           : type == aoti_torch_device_type_meta() ? "meta"
                                                                   : "device type " + std::to_string(type);
  return type == aoti_torch_device_type_cpu() ? name : name + ":" + std::to_string(index);
}

inline std::string shape_text(const TensorView& view) {
  const std::string cols = std::to_string(view.cols), rows = std::to_string(view.rows);
  if (view.dim == 1) return "[" + cols + "]";
  return "[" + (view.dim == 3 ? std::to_string(view.planes) + ", " : "") + rows + ", " + cols + "]";
}

// What a tensor must be. `device_index` is that of the call's first tensor.
struct Expected {
  int32_t device_index;
  int32_t dtype;
  int64_t dim;
  int64_t rows;  // at least (ignored for 1-D)
  int64_t cols;  // at least
  bool written = false;
};

inline void check_device(const char* op, const TensorView& view, int32_t device_index) {
  if (view.device_type == backend::device_type() && view.device_index == device_index) return;
  reject(op, view.name, "a tensor on " + device_text(backend::device_type(), device_index),
         device_text(view.device_type, view.device_index));
}

inline void check_shape(const char* op, const TensorView& view, int64_t rows, int64_t cols) {
  if (view.cols >= cols && (view.dim == 1 || view.rows >= rows)) return;
  const std::string wanted =
      view.dim == 1 ? "[" + std::to_string(cols) + "]" : "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
  reject(op, view.name, "a shape of at least " + wanted, shape_text(view));
}

// A tensor without elements may have any strides.
inline void check_stride(const char* op, const TensorView& view, bool written) {
  if (view.rows == 0 || view.cols == 0) return;
  if (view.cols > 1 && view.col_stride != 1) reject(op, view.name, "an inner stride of 1", view.col_stride);
  if (written && view.dim == 2 && view.rows > 1 && view.row_stride < view.cols) {
    reject(op, view.name, "rows that do not overlap (row stride of at least " + std::to_string(view.cols) + ")",
           view.row_stride);
  }
}

// What is read or written in vectors. After check_tensor.
inline void check_row_alignment(const char* op, const TensorView& view, int64_t bytes) {
  const int64_t shift = static_cast<int64_t>(reinterpret_cast<uintptr_t>(view.data) % bytes);
  const auto aligned = [&](int64_t count, int64_t stride) {
    return count <= 1 || stride * view.element_size % bytes == 0;
  };
  if (shift == 0 && aligned(view.rows, view.row_stride) && aligned(view.planes, view.plane_stride)) return;
  reject(op, view.name, "rows that begin at multiples of " + std::to_string(bytes) + " bytes",
         "an address of " + std::to_string(shift) + " modulo " + std::to_string(bytes) + ", a row stride of " +
             std::to_string(view.row_stride));
}

inline char* data_of(const TensorView& view) {
  void* data = nullptr;
  check_shim(aoti_torch_get_data_ptr(view.handle, &data), "a data pointer");
  return static_cast<char*>(data);
}

// All checks of one tensor by itself; sets view.data.
inline void check_tensor(const char* op, TensorView& view, const Expected& expected) {
  check_device(op, view, expected.device_index);
  if (view.dtype != expected.dtype) reject(op, view.name, dtype_name(expected.dtype), dtype_name(view.dtype));
  if (view.dim != expected.dim) reject(op, view.name, "rank " + std::to_string(expected.dim), view.dim);
  check_shape(op, view, expected.rows, expected.cols);
  check_stride(op, view, expected.written);
  if (view.handle != nullptr) view.data = data_of(view);
}

}  // namespace sgl_kernel
