// The schedule of DeepGEMM's paged MQA logits: which SM scores which keys. The functions that say what an SM gets are
// shared by the CPU and the CUDA library; no torch in here.
//
// A request has ceil(length / segment) segments for each of its atoms (groups of query rows that are scored together);
// a piece of work is one segment of one atom. All work in order is divided evenly: row i of a schedule is the (atom,
// segment) where SM i starts and SM i - 1 ends, so that the last row lies behind the last atom.
#pragma once

#include <cstdint>

#include "backend.h"

namespace sgl_kernel {

constexpr int kMaxPagedMQASchedules = 64;  // schedules in one launch

struct PagedMQASchedule {
  const int32_t* context_lens;  // of request i: context_lens[i * len_stride]
  int32_t* schedule;            // [num_sms + 1, 2]
  int64_t len_stride;
  int32_t batch;
  int32_t atoms;  // of a request
  int32_t num_sms;
};

struct PagedMQAScheduleParams {
  int32_t num_schedules;
  int32_t segment;      // keys
  bool remainder_last;  // what does not divide evenly goes to the last SMs, else to the first
  bool segment_major;   // a request's work in order: all atoms of a segment together, else all segments of an atom
  PagedMQASchedule schedules[kMaxPagedMQASchedules];

  bool counts_fit() const { return num_schedules > 0 && num_schedules <= kMaxPagedMQASchedules; }
};
static_assert(sizeof(PagedMQAScheduleParams) <= 4096, "PagedMQAScheduleParams must fit in the kernel argument space");

SGLK_HOST_DEVICE uint32_t num_segments(const PagedMQAScheduleParams& p, const PagedMQASchedule& s, int32_t request) {
  const int32_t len = s.context_lens[request * s.len_stride];
  return len > 0 ? static_cast<uint32_t>(len - 1) / static_cast<uint32_t>(p.segment) + 1 : 0;
}

SGLK_HOST_DEVICE uint64_t request_work(const PagedMQAScheduleParams& p, const PagedMQASchedule& s, int32_t request) {
  return static_cast<uint64_t>(num_segments(p, s, request)) * static_cast<uint32_t>(s.atoms);
}

// The work, counted over all requests, with which an SM starts.
SGLK_HOST_DEVICE uint64_t first_work(const PagedMQAScheduleParams& p, const PagedMQASchedule& s, uint64_t total,
                                     int32_t sm) {
  const uint64_t share = total / static_cast<uint32_t>(s.num_sms);
  const int32_t rest = static_cast<int32_t>(total % static_cast<uint32_t>(s.num_sms));
  const int32_t before = p.remainder_last ? sm - (s.num_sms - rest) : sm < rest ? sm : rest;
  return share * static_cast<uint32_t>(sm) + static_cast<uint32_t>(before > 0 ? before : 0);
}

// Writes the row of an SM that starts `offset` pieces of work into a request; `request` is the batch size behind the
// last.
SGLK_HOST_DEVICE void write_start(const PagedMQAScheduleParams& p, const PagedMQASchedule& s, int32_t sm,
                                  int32_t request, uint64_t offset) {
  const uint32_t segments = request < s.batch ? num_segments(p, s, request) : 0, atoms = static_cast<uint32_t>(s.atoms);
  int32_t atom = request * s.atoms, segment = 0;
  if (segments > 0) {
    atom += p.segment_major ? 0 : static_cast<int32_t>(offset / segments);
    segment = static_cast<int32_t>(p.segment_major ? offset / atoms : offset % segments);
  }
  s.schedule[2 * sm] = atom;
  s.schedule[2 * sm + 1] = segment;
}

#if defined(__CUDACC__)

// Inclusive prefix sum over the threads of the block, left in `sums`. Ends with a barrier.
__device__ __forceinline__ void block_inclusive_sum(uint64_t mine, uint64_t (&sums)[kBlockThreads]) {
  __shared__ uint64_t warp_total[kBlockThreads / 32];
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t left = __shfl_up_sync(~0u, mine, step);
    if (lane >= step) mine += left;
  }
  if (lane == 31) warp_total[warp] = mine;
  __syncthreads();
  for (int w = 0; w < warp; ++w) mine += warp_total[w];
  sums[threadIdx.x] = mine;
  __syncthreads();
}

// One block writes one schedule. Each thread sums consecutive requests; then a thread for each SM finds the thread, and
// among its requests the request, in which the SM starts.
__global__ void __launch_bounds__(kBlockThreads)
    paged_mqa_schedule_kernel(const __grid_constant__ PagedMQAScheduleParams params) {
  const PagedMQASchedule& s = params.schedules[blockIdx.x];
  __shared__ uint64_t ends[kBlockThreads];
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const int32_t per_thread = (s.batch + kBlockThreads - 1) / kBlockThreads;
  const int32_t begin = min(thread * per_thread, s.batch), end = min(begin + per_thread, s.batch);
  uint64_t work = 0;
  for (int32_t i = begin; i < end; ++i) work += request_work(params, s, i);
  block_inclusive_sum(work, ends);

  for (int32_t sm = thread; sm <= s.num_sms; sm += kBlockThreads) {
    const uint64_t start = first_work(params, s, ends[kBlockThreads - 1], sm);
    int32_t low = 0, high = kBlockThreads;  // the first thread whose requests end behind `start`
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      (ends[middle] <= start ? low : high) = ends[middle] <= start ? middle + 1 : middle;
    }
    uint64_t before = low > 0 ? ends[low - 1] : 0;
    int32_t request = low < kBlockThreads ? low * per_thread : s.batch;
    for (; request < s.batch && before + request_work(params, s, request) <= start; ++request) {
      before += request_work(params, s, request);
    }
    write_start(params, s, sm, request, start - before);
  }
}

#endif  // __CUDACC__

}  // namespace sgl_kernel
