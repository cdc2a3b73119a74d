// Enough of CUDA to run the kernels on the CPU, thread by thread, so that the device code itself is tested
// where there is no GPU: a block is a fiber for each thread, which meet at barriers, those of a warp at its
// collectives. Aborts on a misaligned load and on a barrier that not all threads of the block, or of the warp, reach.
// Not concurrent. Fibers are kept from launch to launch, and switched by _longjmp: swapcontext is a system call.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <utility>

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
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }

struct Index {
  uint32_t x;
};
static Index threadIdx, blockIdx, gridDim;
using std::max;
using std::min;

namespace emulation {

constexpr int kMaxThreads = 1024, kWarp = 32, kStackBytes = 1 << 16;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel: %s\n", what);
  std::abort();
}

class Block {
 public:
  // Runs `kernel` once per thread of every block, the last block first: no order may matter.
  void launch(uint32_t blocks, int threads, const std::function<void()>& kernel) {
    if (threads > kMaxThreads) fail("more threads than a block of the emulation has");
    if (blocks == 0) return;
    for (; started_ < threads; ++started_) start(started_);
    kernel_ = kernel;
    threads_ = threads;
    gridDim.x = blocks;
    blockIdx.x = blocks - 1;
    if (_setjmp(launcher_) == 0) resume(0);
  }

  // A round ends with all threads at the same barrier, or all at their end.
  void barrier() {
    if (_setjmp(fibers_[current_]) != 0) return;
    if (arrivals_[current_ / kWarp] % kWarp != 0) fail("a collective that not all threads of a warp reach");
    if (current_ + 1 < threads_) resume(current_ + 1);
    if (finished_ == threads_) {
      finished_ = 0;
      if (blockIdx.x-- == 0) _longjmp(launcher_, 1);
    } else if (finished_ != 0) {
      fail("a barrier that not all threads reach");
    }
    resume(0);
  }

  // The same of a warp's threads: the last goes on with the first.
  void warp_barrier() {
    const int warp = current_ / kWarp;
    ++arrivals_[warp];
    if (_setjmp(fibers_[current_]) != 0) return;
    if ((current_ + 1) % kWarp != 0) resume(current_ + 1);
    if (arrivals_[warp] % kWarp != 0) fail("a collective that not all threads of a warp reach");
    resume(warp * kWarp);
  }

  // Every thread of a warp gives a value and sees those of the others. Two arrays in turn, for those that are ahead.
  template <typename Read>
  uint64_t exchange(uint64_t value, Read read) {
    uint64_t* const values = values_[rounds_[current_]++ & 1];
    const int me = current_;
    values[me] = value;
    warp_barrier();
    return read(me, values);
  }

 private:
  // Makes the fiber of a thread, which waits at the begin of its first kernel.
  void start(int thread) {
    ucontext_t fiber;
    getcontext(&fiber);
    fiber.uc_stack.ss_sp = stacks_.get() + static_cast<size_t>(thread) * kStackBytes;
    fiber.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber, run_kernels, 0);
    current_ = thread;
    swapcontext(&starter_, &fiber);
  }

  static void run_kernels();

  [[noreturn]] void resume(int thread) {
    current_ = thread;
    threadIdx.x = static_cast<uint32_t>(thread);
    _longjmp(fibers_[thread], 1);
  }

  std::function<void()> kernel_;
  ucontext_t starter_;
  jmp_buf launcher_, fibers_[kMaxThreads];
  std::unique_ptr<char[]> stacks_{new char[static_cast<size_t>(kMaxThreads) * kStackBytes]};  // untouched memory
  uint64_t values_[2][kMaxThreads];
  uint32_t rounds_[kMaxThreads] = {}, arrivals_[kMaxThreads / kWarp] = {};  // at collectives
  int started_ = 0, threads_ = 0, current_ = 0, finished_ = 0;
};

inline Block block;

inline void Block::run_kernels() {
  if (_setjmp(block.fibers_[block.current_]) == 0) setcontext(&block.starter_);
  for (;;) {
    block.kernel_();
    ++block.finished_;
    block.barrier();
  }
}

}  // namespace emulation

template <typename T>
T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) emulation::fail("a misaligned load");
  return *address;
}

template <typename T>
T __ldcs(const T* address) {
  return __ldg(address);
}

inline void __syncthreads() { emulation::block.barrier(); }
inline void __syncwarp() { emulation::block.warp_barrier(); }

inline uint32_t atomicAdd(uint32_t* address, uint32_t value) { return std::exchange(*address, *address + value); }
inline uint32_t atomicOr(uint32_t* address, uint32_t value) { return std::exchange(*address, *address | value); }

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float value) { return 1 / value; }
inline float __saturatef(float value) { return value > 0 ? std::min(value, 1.f) : 0.f; }  // a NaN's is 0

template <typename T>
T __shfl_up_sync(unsigned, T value, int step) {
  return static_cast<T>(emulation::block.exchange(static_cast<uint64_t>(value), [&](int me, const uint64_t* values) {
    return values[me % emulation::kWarp >= step ? me - step : me];
  }));
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return static_cast<T>(emulation::block.exchange(static_cast<uint64_t>(value), [&](int me, const uint64_t* values) {
    return values[me - me % emulation::kWarp + lane % emulation::kWarp];
  }));
}

inline uint32_t __reduce_add_sync(unsigned, uint32_t value) {
  return static_cast<uint32_t>(emulation::block.exchange(value, [](int me, const uint64_t* values) {
    const uint64_t* const warp = values + (me - me % emulation::kWarp);
    return std::accumulate(warp, warp + emulation::kWarp, uint64_t{0});
  }));
}

inline uint32_t __ballot_sync(unsigned, bool value) {
  return static_cast<uint32_t>(emulation::block.exchange(value, [](int me, const uint64_t* values) {
    const uint64_t* const warp = values + (me - me % emulation::kWarp);
    uint64_t set = 0;
    for (int lane = 0; lane < emulation::kWarp; ++lane) set |= warp[lane] << lane;
    return set;
  }));
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }

template <typename Choose>
uint32_t reduce_warp(uint32_t value, Choose choose) {
  return static_cast<uint32_t>(emulation::block.exchange(value, [&](int me, const uint64_t* values) {
    const uint64_t* const warp = values + (me - me % emulation::kWarp);
    return *choose(warp, warp + emulation::kWarp);
  }));
}
inline uint32_t __reduce_min_sync(unsigned, uint32_t value) {
  return reduce_warp(value, [](auto first, auto last) { return std::min_element(first, last); });
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t value) {
  return reduce_warp(value, [](auto first, auto last) { return std::max_element(first, last); });
}

inline int32_t __reduce_max_sync(unsigned, int32_t value) {
  return static_cast<int32_t>(
      emulation::block.exchange(static_cast<uint64_t>(value), [](int me, const uint64_t* values) {
        const int64_t* const warp = reinterpret_cast<const int64_t*>(values) + (me - me % emulation::kWarp);
        return static_cast<uint64_t>(*std::max_element(warp, warp + emulation::kWarp));
      }));
}
