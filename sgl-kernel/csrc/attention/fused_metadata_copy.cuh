// The fused metadata copy: many small strided regions, each read once and written to any number of
// destinations, in one launch. This file knows nothing of torch; the host part is shared by the CPU and the
// CUDA library.
#pragma once

#include <cstdint>

#include "backend.h"

namespace sgl_kernel {

constexpr int kMaxCopyRegions = 32;    // regions in one launch: two tables, and four vectors of each of seven backends
constexpr int kMaxCopySlots = 159;     // (region, destination) pairs in one launch: 13 destinations of 12 regions
constexpr int kMaxReplayRegions = 12;  // of one destination each, in a launch that is given its sources
constexpr int kCopyBytesPerThread = 16;

// One destination of one region.
struct CopySlot {
  char* data;
  int64_t stride;  // bytes between rows
};

// Live extent of one region in one launch. A tile is (kBlockThreads >> log2_lanes) rows x (16 << log2_lanes)
// bytes, so narrow rows share a block and wide rows take several.
struct CopyRegion {
  const char* src;
  int64_t src_stride;   // bytes between rows
  int64_t row_bytes;    // live bytes of a row
  uint32_t rows;        // live rows
  uint32_t row_tiles;   // tiles side by side in a row
  uint32_t tile_end;    // one past the region's last tile, counted over all regions
  uint16_t slot_begin;  // destinations: slots[slot_begin, slot_end)
  uint16_t slot_end;
  uint8_t unit;        // bytes of one access: 16, 4 or 1; every row of every tensor is aligned to it
  uint8_t log2_lanes;  // threads side by side on a row
};

// The whole kernel argument. The driver copies it at every launch: few fields, a small one.
template <int kRegions, int kSlots>
struct CopyParamsOf {
  static constexpr int kMaxRegions = kRegions, kMaxSlots = kSlots;
  uint32_t num_regions;
  uint32_t num_tiles;
  CopyRegion regions[kRegions];
  CopySlot slots[kSlots];
};
struct CopyParams : CopyParamsOf<kMaxCopyRegions, kMaxCopySlots> {};
struct ReplayCopyParams : CopyParamsOf<kMaxReplayRegions, kMaxReplayRegions> {};
static_assert(sizeof(CopyParams) <= 4096, "below the limit that every CUDA version has");

// Sets the live extent of a region; returns its number of tiles.
inline uint64_t set_copy_extent(CopyRegion& region, int64_t rows, int64_t row_bytes) {
  region.rows = static_cast<uint32_t>(rows);
  region.row_bytes = row_bytes;
  const int64_t lanes_wanted = (row_bytes + kCopyBytesPerThread - 1) / kCopyBytesPerThread;
  int log2_lanes = 0;
  while ((int64_t{1} << log2_lanes) < lanes_wanted && (1 << log2_lanes) < kBlockThreads) ++log2_lanes;
  region.log2_lanes = static_cast<uint8_t>(log2_lanes);
  const int64_t tile_bytes = int64_t{kCopyBytesPerThread} << log2_lanes;
  const int64_t tile_rows = kBlockThreads >> log2_lanes;
  const uint64_t row_tiles = static_cast<uint64_t>((row_bytes + tile_bytes - 1) / tile_bytes);
  region.row_tiles = static_cast<uint32_t>(row_tiles);
  return row_tiles * static_cast<uint64_t>((rows + tile_rows - 1) / tile_rows);
}

#if defined(__CUDACC__)

// Copies what this thread owns of one tile, up to 16 bytes of one row, to every destination of the region.
// Inside a tile 32-bit offsets suffice; where the tile lies takes 64.
template <typename Unit, typename Params>
__device__ __forceinline__ void copy_tile(const Params& params, const CopyRegion& region, uint32_t tile) {
  constexpr int kSize = sizeof(Unit);
  constexpr int kBatch = kSize >= 4 ? kCopyBytesPerThread / kSize : 4;  // loads in flight
  const int lanes = 1 << region.log2_lanes;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const uint32_t tile_row = tile / region.row_tiles;
  const int64_t row =
      static_cast<int64_t>(tile_row) * (kBlockThreads >> region.log2_lanes) + (threadIdx.x >> region.log2_lanes);
  if (row >= region.rows) return;
  const int64_t begin = static_cast<int64_t>(tile - tile_row * region.row_tiles) * (lanes * kCopyBytesPerThread);
  const int64_t left = region.row_bytes - begin;
  const int bytes = left < lanes * kCopyBytesPerThread ? static_cast<int>(left) : lanes * kCopyBytesPerThread;
  const int whole = bytes / kSize;  // my units: lane, lane + lanes, ... below `whole`

  const char* const src = region.src + row * region.src_stride + begin;
#pragma unroll 1
  for (int first = lane; first < whole; first += kBatch * lanes) {
    Unit value[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k * lanes < whole) value[k] = __ldg(reinterpret_cast<const Unit*>(src) + first + k * lanes);
    }
    for (uint32_t s = region.slot_begin; s < region.slot_end; ++s) {
      Unit* const dst = reinterpret_cast<Unit*>(params.slots[s].data + row * params.slots[s].stride + begin);
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (first + k * lanes < whole) dst[first + k * lanes] = value[k];
      }
    }
  }

  // Fewer bytes than a unit may remain at the end of a row; the last lane takes them.
  if (whole * kSize == bytes || lane != lanes - 1) return;
  for (uint32_t s = region.slot_begin; s < region.slot_end; ++s) {
    char* const dst = params.slots[s].data + row * params.slots[s].stride + begin;
    int offset = whole * kSize;
    for (; offset + 4 <= bytes; offset += 4) {
      *reinterpret_cast<uint32_t*>(dst + offset) = __ldg(reinterpret_cast<const uint32_t*>(src + offset));
    }
    for (; offset < bytes; ++offset) dst[offset] = src[offset];
  }
}

template <typename Params>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerSm)
    fused_metadata_copy_kernel(const __grid_constant__ Params params) {
  for (uint32_t tile = blockIdx.x; tile < params.num_tiles; tile += gridDim.x) {
    uint32_t r = 0, begin = 0;  // regions are sorted, largest first: the scan is short for most tiles
    while (tile >= params.regions[r].tile_end) begin = params.regions[r++].tile_end;
    const CopyRegion& region = params.regions[r];
    switch (region.unit) {
      case 16:
        copy_tile<uint4>(params, region, tile - begin);
        break;
      case 4:
        copy_tile<uint32_t>(params, region, tile - begin);
        break;
      default:
        copy_tile<unsigned char>(params, region, tile - begin);
        break;
    }
  }
}

#endif  // __CUDACC__

}  // namespace sgl_kernel
