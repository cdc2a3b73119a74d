// Products of a warpgroup's tensor cores (sm_90a): 64 rows of bfloat16 out of registers times columns out of shared
// memory, summed in float32. PTX ISA, "asynchronous warpgroup level matrix instructions".
#pragma once

#include <cstdint>

namespace sgl_kernel {

// The second operand: columns x 64 of bfloat16, 128-byte swizzle, groups of 8 columns 1,024 bytes apart. The 16 dims of
// a product are 32 bytes, 2 units of the descriptor's address.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* shared) {
  const uint64_t address = static_cast<uint64_t>(__cvta_generic_to_shared(shared));
  return (address & 0x3FFFF) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

#define SGLK_SUMS_8(i)                                                                                    \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]), \
      "+f"(sum[i + 6]), "+f"(sum[i + 7])

// A lane's sums: of rows 16 * warp + lane / 4 and 8 further, columns 8 * j + lane % 4 * 2 and the next, in this order.
template <int kColumns>
struct Products;

template <>
struct Products<32> {
  float sum[16];

  // Starts from zero unless `add`.
  __device__ __forceinline__ void multiply(const uint32_t (&a)[4], uint64_t b, int add) {
    asm volatile(
        "{\n.reg .pred add;\n"
        "setp.ne.b32 add, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "{%16, %17, %18, %19}, %20, add, 1, 1, 0;\n}\n"
        : SGLK_SUMS_8(0), SGLK_SUMS_8(8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
  }
};

template <>
struct Products<64> {
  float sum[32];

  __device__ __forceinline__ void multiply(const uint32_t (&a)[4], uint64_t b, int add) {
    asm volatile(
        "{\n.reg .pred add;\n"
        "setp.ne.b32 add, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}\n"
        : SGLK_SUMS_8(0), SGLK_SUMS_8(8), SGLK_SUMS_8(16), SGLK_SUMS_8(24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
  }
};

#undef SGLK_SUMS_8

// Before the first product of a chain: no register that it uses is written any more.
template <int kColumns>
__device__ __forceinline__ void begin_products(Products<kColumns>& products) {
#pragma unroll
  for (float& sum : products.sum) asm volatile("" : "+f"(sum)::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// After the last: waits for the sums.
template <int kColumns>
__device__ __forceinline__ void end_products(Products<kColumns>& products) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (float& sum : products.sum) asm volatile("" : "+f"(sum)::"memory");
}

}  // namespace sgl_kernel
