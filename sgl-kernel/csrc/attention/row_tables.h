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
  uint32_t first_row;  // of these rows among those of all requests
  uint32_t rows_per_req;
  int32_t rows, width;
  bool wide_table_rows;
};

SGLK_HOST_DEVICE int32_t row_length(const RowTables& p, int32_t row) {
  const int32_t length = p.lengths[row] < p.width ? p.lengths[row] : p.width;
  return length > 0 ? length : 0;
}

// Which table a request's rows read, where there are table_rows.
SGLK_HOST_DEVICE int64_t table_of_request(const RowTables& p, uint32_t request) {
  return p.wide_table_rows ? static_cast<const int64_t*>(p.table_rows)[request]
                           : static_cast<const int32_t*>(p.table_rows)[request];
}

// Which table a row reads.
SGLK_HOST_DEVICE int64_t table_index(const RowTables& p, int32_t row) {
  return p.table_rows == nullptr ? row : table_of_request(p, (p.first_row + row) / p.rows_per_req);
}

SGLK_HOST_DEVICE const int32_t* table_of(const RowTables& p, int32_t row) {
  return p.page_table + table_index(p, row) * p.table_stride;
}

}  // namespace sgl_kernel
