// The arguments of an operator that say which tables its rows read: taken from the stack's values, checked, packed.
#pragma once

#include <limits>

#include "attention/row_tables.h"
#include "tensor_view.h"

namespace sgl_kernel {

constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();

// Of the integers, before any tensor is looked at.
struct RowTablesIntegers {
  int64_t first_row, rows_per_req, width;

  void check(const char* op) const {
    check_range(op, {"first_row"}, first_row, 0, kMostRows);
    check_range(op, {"rows_per_req"}, rows_per_req, 1, kMostRows);
    check_range(op, {"width"}, width, 0, kMostRows / 2);
  }
};

// `rows` are those that the operator serves; `table_rows` without a handle: each row has a table of its own.
inline RowTables check_row_tables(const char* op, TensorView& page_table, TensorView& table_rows, TensorView& lengths,
                                  const RowTablesIntegers& integers, int32_t device_index, int64_t rows) {
  const auto& [first_row, rows_per_req, width] = integers;
  const int32_t ints = aoti_torch_dtype_int32();
  const bool shared = table_rows.handle != nullptr;
  check_tensor(op, page_table, {device_index, ints, 2, shared ? 0 : rows, width});
  if (shared) {
    check_device(op, table_rows, device_index);
    if (table_rows.dtype != ints && table_rows.dtype != aoti_torch_dtype_int64()) {
      reject(op, table_rows.name, "int32 or int64", dtype_name(table_rows.dtype));
    }
    const int64_t requests = rows == 0 ? 0 : (first_row + rows - 1) / rows_per_req + 1;
    check_tensor(op, table_rows, {device_index, table_rows.dtype, 1, 1, requests});
  }
  check_tensor(op, lengths, {device_index, ints, 1, 1, rows});

  RowTables tables{};
  tables.page_table = reinterpret_cast<int32_t*>(page_table.data), tables.table_stride = page_table.row_stride;
  tables.table_rows = table_rows.data, tables.wide_table_rows = table_rows.element_size == 8;
  tables.lengths = reinterpret_cast<int32_t*>(lengths.data);
  tables.first_row = static_cast<uint32_t>(first_row), tables.rows_per_req = static_cast<uint32_t>(rows_per_req);
  tables.rows = static_cast<int32_t>(rows), tables.width = static_cast<int32_t>(width);
  return tables;
}

}  // namespace sgl_kernel
