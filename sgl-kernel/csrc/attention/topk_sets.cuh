// What the top-k's kernel is made of: sums over a block, a thread's scores, sets of them and their places in a row.
#pragma once

#include <cstdint>

namespace sgl_kernel {

constexpr float kWorst = -3.402823466e38f;  // what stands behind a row's last score: lowest of the finite

__device__ __forceinline__ int32_t lane_id() { return static_cast<int32_t>(threadIdx.x) & 31; }
__device__ __forceinline__ int32_t warp_id() { return static_cast<int32_t>(threadIdx.x) >> 5; }

// The sum over the lanes up to this one.
__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t mine) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t left = __shfl_up_sync(~0u, mine, step);
    mine += lane_id() >= step ? left : 0;
  }
  return mine;
}

// The sums over the warps before this one and over all. One barrier.
struct WarpSums {
  uint32_t before, all;
};
template <int kWarps>
__device__ __forceinline__ WarpSums sum_warps(uint32_t warp_total, uint32_t (&totals)[kWarps]) {
  if (lane_id() == 0) totals[warp_id()] = warp_total;
  __syncthreads();
  const uint32_t total = lane_id() < kWarps ? totals[lane_id()] : 0;
  return {__reduce_add_sync(~0u, lane_id() < warp_id() ? total : 0), __reduce_add_sync(~0u, total)};
}

// A set of a thread's scores: bit 4 * v + e for the e-th of vector v.
using Set = uint32_t;

__device__ __forceinline__ uint32_t size_of(Set set) { return static_cast<uint32_t>(__popc(set)); }

// The scores of a piece: of each warp a run of vectors of 4 for each lane.
template <int kThreads, int kVectors>
struct Scores {
  static_assert(4 * kVectors <= 32);

  float score[kVectors][4];
  int32_t first, vectors;  // of the warp: its first position, and as many vectors as have scores

  // Position of the thread's first score.
  __device__ __forceinline__ int32_t begin() const { return first + 4 * lane_id(); }

  __device__ __forceinline__ void load(const uint32_t* bits, int32_t count) {
    const int32_t most = (count + 4 * kThreads - 1) / (4 * kThreads);
    first = 128 * most * warp_id();
    vectors = max(0, min(most, (count - first + 127) / 128));
    const float* const from = reinterpret_cast<const float*>(bits) + begin();
    const bool whole = count - first >= 128 * most;  // else memory behind the last score is not read
    if (whole) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v >= vectors) break;
        const float4 four = __ldcs(reinterpret_cast<const float4*>(from + 128 * v));
        score[v][0] = four.x, score[v][1] = four.y, score[v][2] = four.z, score[v][3] = four.w;
      }
    } else {
      each([&](float& one, int bit) { one = position(bit) < count ? from[position(bit) - begin()] : kWorst; });
    }
  }

  // Calls use(score, bit) for each.
  template <typename Use>
  __device__ __forceinline__ void each(Use use) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (v >= vectors) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) use(score[v][e], 4 * v + e);
    }
  }

  // The set of those that pass.
  template <typename Test>
  __device__ __forceinline__ Set where(Test test) {
    Set set = 0;
    each([&](float one, int bit) { set |= test(one) ? Set{1} << bit : 0; });
    return set;
  }

  __device__ __forceinline__ int32_t position(int bit) const { return begin() + 128 * (bit / 4) + bit % 4; }
};

// Where the members of a set stand among those of all threads, in order of position.
template <int kVectors>
struct Places {
  static constexpr int kGroups = (kVectors + 3) / 4;
  uint32_t lanes_before[kGroups], warp[kGroups];  // members of four vectors, a byte for each
  uint32_t warp_total = 0;

  __device__ __forceinline__ explicit Places(Set set) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      uint32_t own = set >> 16 * g & 0xFFFF;
      own = (own | own << 8) & 0x00FF00FF;  // four bits of each byte
      own = (own | own << 4) & 0x0F0F0F0F;
      own -= own >> 1 & 0x05050505;
      own = (own & 0x03030303) + (own >> 2 & 0x03030303);
      const uint32_t end = warp_inclusive_sum(own);
      lanes_before[g] = end - own;
      warp[g] = __shfl_sync(~0u, end, 31);
      const uint32_t pairs = (warp[g] & 0x00FF00FF) + (warp[g] >> 8 & 0x00FF00FF);
      warp_total += (pairs & 0xFFFF) + (pairs >> 16);
    }
  }

  // Calls use(bit, rank) for each member, given the rank of the warp's first.
  template <typename Use>
  __device__ __forceinline__ void each(Set set, int32_t vectors, uint32_t begin, Use use) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (v >= vectors) break;
      uint32_t rank = begin + (lanes_before[v / 4] >> v % 4 * 8 & 0xFF);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (set >> (4 * v + e) & 1) use(4 * v + e, rank++);
      }
      begin += warp[v / 4] >> v % 4 * 8 & 0xFF;
    }
  }
};

}  // namespace sgl_kernel
