// The kernel of the top-k: the slots of each row's highest scores, by position.
//
// A block holds a piece of a row in its registers, so that scores are read once. Where the last selected score lies is
// found by a histogram over a range that a sample suggests; of its bin, which has few scores, each is ranked. Where it
// has many, they are one value or the search goes on among them. What is selected is then a set in each thread, whose
// slots are written in order. A row of several pieces takes another launch: each piece leaves its own best, in order,
// as candidates, which are the row of the next launch.
//
// What bounds it are instructions, so a score takes as few as can be: it is binned by two multiplications, as it is,
// and only those of one bin become integers in the order of all scores (`descending_key`).
#pragma once

#include <cstdint>

#include "attention/dependent_launch.cuh"
#include "attention/topk_sets.cuh"
#include "attention/topk_slots.h"

namespace sgl_kernel {

constexpr uint32_t kBinZero = 0x4B000000;  // 2^23 as float32, whose last bits count
constexpr uint32_t kListed = 32;           // scores of a bin that are ranked one by one: a lane for each

// Bins of equal width in a range of scores, the first for the best. Those of better and of worse scores are in the
// first and the last; a NaN is in the first.
struct Range {
  float scale = 0, offset = 0;  // of all in the first bin

  __device__ __forceinline__ Range() = default;
  __device__ __forceinline__ Range(float best, float worst) {
    const float range = fmaxf(best - worst, fmaxf(1e-3f * fabsf(best), 1e-30f));  // for which float32 has digits
    if (!(range < 1e30f)) return;
    scale = -__frcp_rn(1.5f * range);  // a quarter wider on each side
    offset = __fmaf_rn(best, -scale, 1.f / 6);
  }

  // 2^23 + the bin, which is then in the low bits.
  __device__ __forceinline__ float at(float score, int bins) const {
    return __fmaf_rn(__saturatef(__fmaf_rn(score, scale, offset)), static_cast<float>(bins - 1),
                     __uint_as_float(kBinZero));
  }
};

template <int kThreads, int kBins>
struct TopkShared {
  union {
    alignas(16) uint32_t bins[kBins];
    uint16_t picked[kMaxTopk];  // positions in the piece
  };
  alignas(16) uint64_t list[kListed];
  uint32_t lowest[kThreads / 32], highest[kThreads / 32];  // by warp, like the next
  uint32_t binned[kThreads / 32], better[kThreads / 32], equals[kThreads / 32], selected[kThreads / 32];
  uint32_t listed;
  uint32_t unordered;           // not 0: there are infinities or NaNs
  float worst;                  // of the sample
  uint32_t bin, before, count;  // in which the last selected score lies; scores before it, in it
  TopkPiece piece;              // kept here until they are needed
  const int32_t* table;
};

// A histogram's counters. Their address stays in a register: the compiler, if it knew it, would ask for it at every
// score.
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

template <int kThreads, int kBins>
__device__ __forceinline__ void empty_bins(TopkShared<kThreads, kBins>& shared) {
#pragma unroll
  for (int first = 0; first < kBins; first += 4 * kThreads) {
    const int b = first + 4 * static_cast<int>(threadIdx.x);
    if (b < kBins) *reinterpret_cast<uint4*>(shared.bins + b) = uint4{0, 0, 0, 0};
  }
}

// The bin that holds the need-th score, into `shared`. Three barriers.
template <int kThreads, int kBins>
__device__ __forceinline__ void find_bin(TopkShared<kThreads, kBins>& shared, uint32_t need) {
  constexpr int kOwn = kBins / kThreads;
  const int first = static_cast<int>(threadIdx.x) * kOwn;
  __syncthreads();
  uint32_t own[kOwn], sum = 0;
#pragma unroll
  for (int b = 0; b < kOwn; ++b) own[b] = shared.bins[first + b], sum += own[b];
  const uint32_t end = warp_inclusive_sum(sum), total = __shfl_sync(~0u, end, 31);
  uint32_t before = sum_warps(total, shared.binned).before + end - sum;
  if (before < need && need <= before + sum) {
#pragma unroll
    for (int b = 0; b < kOwn; ++b) {
      if (before < need && need <= before + own[b]) {
        shared.bin = static_cast<uint32_t>(first + b), shared.before = before, shared.count = own[b];
      }
      before += own[b];
    }
  }
  __syncthreads();
}

// The topk best if the last of them is in a bin of few scores: those are listed with their places, and ranked by each
// warp. One barrier.
template <int kThreads, int kVectors, int kBins>
__device__ __forceinline__ Set rank_bin(Scores<kThreads, kVectors>& scores, TopkShared<kThreads, kBins>& shared,
                                        const Range& range, float bin, uint32_t topk) {
  Set set = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (v >= scores.vectors) break;
    bool in[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float its = range.at(scores.score[v][e], kBins);
      in[e] = its == bin;
      set |= its <= bin ? Set{1} << (4 * v + e) : 0;
    }
    if (!(in[0] | in[1] | in[2] | in[3])) continue;
    uint32_t next = atomicAdd(&shared.listed, in[0] + in[1] + in[2] + in[3]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!in[e]) continue;
      const uint32_t place = static_cast<uint32_t>(scores.position(4 * v + e));
      shared.list[next++] = static_cast<uint64_t>(descending_key(__float_as_uint(scores.score[v][e]))) << 32 | place;
    }
  }
  __syncthreads();
  const uint32_t listed = shared.listed;
  const uint64_t mine = lane_id() < static_cast<int32_t>(listed) ? shared.list[lane_id()] : 0;
  uint32_t rank = 0;
#pragma unroll 4
  for (uint32_t i = 0; i < listed; ++i) rank += shared.list[i] < mine;
  const uint32_t offset = static_cast<uint32_t>(mine) - static_cast<uint32_t>(scores.first);  // in the warp's run
  const bool dropped = shared.before + rank >= topk && offset < 128u * static_cast<uint32_t>(scores.vectors);
  for (uint32_t left = __ballot_sync(~0u, dropped); left != 0; left &= left - 1) {
    const uint32_t one = __shfl_sync(~0u, offset, __ffs(static_cast<int>(left)) - 1);
    if (static_cast<int32_t>(one / 4 % 32) == lane_id()) set &= ~(Set{1} << (one / 128 * 4 + one % 4));
  }
  return set;
}

// The need-th of the integer keys in first .. last that stand in the scores' place, by digits of the distance from the
// lowest that is left. How many of its equals are selected, or 0: all.
struct LastKey {
  uint32_t key, equals;
};
template <int kThreads, int kVectors, int kBins>
__device__ __forceinline__ LastKey find_key(Scores<kThreads, kVectors>& keys, TopkShared<kThreads, kBins>& shared,
                                            uint32_t need, uint32_t first, uint32_t last) {
  const Counters counters(shared.bins);
#pragma unroll 1
  for (;;) {
    uint32_t lowest = ~0u, highest = 0;
    keys.each([&](float bits, int) {
      const uint32_t key = __float_as_uint(bits);
      if (key - first <= last - first) lowest = min(lowest, key), highest = max(highest, key);
    });
    lowest = __reduce_min_sync(~0u, lowest), highest = __reduce_max_sync(~0u, highest);
    __syncthreads();
    if (lane_id() == 0) shared.lowest[warp_id()] = lowest, shared.highest[warp_id()] = highest;
    empty_bins(shared);
    __syncthreads();
    first = __reduce_min_sync(~0u, shared.lowest[lane_id() % (kThreads / 32)]);
    last = __reduce_max_sync(~0u, shared.highest[lane_id() % (kThreads / 32)]);
    if (first == last) return {last, need};
    const int shift = max(0, __clz(kBins) + 1 - __clz(static_cast<int>(last - first)));
    keys.each([&](float bits, int) {
      const uint32_t rest = __float_as_uint(bits) - first;
      if (rest <= last - first) counters.add(rest >> shift);
    });
    find_bin(shared, need);
    need -= shared.before;
    first += shared.bin << shift;
    last = min(last, first + ((1u << shift) - 1));
    if (need == shared.count) return {last, 0};
  }
}

// What is selected: all of `better`, and of `equal`, of which `before` are in the warps before, the first `quota`.
template <int kVectors>
struct Split {
  Set better, equal = 0;
  uint32_t before = 0, quota = 0;

  __device__ __forceinline__ Set selected(int32_t vectors) const {
    if (before >= quota) return better;
    if (before + __reduce_add_sync(~0u, size_of(equal)) <= quota) return better | equal;
    Set set = better;
    Places<kVectors>(equal).each(equal, vectors, before,
                                 [&](int bit, uint32_t rank) { set |= rank < quota ? Set{1} << bit : 0; });
    return set;
  }
};

// Where the last selected score is the worst of the sample, else false: often many are that, a ReLU's zero.
template <int kThreads, int kVectors, int kBins>
__device__ __forceinline__ bool split_at_worst(Scores<kThreads, kVectors>& scores, TopkShared<kThreads, kBins>& shared,
                                               uint32_t topk, Split<kVectors>& split) {
  const float worst = shared.worst;
  split.better = scores.where([&](float score) { return score > worst; });
  split.equal = scores.where([&](float score) { return score == worst; });
  const uint32_t better = sum_warps(__reduce_add_sync(~0u, size_of(split.better)), shared.better).all;
  const WarpSums equals = sum_warps(__reduce_add_sync(~0u, size_of(split.equal)), shared.equals);
  split.before = equals.before, split.quota = topk - better;
  return better < topk && topk <= better + equals.all;
}

// By integer keys: of the scores that are in the bin, or of all where `whole`.
template <int kThreads, int kVectors, int kBins>
__device__ __forceinline__ Split<kVectors> split_keys(Scores<kThreads, kVectors>& scores,
                                                      TopkShared<kThreads, kBins>& shared, const Range& range,
                                                      float bin, uint32_t topk, bool whole) {
  const int32_t count = shared.piece.count;
  scores.each([&](float& score, int bit) {
    const float its = range.at(score, kBins);
    uint32_t key = whole || its == bin ? descending_key(__float_as_uint(score)) : its < bin ? 0 : ~0u;
    score = __uint_as_float(scores.position(bit) < count ? key : ~0u);
  });
  const LastKey last = find_key(scores, shared, whole ? topk : topk - shared.before, whole ? 0 : 1, ~0u - 1);
  Split<kVectors> split{scores.where([&](float key) { return __float_as_uint(key) <= last.key; })};
  if (last.equals == 0) return split;
  split.equal = scores.where([&](float key) { return __float_as_uint(key) == last.key; });
  split.better &= ~split.equal;
  split.before = sum_warps(__reduce_add_sync(~0u, size_of(split.equal)), shared.equals).before;
  split.quota = last.equals;
  return split;
}

// The set of the topk best of a piece that has more.
template <int kThreads, int kVectors, int kBins>
__device__ __forceinline__ Set select_best(Scores<kThreads, kVectors>& scores, TopkShared<kThreads, kBins>& shared,
                                           uint32_t sample, uint32_t topk) {
  const uint32_t key = descending_key(sample);
  const float best = __uint_as_float(bits_of_key(__reduce_min_sync(~0u, key)));
  const float worst = __uint_as_float(bits_of_key(__reduce_max_sync(~0u, key)));
  if (threadIdx.x == 0) shared.worst = worst;
  const Range range(best, worst);
  const Counters counters(shared.bins);
  float unordered = 0;  // NaN once there is an infinity or a NaN
  scores.each([&](float score, int) {
    unordered = __fmaf_rn(score, 0.f, unordered);
    counters.add(__float_as_uint(range.at(score, kBins)) - kBinZero);
  });
  if (unordered != 0) atomicOr(&shared.unordered, 1);
  find_bin(shared, topk);
  const bool whole = shared.unordered != 0;  // bins are in another order then
  const float bin = __uint_as_float(kBinZero + shared.bin);
  const bool last = shared.bin == kBins - 1;  // there stands what is behind the row's last score, too
  if (!whole && !last && shared.count <= kListed) return rank_bin(scores, shared, range, bin, topk);
  Split<kVectors> split;
  const bool at_worst = !whole && !last && range.at(shared.worst, kBins) == bin;
  if (!at_worst || !split_at_worst(scores, shared, topk, split)) {
    split = split_keys(scores, shared, range, bin, topk, whole);
  }
  return split.selected(scores.vectors);
}

// to[rank] = from[picked[rank]] for the ranks of a warp. Loads of several ranks are in flight.
template <typename T>
__device__ __forceinline__ void gather(T* to, const T* from, const uint16_t* picked, uint32_t begin, uint32_t end) {
  constexpr int kLoads = 4;
  uint32_t rank = begin + static_cast<uint32_t>(lane_id());
#pragma unroll 1
  for (; rank + 32 * (kLoads - 1) < end; rank += 32 * kLoads) {
    T loaded[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) loaded[u] = from[picked[rank + 32 * u]];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) to[rank + 32 * u] = loaded[u];
  }
#pragma unroll 1
  for (; rank < end; rank += 32) to[rank] = from[picked[rank]];
}

// Writes the slots of the set in order. One barrier; each warp gathers its positions in shared memory first.
template <int kThreads, int kVectors, int kBins>
__device__ __forceinline__ void write_selected(const Scores<kThreads, kVectors>& scores,
                                               TopkShared<kThreads, kBins>& shared, Set set) {
  const Places<kVectors> places(set);
  const uint32_t begin = sum_warps(places.warp_total, shared.selected).before, end = begin + places.warp_total;
  places.each(set, scores.vectors, begin,
              [&](int bit, uint32_t rank) { shared.picked[rank] = static_cast<uint16_t>(scores.position(bit)); });
  __syncwarp();
  const TopkPiece& piece = shared.piece;
  gather(piece.slots, shared.table, shared.picked, begin, end);
  if (piece.best_scores != nullptr) gather(piece.best_scores, piece.scores, shared.picked, begin, end);
}

// A piece that is selected whole: its slots, then padding.
template <int kThreads>
__device__ __forceinline__ void copy_piece(const TopkPiece& piece, const int32_t* table, int32_t topk,
                                           int32_t padding_slot) {
  const int32_t end = piece.best_scores == nullptr ? topk : piece.count;
#pragma unroll 4
  for (int32_t k = static_cast<int32_t>(threadIdx.x); k < end; k += kThreads) {
    piece.slots[k] = k < piece.count ? __ldg(table + k) : padding_slot;
    if (piece.best_scores != nullptr) piece.best_scores[k] = __ldg(piece.scores + k);
  }
}

// A block for each piece of each row.
template <int kThreads, int kVectors, int kBins, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    topk_slots_kernel(const __grid_constant__ TopkSlotsParams p, const __grid_constant__ TopkLevel level) {
  __shared__ TopkShared<kThreads, kBins> shared;
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  empty_bins(shared);
  if (thread == 0) shared.listed = 0, shared.unordered = 0;
  wait_for_inputs();
  TopkPiece piece;
  if (!find_piece(p, level, static_cast<int32_t>(blockIdx.x), piece)) return;
  if (piece.count <= p.topk) {
    copy_piece<kThreads>(piece, slots_of(p, level, piece), p.topk, p.padding_slot);
    return;
  }
  const bool keeps = thread == kThreads - 1;
  if (keeps) shared.piece = piece;  // so that no register does
  const uint32_t sample = piece.scores[min((lane_id() >> 1) * (piece.count >> 4) + (lane_id() & 1), piece.count - 1)];
  Scores<kThreads, kVectors> scores;
  scores.load(piece.scores, piece.count);
  __syncwarp();
  if (keeps) shared.table = slots_of(p, level, shared.piece);
  __syncthreads();
  const Set set = select_best(scores, shared, sample, static_cast<uint32_t>(p.topk));
  write_selected(scores, shared, set);
}

using TopkSlotsKernel = void (*)(const TopkSlotsParams, const TopkLevel);

inline TopkSlotsKernel topk_slots_kernel_of(const TopkBlock& block) {
  switch (block.threads) {
    case 224:
      return topk_slots_kernel<224, 8, 896, 5>;
    case 256:
      return topk_slots_kernel<256, 8, 1024, 4>;
    case 512:
      return block.keys_per_thread == 16 ? topk_slots_kernel<512, 4, 1024, 3> : topk_slots_kernel<512, 8, 2048, 2>;
    default:
      return topk_slots_kernel<1024, 8, 2048, 1>;
  }
}

}  // namespace sgl_kernel
