// Ways to give threads their part of a copy of several regions, to be measured against each other and against the
// library's kernel. Knows nothing of torch: copy_variants.py compiles it and calls it through ctypes.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

constexpr int kMaxRegions = 8;

// Everything in units of int32.
struct Region {
  const int32_t* src;
  int32_t* dst;
  int64_t rows, cols;
  int64_t src_stride, dst_stride;  // between rows
};

struct Regions {
  int32_t count;
  Region region[kMaxRegions];
};

namespace {

constexpr int kWarp = 32;

enum Threading : int {
  kElement = 0,  // a thread for each unit of a region, row and column by division
  kGrid2D = 1,   // blockIdx.y strides over rows, blockIdx.x and threads over columns
  kWarpRow = 2,  // a warp for each row
  kPiece = 3,    // a block for each piece of a row, a thread for each unit of the piece
};

template <typename Unit>
struct Strided {
  const Unit* src;
  Unit* dst;
  int64_t rows, cols, src_stride, dst_stride;  // in units

  __device__ explicit Strided(const Region& r)
      : src(reinterpret_cast<const Unit*>(r.src)),
        dst(reinterpret_cast<Unit*>(r.dst)),
        rows(r.rows),
        cols(r.cols / kPer),
        src_stride(r.src_stride / kPer),
        dst_stride(r.dst_stride / kPer) {}
  __device__ void copy(int64_t row, int64_t col) const { dst[row * dst_stride + col] = src[row * src_stride + col]; }

  static constexpr int64_t kPer = sizeof(Unit) / sizeof(int32_t);
};

template <typename Unit>
__device__ void copy_elements(const Region& region) {
  const Strided<Unit> r(region);
  const int64_t total = r.rows * r.cols, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    if (r.rows == 1) {
      r.copy(0, i);
    } else {
      r.copy(i / r.cols, i % r.cols);
    }
  }
}

template <typename Unit>
__device__ void copy_grid(const Region& region) {
  const Strided<Unit> r(region);
  for (int64_t row = blockIdx.y; row < r.rows; row += gridDim.y) {
    for (int64_t col = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; col < r.cols;
         col += static_cast<int64_t>(gridDim.x) * blockDim.x) {
      r.copy(row, col);
    }
  }
}

template <typename Unit>
__device__ void copy_warps(const Region& region) {
  const Strided<Unit> r(region);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * blockDim.x / kWarp;
  for (int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp; row < r.rows;
       row += warps) {
    for (int64_t col = threadIdx.x % kWarp; col < r.cols; col += kWarp) r.copy(row, col);
  }
}

template <typename Unit>
__device__ void copy_pieces(const Region& region) {
  const Strided<Unit> r(region);
  const int64_t pieces = (r.cols + blockDim.x - 1) / blockDim.x;
  for (int64_t i = blockIdx.x; i < r.rows * pieces; i += gridDim.x) {
    const int64_t row = i / pieces, col = (i - row * pieces) * blockDim.x + threadIdx.x;
    if (col < r.cols) r.copy(row, col);
  }
}

template <Threading kThreading, typename Unit>
__device__ void copy_region(const Region& region) {
  // A region whose rows are no multiple of the unit (cu_seqlens: bs + 1) goes element by element.
  const bool fits =
      (region.cols | region.src_stride | region.dst_stride) % (sizeof(Unit) / 4) == 0 &&
      (reinterpret_cast<uintptr_t>(region.src) | reinterpret_cast<uintptr_t>(region.dst)) % sizeof(Unit) == 0;
  if constexpr (kThreading == kElement) {
    fits ? copy_elements<Unit>(region) : copy_elements<int32_t>(region);
  } else if constexpr (kThreading == kGrid2D) {
    fits ? copy_grid<Unit>(region) : copy_grid<int32_t>(region);
  } else if constexpr (kThreading == kWarpRow) {
    fits ? copy_warps<Unit>(region) : copy_warps<int32_t>(region);
  } else {
    fits ? copy_pieces<Unit>(region) : copy_pieces<int32_t>(region);
  }
}

template <Threading kThreading, typename Unit>
__global__ void copy_array(const __grid_constant__ Regions regions) {
  for (int r = 0; r < regions.count; ++r) copy_region<kThreading, Unit>(regions.region[r]);
}

// The same with every region a parameter of its own: nothing is indexed.
template <Threading kThreading, typename Unit>
__global__ void copy_explicit(const __grid_constant__ Region a, const __grid_constant__ Region b,
                              const __grid_constant__ Region c, const __grid_constant__ Region d,
                              const __grid_constant__ Region e, const __grid_constant__ Region f) {
  copy_region<kThreading, Unit>(a);
  copy_region<kThreading, Unit>(b);
  copy_region<kThreading, Unit>(c);
  copy_region<kThreading, Unit>(d);
  copy_region<kThreading, Unit>(e);
  copy_region<kThreading, Unit>(f);
}

template <Threading kThreading, typename Unit>
void launch(const Regions& regions, bool explicit_sizes, dim3 grid, int block, cudaStream_t stream) {
  if (explicit_sizes) {
    const Region* r = regions.region;
    copy_explicit<kThreading, Unit><<<grid, block, 0, stream>>>(r[0], r[1], r[2], r[3], r[4], r[5]);
  } else {
    copy_array<kThreading, Unit><<<grid, block, 0, stream>>>(regions);
  }
}

// Blocks for the largest region: a thread for each unit, a warp for each row, or a block for each piece of a row; at
// most max_blocks.
dim3 grid_of(const Regions& regions, int threading, int per, int block, int max_blocks) {
  int64_t blocks = 1, rows = 1;
  for (int r = 0; r < regions.count; ++r) {
    const Region& region = regions.region[r];
    int64_t columns = threading == kWarpRow ? kWarp : (region.cols + per - 1) / per;
    if (threading == kPiece) columns = (columns + block - 1) / block * block;
    const int64_t threads = threading == kGrid2D ? columns : region.rows * columns;
    blocks = std::max(blocks, (threads + block - 1) / block);
    rows = std::max(rows, region.rows);
  }
  if (threading != kGrid2D) return dim3(static_cast<unsigned>(std::min<int64_t>(blocks, max_blocks)));
  const int64_t across = std::min<int64_t>(blocks, max_blocks);
  return dim3(static_cast<unsigned>(across),
              static_cast<unsigned>(std::min<int64_t>(rows, std::max<int64_t>(max_blocks / across, 1))));
}

}  // namespace

// Returns a cudaError_t. explicit_sizes needs six regions.
extern "C" int launch_copy(const Regions* regions, int threading, int unit_bytes, int explicit_sizes, int block,
                           int max_blocks, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (regions->count < 1 || regions->count > kMaxRegions || (explicit_sizes && regions->count != 6)) {
    return cudaErrorInvalidValue;
  }
  const dim3 grid = grid_of(*regions, threading, unit_bytes / 4, block, max_blocks);
  const bool wide = unit_bytes == 16;
  switch (threading) {
    case kElement:
      wide ? launch<kElement, int4>(*regions, explicit_sizes, grid, block, stream)
           : launch<kElement, int32_t>(*regions, explicit_sizes, grid, block, stream);
      break;
    case kGrid2D:
      wide ? launch<kGrid2D, int4>(*regions, explicit_sizes, grid, block, stream)
           : launch<kGrid2D, int32_t>(*regions, explicit_sizes, grid, block, stream);
      break;
    case kWarpRow:
      wide ? launch<kWarpRow, int4>(*regions, explicit_sizes, grid, block, stream)
           : launch<kWarpRow, int32_t>(*regions, explicit_sizes, grid, block, stream);
      break;
    case kPiece:
      wide ? launch<kPiece, int4>(*regions, explicit_sizes, grid, block, stream)
           : launch<kPiece, int32_t>(*regions, explicit_sizes, grid, block, stream);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}
