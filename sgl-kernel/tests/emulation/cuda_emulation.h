// Enough of CUDA to run the kernels on the CPU, thread by thread, so that the device code itself is tested
// where there is no GPU: a block is a fiber for each thread, which meet at barriers. Aborts on a misaligned load
// and on a barrier that not all threads of the block reach (the kernels use block-wide collectives only). Not
// fast, and not concurrent.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <vector>

#define __CUDACC__ 1
#define __host__
#define __device__
#define __global__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }

struct Index {
  uint32_t x;
};
static Index threadIdx, blockIdx, gridDim;
using std::min;

namespace emulation {

constexpr int kMaxThreads = 256, kWarp = 32, kStackBytes = 1 << 16;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel: %s\n", what);
  std::abort();
}

class Block {
 public:
  // Runs `kernel` once per thread of every block, the last block first: no order may matter.
  void launch(uint32_t blocks, int threads, const std::function<void()>& kernel) {
    if (threads > kMaxThreads) fail("more threads than a block of the emulation has");
    kernel_ = kernel;
    threads_ = threads;
    gridDim.x = blocks;
    for (blockIdx.x = blocks; blockIdx.x-- > 0;) run();
  }

  void barrier() { swapcontext(&fibers_[current_], &scheduler_); }

  // Every thread gives a value and sees those of all others.
  template <typename Read>
  uint32_t exchange(uint32_t value, Read read) {
    const int me = current_;
    values_[me] = value;
    barrier();
    const uint32_t result = read(me, values_);
    barrier();
    return result;
  }

 private:
  void run() {
    for (int t = 0; t < threads_; ++t) start(t);
    int finished = 0;
    while (finished == 0) {  // a round ends with all threads at the same barrier, or all at their end
      finished = 0;
      for (current_ = 0; current_ < threads_; ++current_) {
        done_ = false;
        threadIdx.x = static_cast<uint32_t>(current_);
        swapcontext(&scheduler_, &fibers_[current_]);
        finished += done_;
      }
    }
    if (finished != threads_) fail("a barrier that not all threads reach");
  }

  void start(int thread) {
    ucontext_t& fiber = fibers_[thread];
    getcontext(&fiber);
    fiber.uc_stack.ss_sp = stacks_.data() + thread * kStackBytes;
    fiber.uc_stack.ss_size = kStackBytes;
    fiber.uc_link = &scheduler_;
    makecontext(&fiber, enter, 0);
  }

  static void enter();

  std::function<void()> kernel_;
  ucontext_t scheduler_, fibers_[kMaxThreads];
  std::vector<char> stacks_ = std::vector<char>(static_cast<size_t>(kMaxThreads) * kStackBytes);
  uint32_t values_[kMaxThreads];
  int threads_ = 0;
  int current_ = 0;
  bool done_ = false;
};

inline Block block;

inline void Block::enter() {
  block.kernel_();
  block.done_ = true;
}

}  // namespace emulation

template <typename T>
T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) emulation::fail("a misaligned load");
  return *address;
}

inline void __syncthreads() { emulation::block.barrier(); }

inline uint32_t __shfl_up_sync(unsigned, uint32_t value, int step) {
  return emulation::block.exchange(
      value, [&](int me, const uint32_t* values) { return me % emulation::kWarp >= step ? values[me - step] : value; });
}

inline uint64_t __shfl_up_sync(unsigned mask, uint64_t value, int step) {
  const uint64_t high = __shfl_up_sync(mask, static_cast<uint32_t>(value >> 32), step);
  return high << 32 | __shfl_up_sync(mask, static_cast<uint32_t>(value), step);
}

inline int32_t __shfl_sync(unsigned, int32_t value, int lane) {
  return static_cast<int32_t>(emulation::block.exchange(
      static_cast<uint32_t>(value),
      [&](int me, const uint32_t* values) { return values[me - me % emulation::kWarp + lane % emulation::kWarp]; }));
}

inline uint32_t __reduce_add_sync(unsigned, uint32_t value) {
  return emulation::block.exchange(value, [](int me, const uint32_t* values) {
    const uint32_t* const warp = values + (me - me % emulation::kWarp);
    return std::accumulate(warp, warp + emulation::kWarp, uint32_t{0});
  });
}

inline int32_t __reduce_max_sync(unsigned, int32_t value) {
  return static_cast<int32_t>(
      emulation::block.exchange(static_cast<uint32_t>(value), [](int me, const uint32_t* values) {
        const int32_t* const warp = reinterpret_cast<const int32_t*>(values) + (me - me % emulation::kWarp);
        return static_cast<uint32_t>(*std::max_element(warp, warp + emulation::kWarp));
      }));
}
