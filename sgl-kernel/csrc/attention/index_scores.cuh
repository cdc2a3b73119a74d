// The indexer's scores on Hopper: score[t, s] = sum_h weights[t, h] * relu(q[t, h] . k[s]).
//
// A block keeps the queries of a few rows in shared memory. Each of its warpgroups takes 64 keys at a time out of
// global memory into the registers of a product's first operand, multiplies them with one row's heads after the other,
// and sums relu * weight in registers. The warpgroups of a multiprocessor do so independently: while one waits for keys
// or sums heads, others multiply. What is computed of a row and a key depends on nothing else: not on the batch, the
// block or the tile that they are in.
#pragma once

#include <cstdint>

#include "attention/dependent_launch.cuh"
#include "attention/index_scores.h"
#include "attention/wgmma.cuh"

namespace sgl_kernel {

constexpr int kTileKeys = 64;  // of a warpgroup
constexpr int kWarpgroups = kBlockKeys / kTileKeys;
constexpr int kScoresThreads = 128 * kWarpgroups;

// The queries of a block's rows in shared memory, as the products read them.
template <int kHeads>
struct Queries {
  static constexpr int kHalfBytes = kHeads * 128;    // of a row: its heads x 64 dims
  static constexpr int kLaneWeights = kHeads / 4;    // of each lane of four
  static constexpr int kWeights = kLaneWeights + 4;  // in memory: the lanes begin in different banks
  static constexpr int kAlignment = 1024;            // of what is swizzled

  static constexpr int shared_bytes(int rows) {
    return kAlignment + rows * (2 * kHalfBytes + 4 * kWeights * static_cast<int>(sizeof(float)));
  }

  int rows;
  uint8_t* q;      // [2, rows, heads, 64], bfloat16, swizzled
  float* weights;  // [rows, 4, kWeights]

  __device__ __forceinline__ Queries(uint8_t* shared, int rows) : rows(rows) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    q = shared + (kAlignment - address % kAlignment) % kAlignment;
    weights = reinterpret_cast<float*>(q + rows * 2 * kHalfBytes);
  }

  // Of every 32 dims a lane of four has 8 of a key that follow each other (`KeyTile`), which are its dims of two
  // products: so dims change places here as they do there. Ends with a barrier.
  __device__ __forceinline__ void load(const IndexScoresParams& p, int begin, int count) {
    const int thread = static_cast<int>(threadIdx.x);
    for (int v = thread; v < count * kHeads * 16; v += kScoresThreads) {
      const int vector = v % 16, head = v / 16 % kHeads, row = v / (16 * kHeads), group = vector / 4;
      const uint16_t* const of_row = p.q + (begin + row) * p.q_stride + head * p.q_head_stride;
      const uint4 eight = *reinterpret_cast<const uint4*>(of_row + 8 * vector);
      uint8_t* const to = q + (group / 2 * rows + row) * kHalfBytes + head * 128 + vector % 4 * 4;
      const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        *reinterpret_cast<uint32_t*>(to + ((group % 2 * 4 + e) ^ head % 8) * 16) = pairs[e];
      }
    }
    for (int v = thread; v < count * kHeads; v += kScoresThreads) {
      const int head = v % kHeads, row = v / kHeads, lane = head / 2 % 4;
      weights[(4 * row + lane) * kWeights + head / 8 * 2 + head % 2] =
          p.weights[(begin + row) * p.weights_stride + head];
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
  }

  __device__ __forceinline__ uint64_t descriptor(int row) const { return matrix_descriptor(q + row * kHalfBytes); }
  __device__ __forceinline__ uint64_t to_second_half() const { return rows * kHalfBytes >> 4; }
  __device__ __forceinline__ const float* weights_of(int row) const {
    return weights + (4 * row + (threadIdx.x & 3)) * kWeights;
  }
};

// Position of a lane's first key in its warpgroup's tile.
__device__ __forceinline__ int key_in_tile() {
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
  return 16 * (warp % 4) + 2 * (lane / 4);
}

// 64 keys as a product's first operand: a lane has two that follow each other, of each a quarter of the dims.
struct KeyTile {
  uint32_t part[8][4];

  // Those from `live` on of the two are zero, and not read.
  __device__ __forceinline__ void load(const IndexScoresParams& p, const int32_t (&slots)[2], int live) {
    const int quarter = static_cast<int>(threadIdx.x) & 3;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint4* const from = reinterpret_cast<const uint4*>(p.keys + slots[k] * p.keys_stride) + quarter;
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        uint4 eight{0, 0, 0, 0};
        if (k < live) eight = __ldg(from + 4 * g);
        part[2 * g][k] = eight.x, part[2 * g][2 + k] = eight.y;
        part[2 * g + 1][k] = eight.z, part[2 * g + 1][2 + k] = eight.w;
      }
    }
  }
};

__device__ __forceinline__ void load_slots(const int32_t* table, int key, int end, int32_t (&slots)[2]) {
#pragma unroll
  for (int k = 0; k < 2; ++k) slots[k] = key + k < end ? __ldg(table + key + k) : 0;
}

template <int kHeads>
__device__ __forceinline__ void multiply(const KeyTile& tile, uint64_t q, uint64_t to_second_half,
                                         Products<kHeads>& products) {
  begin_products(products);
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    products.multiply(tile.part[s], q + (s < 4 ? 0 : to_second_half) + s % 4 * 2, s > 0);
  }
  end_products(products);
}

// The sum over a row's heads; of four lanes the first two get their first and their second key's.
template <int kHeads>
__device__ __forceinline__ float sum_heads(const Products<kHeads>& products, const float* weights) {
  float first = 0, second = 0;
#pragma unroll
  for (int v = 0; v < kHeads / 16; ++v) {
    const float4 four = reinterpret_cast<const float4*>(weights)[v];
    const float weight[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = 8 * v + e / 2 * 4 + e % 2;
      first = fmaf(fmaxf(products.sum[column], 0.f), weight[e], first);
      second = fmaf(fmaxf(products.sum[column + 2], 0.f), weight[e], second);
    }
  }
  const bool odd = threadIdx.x & 1;
  float sum = odd ? second : first;
  sum += __shfl_xor_sync(~0u, odd ? first : second, 1);
  return sum + __shfl_xor_sync(~0u, sum, 2);
}

// A block for each chunk of the keys of each block of rows; the last rows, in a prefill the longest, come first.
template <int kHeads>
__global__ void __launch_bounds__(kScoresThreads, kScoresBlocksPerSm)
    index_scores_kernel(const __grid_constant__ IndexScoresParams p, const __grid_constant__ IndexScoresGrid grid) {
  extern __shared__ uint8_t shared[];
  wait_for_inputs();
  const int lane = static_cast<int>(threadIdx.x) & 31, warpgroup = static_cast<int>(threadIdx.x) >> 7;
  const int block = static_cast<int>(gridDim.x - 1 - blockIdx.x), chunk = block % grid.chunks;
  const int begin = block / grid.chunks * grid.block_rows, count = min(grid.block_rows, p.rows - begin);
  // Of the block's lane-th row.
  const int length = lane < count ? scored_keys(p, begin + lane) : 0;
  const int table = lane < count ? static_cast<int>(table_index(p, begin + lane)) : 0;
  if (chunk * kBlockKeys >= __reduce_max_sync(~0u, length)) return;
  Queries<kHeads> queries(shared, grid.block_rows);
  queries.load(p, begin, count);

  const int first_key = chunk * kBlockKeys + warpgroup * kTileKeys + key_in_tile(), step = grid.chunks * kBlockKeys;
  const int own_key = lane % 4;                     // of the lane's two, whose score it writes
  for (int run = 0, end; run < count; run = end) {  // rows that follow each other and read one table
    const int run_table = __shfl_sync(~0u, table, run);
    end = __ffs(static_cast<int>(__ballot_sync(~0u, lane >= count || (lane > run && table != run_table)))) - 1;
    const int longest = __reduce_max_sync(~0u, lane >= run && lane < end ? length : 0);
    const int32_t* const slots_of = p.page_table + run_table * p.table_stride;
    int32_t slots[2];
    load_slots(slots_of, first_key, longest, slots);
#pragma unroll 1
    for (int key = first_key; key - key_in_tile() < longest; key += step) {
      KeyTile tile;
      tile.load(p, slots, longest - key);
      load_slots(slots_of, key + step, longest, slots);
#pragma unroll 1
      for (int row = run; row < end; ++row) {
        Products<kHeads> products;
        multiply(tile, queries.descriptor(row), queries.to_second_half(), products);
        const float score = sum_heads(products, queries.weights_of(row));
        if (own_key < 2 && key + own_key < __shfl_sync(~0u, length, row)) {
          p.scores[(begin + row) * p.scores_stride + key + own_key] = score;
        }
      }
    }
  }
}

using IndexScoresKernel = void (*)(const IndexScoresParams, const IndexScoresGrid);

inline IndexScoresKernel index_scores_kernel_of(int32_t heads) {
  return heads == 32 ? index_scores_kernel<32> : index_scores_kernel<64>;
}

inline int index_scores_shared_bytes(int32_t heads, int32_t rows) {
  return heads == 32 ? Queries<32>::shared_bytes(rows) : Queries<64>::shared_bytes(rows);
}

}  // namespace sgl_kernel
