// The indexer's scores on Hopper: score[t, s] = sum_h weights[t, h] * relu(q[t, h] . k[s]).
//
// A block keeps the queries of a few rows in shared memory. Each of its warpgroups takes 64 keys at a time out of
// global memory into the registers of a product's first operand and multiplies them with one row's heads after the
// other; while it does, it sums relu * weight of the row before. There is a block for each multiprocessor, and every
// block has an equal share of all tiles of 64 keys, which the lengths decide. What is computed of a row and a key
// depends on nothing else: not on the batch, the block or the tile that they are in.
#pragma once

#include <cstdint>

#include "attention/dependent_launch.cuh"
#include "attention/index_scores.h"
#include "attention/wgmma.cuh"

namespace sgl_kernel {

constexpr int kTileKeys = 64;  // of a warpgroup
constexpr int kWarpgroups = 3;
constexpr int kScoresThreads = 128 * kWarpgroups;

SGLK_HOST_DEVICE int tiles_of(int keys) { return (keys + kTileKeys - 1) / kTileKeys; }

// ---- a block's share

// A row block costs the time of so many tiles more, in which its queries are loaded.
constexpr int kSwitchTiles = 4;

// Tiles of a row block, with the switch: of its runs, rows that follow each other and read one table, one after the
// other. All loads are in flight together; behind the last row the last is read again.
template <int kRows>
__device__ __forceinline__ int count_tiles(const IndexScoresParams& p, const RowBlocks& blocks, int index) {
  const RowRange rows = rows_of(p, blocks, index);
  if (rows.begin >= rows.end) return 0;
  int keys[kRows], table[kRows];
  const int of_all =
      blocks.in_runs ? 0 : static_cast<int>(table_index(p, rows.begin));  // a `Run` finds it in the cache
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = min(rows.begin + r, rows.end - 1);
    keys[r] = scored_keys(p, row);
    table[r] = blocks.in_runs ? static_cast<int>(table_of_request(p, p.first_row + row)) : of_all;
  }
  int tiles = 0, longest = keys[0];
#pragma unroll
  for (int r = 1; r < kRows; ++r) {
    const bool same = table[r] == table[r - 1];
    tiles += same ? 0 : tiles_of(longest);
    longest = max(same ? longest : 0, keys[r]);
  }
  tiles += tiles_of(longest);
  return tiles > 0 ? kSwitchTiles + tiles : 0;
}

// Row block after row block, the switch to it, then its tiles.
struct Share {
  int row_block, first, tiles;  // the first row block, and where the share begins in it

  __device__ __forceinline__ void skip_switch() {
    tiles -= min(tiles, max(kSwitchTiles - first, 0));
    first = max(first - kSwitchTiles, 0);
  }
};

struct ShareShared {
  int warp_tiles[kScoresThreads / 32];
  int row_block, first;
};

// Two barriers.
template <int kRows>
__device__ __forceinline__ Share find_share(const IndexScoresParams& p, const RowBlocks& blocks, ShareShared& shared) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp = thread >> 5;
  const int own = (blocks.count + kScoresThreads - 1) / kScoresThreads;
  const int begin = min(thread * own, blocks.count), end = min(begin + own, blocks.count);
  int tiles = 0;
  for (int block = begin; block < end; ++block) tiles += count_tiles<kRows>(p, blocks, block);
  int before = tiles;  // up to this thread's, in the warp
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int left = __shfl_up_sync(~0u, before, step);
    before += lane >= step ? left : 0;
  }
  if (lane == 31) shared.warp_tiles[warp] = before;
  __syncthreads();
  before += __reduce_add_sync(~0u, lane < warp ? shared.warp_tiles[lane] : 0) - tiles;
  const uint32_t total = __reduce_add_sync(~0u, lane < kScoresThreads / 32 ? shared.warp_tiles[lane] : 0);
  const uint32_t each = total / gridDim.x, rest = total % gridDim.x;  // the first blocks take one more
  const int first = static_cast<int>(each * blockIdx.x + min(blockIdx.x, rest));
  if (before <= first && first < before + tiles) {
    int block = begin;
    for (int here; block + 1 < end; ++block, before += here) {
      here = count_tiles<kRows>(p, blocks, block);
      if (first < before + here) break;
    }
    shared.row_block = block, shared.first = first - before;
  }
  __syncthreads();
  return {shared.row_block, shared.first, static_cast<int>(each + (blockIdx.x < rest ? 1 : 0))};
}

// ---- operands

// The queries of a row block in shared memory, as the products read them.
template <int kHeads, int kRows>
struct Queries {
  static constexpr int kHalfBytes = kHeads * 128;  // of a row: its heads x 64 dims
  static constexpr int kWeights = kHeads / 4 + 4;  // of each lane of four; 4 more, so that they begin in other banks
  static constexpr int kAlignment = 1024;          // of what is swizzled
  static constexpr int kSharedBytes = kAlignment + kRows * (2 * kHalfBytes + 4 * kWeights * 4);

  uint8_t* q;      // [2, kRows, kHeads, 64], bfloat16, swizzled
  float* weights;  // [kRows, 4, kWeights]

  __device__ __forceinline__ explicit Queries(uint8_t* shared) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    q = shared + (kAlignment - address % kAlignment) % kAlignment;
    weights = reinterpret_cast<float*>(q + kRows * 2 * kHalfBytes);
  }

  // Of every 32 dims a lane of four has 8 of a key that follow each other (`LoadedKeys`), which are its dims of two
  // products: so dims change places here as they do there. A barrier before and after.
  __device__ __forceinline__ void load(const IndexScoresParams& p, const RowRange& rows) const {
    const int count = rows.end - rows.begin;
    int thread = static_cast<int>(threadIdx.x);
    asm volatile("" : "+r"(thread));  // else registers hold what follows from it while scores are computed
    __syncthreads();                  // nobody reads the queries before any more
    constexpr int kAtOnce = kScoresThreads / 16, kLoads = 8;  // heads of all threads; of a thread in flight
    const int lines = count * kHeads, vector = thread % 16, group = vector / 4;
#pragma unroll 1
    for (int first = thread / 16; first < lines; first += kLoads * kAtOnce) {
      uint4 eight[kLoads];
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        const int line = min(first + l * kAtOnce, lines - 1), row = line / kHeads, head = line % kHeads;
        const uint16_t* const from = p.q + (rows.begin + row) * p.q_stride + head * p.q_head_stride + 8 * vector;
        eight[l] = *reinterpret_cast<const uint4*>(from);
      }
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        const int line = first + l * kAtOnce, row = line / kHeads, head = line % kHeads;
        if (line >= lines) continue;
        uint8_t* const to = q + (group / 2 * kRows + row) * kHalfBytes + head * 128 + vector % 4 * 4;
        const uint32_t pairs[4] = {eight[l].x, eight[l].y, eight[l].z, eight[l].w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          *reinterpret_cast<uint32_t*>(to + ((group % 2 * 4 + e) ^ head % 8) * 16) = pairs[e];
        }
      }
    }
#pragma unroll 1
    for (int v = thread; v < count * kHeads; v += kScoresThreads) {
      const int head = v % kHeads, row = v / kHeads, lane = head / 2 % 4;
      weights[(4 * row + lane) * kWeights + head / 8 * 2 + head % 2] =
          p.weights[(rows.begin + row) * p.weights_stride + head];
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
  }
};

// Position of a lane's first key in its warpgroup's tile.
__device__ __forceinline__ int key_in_tile() {
  return 16 * (static_cast<int>(threadIdx.x) / 32 % 4) + static_cast<int>(threadIdx.x) % 32 / 4 * 2;
}

// The slots of a lane's two keys; of keys behind the last one the last one's again.
__device__ __forceinline__ void load_slots(const int32_t* table, int key, int keys, int32_t (&slots)[2]) {
#pragma unroll
  for (int k = 0; k < 2; ++k) slots[k] = __ldg(table + min(key + k, keys - 1));
}

// 64 keys on their way: a lane has two that follow each other, of each a quarter of the dims.
struct LoadedKeys {
  uint4 eight[2][4];

  __device__ __forceinline__ void load(const IndexScoresParams& p, const int32_t (&slots)[2]) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint4* const from = reinterpret_cast<const uint4*>(p.keys + slots[k] * p.keys_stride) + threadIdx.x % 4;
#pragma unroll
      for (int g = 0; g < 4; ++g) eight[k][g] = __ldg(from + 4 * g);
    }
  }
};

// The same as the first operand of eight products.
struct KeyTile {
  uint32_t part[8][4];

  __device__ __forceinline__ explicit KeyTile(const LoadedKeys& keys) {
#pragma unroll
    for (int g = 0; g < 4; ++g) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        part[2 * g][k] = keys.eight[k][g].x, part[2 * g][2 + k] = keys.eight[k][g].y;
        part[2 * g + 1][k] = keys.eight[k][g].z, part[2 * g + 1][2 + k] = keys.eight[k][g].w;
      }
    }
  }
};

// ---- scores

// Begins a row's products. `q` is lane 0's: the address of the row's first half in descriptors, the second is
// `to_second_half` further. It is handed to all lanes here, so that the compiler computes descriptors in the registers
// that a warp has one of, where the products want them.
template <int kHeads>
__device__ __forceinline__ void start_products(const KeyTile& tile, uint32_t q, uint32_t to_second_half,
                                               Products<kHeads>& products) {
  q = __shfl_sync(~0u, q, 0);
  begin_products(products);
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    const uint32_t address = q + (s < 4 ? 0 : to_second_half) + s % 4 * 2;  // 16 dims are 32 bytes
    products.multiply(tile.part[s], kSwizzledColumns | address, s > 0);
  }
  commit_products();
}

// A lane's part of the sum over a row's heads, for its two keys.
template <int kHeads>
__device__ __forceinline__ void sum_heads(const Products<kHeads>& products, const float* weights, float (&part)[2]) {
  part[0] = part[1] = 0;
#pragma unroll
  for (int v = 0; v < kHeads / 16; ++v) {
    const float4 four = reinterpret_cast<const float4*>(weights)[v];
    const float weight[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = 8 * v + e / 2 * 4 + e % 2;
      part[0] = fmaf(fmaxf(products.sum[column], 0.f), weight[e], part[0]);
      part[1] = fmaf(fmaxf(products.sum[column + 2], 0.f), weight[e], part[1]);
    }
  }
}

// Of the scores of a pair of rows and the two keys of four lanes, who have parts of each, a lane gets one: those of the
// pair's second row go to the upper two lanes, those of the second key to the odd ones.
__device__ __forceinline__ bool has_second_row() { return threadIdx.x & 2; }
__device__ __forceinline__ bool has_second_key() { return threadIdx.x & 1; }

__device__ __forceinline__ float sum_lanes(const float (&first_row)[2], const float (&second_row)[2]) {
  float both[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const float own = has_second_row() ? second_row[k] : first_row[k];
    both[k] = own + __shfl_xor_sync(~0u, has_second_row() ? first_row[k] : second_row[k], 2);
  }
  const float own = has_second_key() ? both[1] : both[0];
  return own + __shfl_xor_sync(~0u, has_second_key() ? both[0] : both[1], 1);
}

// Rows of a row block that follow each other and read one table.
struct Run {
  int begin, end;        // in the row block
  int length;            // of the lane-th row: keys that are scored; 0 where it is not of the run
  int keys;              // of the longest
  const int32_t* table;  // slots of the keys

  __device__ __forceinline__ Run(const IndexScoresParams& p, const RowRange& rows, int begin) : begin(begin) {
    const int lane = static_cast<int>(threadIdx.x) & 31, row = min(rows.begin + lane, rows.end - 1);
    const int own = static_cast<int>(table_index(p, row)), of_run = __shfl_sync(~0u, own, begin);
    const bool behind = rows.begin + lane >= rows.end || (lane > begin && own != of_run);
    end = __ffs(static_cast<int>(__ballot_sync(~0u, behind))) - 1;
    length = lane >= begin && lane < end ? scored_keys(p, row) : 0;
    keys = __reduce_max_sync(~0u, length);
    table = p.page_table + of_run * p.table_stride;
  }
};

// The keys of every kWarpgroups-th tile of a run: one is loaded ahead, of the next the slots.
struct KeyTiles {
  static constexpr int kStep = kWarpgroups * kTileKeys;

  int32_t slots[2];
  LoadedKeys loaded;

  // The tile that begins at `key`.
  __device__ __forceinline__ KeyTiles(const IndexScoresParams& p, const Run& run, int key) {
    load_slots(run.table, key + key_in_tile(), run.keys, slots);
    advance(p, run, key - kStep);
  }

  // The tile behind the one that begins at `key`.
  __device__ __forceinline__ void advance(const IndexScoresParams& p, const Run& run, int key) {
    loaded.load(p, slots);
    load_slots(run.table, key + 2 * kStep + key_in_tile(), run.keys, slots);
  }
};

// The scores of a warpgroup's tiles, from the one at `key` up to `last`.
template <int kHeads, int kRows>
__device__ __forceinline__ void score_run(const IndexScoresParams& p, const Queries<kHeads, kRows>& queries,
                                          const Run& run, int first_row, KeyTiles& tiles, int key, int last) {
  constexpr int kHalf = Queries<kHeads, kRows>::kHalfBytes >> 4, kPairs = (kRows + 1) / 2;
  const float* const weights = queries.weights + threadIdx.x % 4 * queries.kWeights;
  const uint32_t address = threadIdx.x % 32 == 0 ? descriptor_address(queries.q) : 0;
  const int own_key = key_in_tile() + has_second_key();  // whose scores the lane writes
  int limit[kPairs];                                     // of each row that the lane writes, for the tile's first key
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    limit[pair] = __shfl_sync(~0u, run.length, 2 * pair + has_second_row()) - own_key;
  }
#pragma unroll 1
  for (; key < last; key += KeyTiles::kStep) {
    const KeyTile tile(tiles.loaded);
    Products<kHeads> products[2];
    float part[2][2];
    start_products(tile, address, kRows * kHalf, products[0]);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row + 1 < kRows) start_products(tile, address + (row + 1) * kHalf, kRows * kHalf, products[(row + 1) % 2]);
      if (row + 1 < kRows) {
        wait_products<1>(products[row % 2]);
      } else {
        wait_products<0>(products[row % 2]);
        tiles.advance(p, run, key);
      }
      sum_heads(products[row % 2], weights + row * 4 * queries.kWeights, part[row % 2]);
      if (row % 2 == 0 && row + 1 < kRows) continue;
      const float score = sum_lanes(part[0], part[row % 2]);
      if (key < limit[row / 2]) {
        p.scores[(first_row + row / 2 * 2 + has_second_row()) * p.scores_stride + key + own_key] = score;
      }
    }
  }
}

// What a block's share has of one row block.
template <int kHeads, int kRows>
__device__ __forceinline__ void score_rows(const IndexScoresParams& p, const Queries<kHeads, kRows>& queries,
                                           const RowRange& rows, Share& share) {
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  bool switched = false, loaded = false;
#pragma unroll 1
  for (int begin = 0; begin < rows.end - rows.begin;) {
    const Run run(p, rows, begin);
    begin = run.end;
    if (run.keys == 0) continue;
    if (!switched) share.skip_switch();
    switched = true;
    const int all = tiles_of(run.keys), first = min(share.first, all), taken = min(share.tiles, all - first);
    share.first -= first, share.tiles -= taken;
    if (taken == 0) continue;
    const int key = (first + warpgroup) * kTileKeys, last = min((first + taken) * kTileKeys, run.keys);
    KeyTiles tiles(p, run, key);
    if (!loaded) queries.load(p, rows);
    loaded = true;
    score_run(p, queries, run, rows.begin, tiles, key, last);
  }
}

template <int kHeads, int kRows>
__global__ void __launch_bounds__(kScoresThreads, 1)
    index_scores_kernel(const __grid_constant__ IndexScoresParams p, const __grid_constant__ RowBlocks blocks) {
  extern __shared__ uint8_t shared[];
  __shared__ ShareShared share_shared;
  wait_for_inputs();
  Share share = find_share<kRows>(p, blocks, share_shared);
  const Queries<kHeads, kRows> queries(shared);
#pragma unroll 1
  for (; share.tiles > 0 && share.row_block < blocks.count; ++share.row_block) {
    score_rows(p, queries, rows_of(p, blocks, share.row_block), share);
  }
}

// ---- the kernels

struct IndexScoresKernel {
  void (*function)(const IndexScoresParams, const RowBlocks);
  int shared_bytes;
};

template <int kHeads, size_t kIndex = 0>
IndexScoresKernel index_scores_kernel_of(int32_t rows) {
  constexpr int kRows = kBlockRows[kIndex];
  if constexpr (kRows < kMaxBlockRows) {
    if (rows > kRows) return index_scores_kernel_of<kHeads, kIndex + 1>(rows);
  }
  return {index_scores_kernel<kHeads, kRows>, Queries<kHeads, kRows>::kSharedBytes};
}

// The kernel for row blocks of so many rows.
inline IndexScoresKernel index_scores_kernel_of(int32_t heads, int32_t rows) {
  return heads == 32 ? index_scores_kernel_of<32>(rows) : index_scores_kernel_of<64>(rows);
}

}  // namespace sgl_kernel
