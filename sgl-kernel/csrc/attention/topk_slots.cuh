// The kernel of the top-k: the slots of each row's highest scores, by position.
//
// A block holds a piece of a row in its registers, so that scores are read once. It finds the last key that is selected
// digit by digit (a radix select: a histogram of the keys that share the digits found so far), then writes what is
// selected in order. A row of several pieces takes another launch: each piece leaves its own best, in order, as
// candidates, which are the row of the next launch.
#pragma once

#include <cstdint>

#include "attention/dependent_launch.cuh"
#include "attention/topk_slots.h"

namespace sgl_kernel {

constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;

// The sum over the lanes up to this one.
__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t mine) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t left = __shfl_up_sync(~0u, mine, step);
    mine += lane >= step ? left : 0;
  }
  return mine;
}

// The sum over the warps before this one. One barrier.
template <int kWarps>
__device__ __forceinline__ uint32_t sum_of_warps_before(uint32_t warp_total, uint32_t (&totals)[kWarps]) {
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
  if (lane == 0) totals[warp] = warp_total;
  __syncthreads();
  return __reduce_add_sync(~0u, lane < warp ? totals[lane] : 0u);
}

// The keys of a piece: of each warp a run of vectors of 4 for each lane, as few as the piece's length needs.
template <int kThreads, int kVectors>
struct Keys {
  uint32_t key[kVectors][4];
  int32_t vectors;           // of a thread
  uint32_t lowest, highest;  // of the thread's keys

  // Whether the thread has a v-th vector; the same for all threads.
  __device__ __forceinline__ bool has(int v) const { return v < vectors; }

  // Position of the thread's first key.
  __device__ __forceinline__ int32_t begin() const {
    const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
    return 128 * vectors * warp + 4 * lane;
  }

  __device__ __forceinline__ void load(const uint32_t* scores, int32_t length) {
    vectors = (length + 4 * kThreads - 1) / (4 * kThreads);
    lowest = ~0u, highest = 0;
    const uint32_t* const from = scores + begin();
    const int32_t left = length - begin();  // keys from there on
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      uint4 four{~0u, ~0u, ~0u, ~0u};  // the last key, which stands behind all others
      if (has(v) && left >= 128 * v + 4) four = *reinterpret_cast<const uint4*>(from + 128 * v);
      key[v][0] = four.x, key[v][1] = four.y, key[v][2] = four.z, key[v][3] = four.w;
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!has(v)) continue;
      if (left > 128 * v && left < 128 * v + 4) {  // memory behind the last key is not read
#pragma unroll
        for (int e = 0; e < 3; ++e) {
          if (left > 128 * v + e) key[v][e] = from[128 * v + e];
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        key[v][e] = descending_key(key[v][e]);
        lowest = min(lowest, key[v][e]);
        if (left > 128 * v + e) highest = max(highest, key[v][e]);
      }
    }
  }
};

// Which keys are selected: those below `key`, and the first `equals` that equal it.
struct Threshold {
  uint32_t key;
  uint32_t equals;
};

// A histogram's counters. Their address stays in a register: the compiler, if it knew it, would ask for it at every
// key.
struct Counters {
#if defined(__CUDA_ARCH__)
  uint32_t address;
  __device__ __forceinline__ explicit Counters(uint32_t* bins)
      : address(__shfl_sync(~0u, static_cast<uint32_t>(__cvta_generic_to_shared(bins)), 0)) {}

  // A warp's lanes that meet in a bin are added up by the hardware.
  __device__ __forceinline__ void add(uint32_t bin) const {
    asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(address + 4 * bin) : "memory");
  }
#else
  uint32_t* bins;
  explicit Counters(uint32_t* all) : bins(all) {}
  void add(uint32_t bin) const { ++bins[bin]; }
#endif
};

// Writes the first ranks, of which rank r is at position(r). Loads of several ranks are in flight.
template <int kThreads, typename Position>
__device__ __forceinline__ void write_ranks(const TopkPiece& piece, int32_t ranks, Position position) {
  constexpr int kLoads = 4;
  for (int32_t first = static_cast<int32_t>(threadIdx.x); first < ranks; first += kLoads * kThreads) {
    int32_t slot[kLoads];
    uint32_t score[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int32_t rank = first + u * kThreads;
      if (rank >= ranks) continue;
      slot[u] = piece.table[position(rank)];
      if (piece.best_scores != nullptr) score[u] = piece.scores[position(rank)];
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int32_t rank = first + u * kThreads;
      if (rank >= ranks) continue;
      piece.slots[rank] = slot[u];
      if (piece.best_scores != nullptr) piece.best_scores[rank] = score[u];
    }
  }
}

template <int kThreads>
struct TopkShared {
  union {
    alignas(16) uint32_t bins[kBins];
    uint16_t picked[kMaxTopk];  // positions in the piece
  };
  uint32_t warp_totals[2][kThreads / 32];
  uint32_t digit, before, count;  // of the bin in which the last selected key lies
  TopkPiece piece;                // kept here until it is needed
};

// The bin that holds the need-th key, into `shared`; empties the bins. Three barriers.
template <int kThreads>
__device__ __forceinline__ void find_bin(TopkShared<kThreads>& shared, uint32_t need) {
  constexpr int kOwn = kBins / kThreads;
  const int first = static_cast<int>(threadIdx.x) * kOwn;
  __syncthreads();
  uint32_t sum = 0;
#pragma unroll
  for (int b = 0; b < kOwn; ++b) sum += shared.bins[first + b];
  const uint32_t end = warp_inclusive_sum(sum), total = __shfl_sync(~0u, end, 31);
  uint32_t before = sum_of_warps_before(total, shared.warp_totals[0]) + end - sum;
#pragma unroll
  for (int b = 0; b < kOwn; ++b) {
    const uint32_t count = shared.bins[first + b];
    shared.bins[first + b] = 0;
    if (before < need && need <= before + count) {
      shared.digit = static_cast<uint32_t>(first + b), shared.before = before, shared.count = count;
    }
    before += count;
  }
  __syncthreads();
}

// The lowest and the highest key of all threads, given those of each; ends with a barrier that `bins` may rely on.
template <int kThreads>
__device__ __forceinline__ void block_range(TopkShared<kThreads>& shared, uint32_t& lowest, uint32_t& highest) {
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
  lowest = __reduce_min_sync(~0u, lowest), highest = __reduce_max_sync(~0u, highest);
  if (lane == 0) shared.warp_totals[0][warp] = lowest, shared.warp_totals[1][warp] = highest;
  __syncthreads();
  const int source = lane % (kThreads / 32);
  lowest = __reduce_min_sync(~0u, shared.warp_totals[0][source]);
  highest = __reduce_max_sync(~0u, shared.warp_totals[1][source]);
}

// Counts a digit of each key in base .. base + limit - 1.
template <int kThreads, int kVectors>
__device__ __forceinline__ void count_digits(const Keys<kThreads, kVectors>& keys, const Counters& counters,
                                             uint32_t base, uint32_t limit, int shift) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (!keys.has(v)) continue;
    uint32_t rest[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) rest[e] = keys.key[v][e] - base;
    if (min(min(rest[0], rest[1]), min(rest[2], rest[3])) >= limit) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (rest[e] < limit) counters.add(rest[e] >> shift);
    }
  }
}

// The topk lowest keys of a piece that has more, from the highest digit on; ends early where a bin is taken whole. The
// first digit is taken of the distance from the lowest key, and is the highest that the keys' range has: so the keys,
// which often have one exponent, are spread over the bins, and only few of them have a second digit to be counted.
template <int kThreads, int kVectors>
__device__ __forceinline__ Threshold find_threshold(const Keys<kThreads, kVectors>& keys, TopkShared<kThreads>& shared,
                                                    uint32_t topk) {
  uint32_t base = keys.lowest, highest = keys.highest, need = topk;
  block_range(shared, base, highest);  // from here on the bins are empty, too
  const Counters counters(shared.bins);
  int shift = 32 - kDigitBits - __clz(static_cast<int>((highest - base) | 1));
  shift = shift > 0 ? shift : 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (!keys.has(v)) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {  // what lies beyond the range is no key of the piece, and may stand in the last bin
      counters.add(min((keys.key[v][e] - base) >> shift, static_cast<uint32_t>(kBins - 1)));
    }
  }
#pragma unroll 1
  for (;;) {
    find_bin(shared, need);
    base += shared.digit << shift;
    need -= shared.before;
    if (need == shared.count) return {base + (1u << shift), 0};
    if (shift == 0) return {base, need};
    const uint32_t limit = 1u << shift;
    shift = shift > kDigitBits ? shift - kDigitBits : 0;
    count_digits(keys, counters, base, limit, shift);
  }
}

// Of several keys that equal the threshold only the first are selected: changes them so that all that are selected, and
// no others, are below the key that is returned. One barrier.
template <int kThreads, int kVectors>
__device__ __forceinline__ uint32_t separate_equals(Keys<kThreads, kVectors>& keys, TopkShared<kThreads>& shared,
                                                    const Threshold& last) {
  const uint32_t lowest = last.key == 0;  // below which there is none
  uint32_t mine = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int e = 0; e < 4; ++e) mine += keys.has(v) && keys.key[v][e] == last.key;
  }
  uint32_t before = sum_of_warps_before(__reduce_add_sync(~0u, mine), shared.warp_totals[1]);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (!keys.has(v)) continue;
    uint32_t own = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) own += keys.key[v][e] == last.key;
    const uint32_t end = warp_inclusive_sum(own);
    uint32_t rank = before + end - own;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (keys.key[v][e] != last.key) continue;
      keys.key[v][e] = rank++ < last.equals ? last.key - 1 + lowest : last.key + lowest;
    }
    before += __shfl_sync(~0u, end, 31);
  }
  return last.key + lowest;
}

// Writes the slots of the keys below `bound`, of which there are topk, in order: positions are gathered in shared
// memory first. Two barriers.
template <int kThreads, int kVectors>
__device__ __forceinline__ void write_selected(const Keys<kThreads, kVectors>& keys, TopkShared<kThreads>& shared,
                                               uint32_t bound, int32_t topk) {
  // Per vector a thread selects up to 4 keys, a warp up to 128: the counts of four vectors fit an integer.
  constexpr int kGroups = (kVectors + 3) / 4;
  uint32_t own[kGroups] = {}, end[kGroups], total[kGroups], sum = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (!keys.has(v)) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) own[v / 4] += keys.key[v][e] < bound ? 1u << v % 4 * 8 : 0u;
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    end[g] = warp_inclusive_sum(own[g]);
    total[g] = __shfl_sync(~0u, end[g], 31);
    const uint32_t pairs = (total[g] & 0x00FF00FF) + (total[g] >> 8 & 0x00FF00FF);
    sum += (pairs & 0xFFFF) + (pairs >> 16);
  }
  uint32_t before = sum_of_warps_before(sum, shared.warp_totals[0]);
  uint32_t position = static_cast<uint32_t>(keys.begin());
#pragma unroll
  for (int v = 0; v < kVectors; ++v, position += 128) {
    if (!keys.has(v)) continue;
    uint32_t rank = before + ((end[v / 4] - own[v / 4]) >> v % 4 * 8 & 0xFF);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (keys.key[v][e] < bound) shared.picked[rank++] = static_cast<uint16_t>(position + e);
    }
    before += total[v / 4] >> v % 4 * 8 & 0xFF;
  }
  __syncthreads();
  write_ranks<kThreads>(shared.piece, topk, [&](int32_t rank) { return shared.picked[rank]; });
}

// A block for each piece of each row.
template <int kThreads, int kVectors>
__global__ void __launch_bounds__(kThreads)
    topk_slots_kernel(const __grid_constant__ TopkSlotsParams p, const __grid_constant__ TopkLevel level) {
  __shared__ TopkShared<kThreads> shared;
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  for (int b = thread; b < kBins; b += kThreads) shared.bins[b] = 0;
  wait_for_inputs();
  TopkPiece piece;
  if (!find_piece(p, level, static_cast<int32_t>(blockIdx.x), piece)) return;
  if (piece.count <= p.topk) {
    write_ranks<kThreads>(piece, piece.count, [](int32_t rank) { return rank; });
    const int32_t end = piece.best_scores == nullptr ? p.topk : piece.count;
    for (int32_t k = piece.count + thread; k < end; k += kThreads) piece.slots[k] = p.padding_slot;
    return;
  }
  if (thread == 0) shared.piece = piece;
  Keys<kThreads, kVectors> keys;
  keys.load(piece.scores, piece.count);
  const Threshold last = find_threshold(keys, shared, static_cast<uint32_t>(p.topk));
  const uint32_t bound = last.equals > 0 ? separate_equals(keys, shared, last) : last.key;
  write_selected(keys, shared, bound, p.topk);
}

using TopkSlotsKernel = void (*)(const TopkSlotsParams, const TopkLevel);

inline TopkSlotsKernel topk_slots_kernel_of(const TopkBlock& block) {
  if (block.threads == 1024) return topk_slots_kernel<1024, 8>;
  return block.keys_per_thread == 32 ? topk_slots_kernel<512, 8> : topk_slots_kernel<512, 4>;
}

}  // namespace sgl_kernel
