// Rows that read what they attend to through tables of slots: what the indexer's kernels have in common. No torch in
// here.
#pragma once

#include <cstdint>

#include "backend.h"

namespace sgl_kernel {

struct RowTables {
  const int32_t* page_table;  // [tables, >= width]: the slot of each position
  const void* table_rows;     // [requests], int64 where wide_table_rows, else int32; null: row t reads table t
  const int32_t* lengths;     // [rows]: keys of each row; those beyond `width` do not count
  int64_t table_stride;
  int64_t first_row;  // of these rows among those of all requests
  int32_t rows, rows_per_req, width;
  bool wide_table_rows;
};

SGLK_HOST_DEVICE int32_t row_length(const RowTables& p, int32_t row) {
  const int32_t length = p.lengths[row] < p.width ? p.lengths[row] : p.width;
  return length > 0 ? length : 0;
}

// Which table a row reads.
SGLK_HOST_DEVICE int64_t table_index(const RowTables& p, int32_t row) {
  if (p.table_rows == nullptr) return row;
  const int64_t request = (p.first_row + row) / p.rows_per_req;
  return p.wide_table_rows ? static_cast<const int64_t*>(p.table_rows)[request]
                           : static_cast<const int32_t*>(p.table_rows)[request];
}

SGLK_HOST_DEVICE const int32_t* table_of(const RowTables& p, int32_t row) {
  return p.page_table + table_index(p, row) * p.table_stride;
}

}  // namespace sgl_kernel
