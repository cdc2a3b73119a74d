// Memory that a call reads and writes: no two pieces may share a byte where the order of the accesses would matter.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tensor_view.h"

namespace sgl_kernel {

// The bytes that a call touches in one tensor: `rows` pieces of `row_bytes`, `stride` bytes apart.
struct Footprint {
  const char* data;
  int64_t rows, row_bytes, stride;
  bool empty() const { return rows == 0 || row_bytes == 0; }
  const char* end() const { return data + (rows - 1) * stride + row_bytes; }
};

// All of a tensor; empty where there is none.
inline Footprint footprint_of(const TensorView& view) {
  if (view.handle == nullptr || view.rows == 0) return {};
  const int64_t size = view.element_size, row = view.cols * size;
  if (view.dim < 3) return {view.data, view.rows, row, view.row_stride * size};
  return {view.data, view.planes, (view.rows - 1) * view.row_stride * size + row, view.plane_stride * size};
}

// True when the two share a byte. Exact for equal strides (two column ranges of one buffer do not overlap) and for a
// single row; else the ranges from first to last byte decide.
inline bool overlaps(const Footprint& a, const Footprint& b) {
  if (a.empty() || b.empty() || a.end() <= b.data || b.end() <= a.data) return false;
  if (a.rows == 1 && b.rows > 1) return overlaps(b, a);
  if (a.rows == 1 || a.stride <= 0 || (b.rows > 1 && a.stride != b.stride)) return true;
  int64_t shift = (b.data - a.data) % a.stride;
  if (shift < 0) shift += a.stride;
  return shift < a.row_bytes || shift + b.row_bytes > a.stride;
}

struct Access {
  Footprint bytes;
  const TensorView* view;
  bool written;
  int64_t values;  // what is written: two that begin at the same place, with equal rows, may be written with the same

  bool same_table(const Access& other) const {
    return written && other.written && values == other.values && bytes.data == other.bytes.data &&
           (bytes.stride == other.bytes.stride || bytes.rows <= 1 || other.bytes.rows <= 1);
  }
};

// Refuses what is written to overlap anything else, itself excepted. `read`: what the tensors that are read are called.
// Reorders the accesses.
inline void check_apart(const char* op, Access* first, Access* last, const char* read) {
  last = std::remove_if(first, last, [](const Access& access) { return access.bytes.empty(); });
  std::sort(first, last, [](const Access& a, const Access& b) { return a.bytes.data < b.bytes.data; });
  for (const Access* a = first; a != last; ++a) {
    for (const Access* b = a + 1; b != last && b->bytes.data < a->bytes.end(); ++b) {
      if ((!a->written && !b->written) || !overlaps(a->bytes, b->bytes) || a->same_table(*b)) continue;
      const bool both = a->written && b->written;
      const Access& wrong = both ? (a->view < b->view ? *b : *a) : (a->written ? *a : *b);
      const Access& other = &wrong == a ? *b : *a;
      reject(op, wrong.view->name, std::string("memory apart from every ") + (both ? "other destination" : read),
             "an overlap with " + other.view->name.str());
    }
  }
}

}  // namespace sgl_kernel
