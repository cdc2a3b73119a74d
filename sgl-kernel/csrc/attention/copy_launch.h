// From checked regions to parameter blocks: packing, live extents, overlap. Shared by the plan and by
// SGLang's calls.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/fused_metadata_copy.cuh"
#include "overlap.h"
#include "tensor_view.h"

namespace sgl_kernel {

// What a region may grow to, and which part of it follows the run's two integers.
struct CopyExtent {
  int64_t rows = 1;  // a 1-D region is one row
  int64_t cols = 0;  // elements
  int64_t rows_extra = 0;
  int64_t cols_per = 0;  // > 0: only the first ceil(max_len / cols_per) columns
  int32_t element_size = 4;
  bool rows_expanded = false;  // only the first expanded_rows + rows_extra rows (1-D: elements)
  bool one_dimensional = true;

  bool follows_run() const { return rows_expanded || cols_per > 0; }
};

struct RegionArgs {
  TensorView src;
  const TensorView* dsts = nullptr;
  int num_dsts = 0;
  CopyExtent extent;
};

inline Footprint footprint(const TensorView& view, const CopyExtent& extent) {
  return {view.data, extent.rows, extent.cols * extent.element_size, view.row_stride * extent.element_size};
}

// No source may share a byte with any destination, and no destination with that of another region.
inline void check_overlaps(const char* op, const RegionArgs* regions, int num_regions, Access* accesses) {
  Access* end = accesses;
  for (int r = 0; r < num_regions; ++r) {
    const RegionArgs& region = regions[r];
    *end++ = {footprint(region.src, region.extent), &region.src, false, r};
    for (int d = 0; d < region.num_dsts; ++d) {
      *end++ = {footprint(region.dsts[d], region.extent), &region.dsts[d], true, r};
    }
  }
  check_apart(op, accesses, end, "source");
}

// One launch: the kernel's argument, and what it takes to set its live extents.
template <typename Params>
struct CopyLaunchOf {
  Params params{};
  CopyExtent extents[Params::kMaxRegions];

  bool counts_fit() const {
    if (params.num_regions > Params::kMaxRegions) return false;
    return std::all_of(params.regions, params.regions + params.num_regions, [](const CopyRegion& region) {
      return region.slot_begin <= region.slot_end && region.slot_end <= Params::kMaxSlots;
    });
  }

  // Appends the region with its destinations from `next_dst` on, as many as fit; false when none does.
  bool add(const RegionArgs& region, int& next_dst) {
    const uint32_t index = params.num_regions;
    const int used = index > 0 ? params.regions[index - 1].slot_end : 0;
    const int taken = std::min(region.num_dsts - next_dst, Params::kMaxSlots - used);
    if (index == Params::kMaxRegions || taken <= 0) return false;

    const int64_t element_size = region.extent.element_size;
    const bool many_rows = region.extent.rows > 1;
    CopyRegion& out = params.regions[params.num_regions++];
    out.src = region.src.data;
    out.src_stride = many_rows ? region.src.row_stride * element_size : 0;
    uint64_t address_bits = reinterpret_cast<uintptr_t>(out.src) | static_cast<uint64_t>(out.src_stride);
    out.slot_begin = static_cast<uint16_t>(used);
    out.slot_end = static_cast<uint16_t>(used + taken);
    for (int s = used; s < used + taken; ++s) {
      const TensorView& dst = region.dsts[next_dst++];
      params.slots[s] = {dst.data, many_rows ? dst.row_stride * element_size : 0};
      address_bits |= reinterpret_cast<uintptr_t>(dst.data) | static_cast<uint64_t>(params.slots[s].stride);
    }
    out.unit = address_bits % 16 == 0 ? 16 : address_bits % 4 == 0 ? 4 : 1;
    extents[index] = region.extent;
    return true;
  }

  // Sets the full extents of all regions; returns the number of tiles.
  uint64_t set_full_extents() {
    uint64_t tiles = 0;
    for (uint32_t r = 0; r < params.num_regions; ++r) {
      tiles += set_copy_extent(params.regions[r], extents[r].rows, extents[r].cols * extents[r].element_size);
      params.regions[r].tile_end = static_cast<uint32_t>(tiles);
    }
    params.num_tiles = static_cast<uint32_t>(tiles);
    return tiles;
  }

  // Sets the live extents of a run in `out`, a copy of params: few regions follow the run's integers, and the tiles of
  // the others only move.
  void set_live_extents(Params& out, int64_t expanded_rows, int64_t max_len) const {
    uint32_t full_end = 0, fewer = 0;  // tiles than in full
    for (uint32_t r = 0; r < params.num_regions; ++r) {
      const CopyExtent& extent = extents[r];
      const uint32_t full = params.regions[r].tile_end - full_end;
      full_end = params.regions[r].tile_end;
      if (extent.follows_run()) {
        int64_t rows = extent.rows, cols = extent.cols;
        if (extent.rows_expanded && expanded_rows >= 0) {
          (extent.one_dimensional ? cols : rows) = expanded_rows + extent.rows_extra;
        }
        if (extent.cols_per > 0 && max_len >= 0) {
          cols = max_len / extent.cols_per + (max_len % extent.cols_per != 0);
        }
        fewer += full - static_cast<uint32_t>(set_copy_extent(out.regions[r], rows, cols * extent.element_size));
      }
      out.regions[r].tile_end = full_end - fewer;
    }
    out.num_tiles = params.num_tiles - fewer;
  }
};
using CopyLaunch = CopyLaunchOf<CopyParams>;

}  // namespace sgl_kernel
