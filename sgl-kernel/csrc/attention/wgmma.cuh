// Products of a warpgroup's tensor cores (sm_90a): 64 rows of bfloat16 out of registers times columns out of shared
// memory, summed in float32. PTX ISA, "asynchronous warpgroup level matrix multiply-accumulate".
#pragma once

#include <cstdint>

namespace sgl_kernel {

// The second operand: columns x 64 of bfloat16, with the 128-byte swizzle, groups of 8 columns 1,024 bytes apart. A
// descriptor's lower half is its address in units of 16 bytes, to which can be added.
constexpr uint64_t kSwizzledColumns = uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32;

__device__ __forceinline__ uint32_t descriptor_address(const void* shared) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  return (address & 0x3FFFF) >> 4 | 1u << 16;
}

#define SGLK_SUMS_8(i)                                                                                    \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]), \
      "+f"(sum[i + 6]), "+f"(sum[i + 7])

// A lane's sums: of rows 16 * warp + lane / 4 and 8 further, columns 8 * j + lane % 4 * 2 and the next, in this order:
// two columns of the first row, two of the second.
template <int kColumns>
struct Products;

template <>
struct Products<32> {
  float sum[16];

  // Of 16 dims; starts from zero unless `add`.
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

// What the compiler knows of the sums ends here: they change while other instructions run.
template <int kColumns>
__device__ __forceinline__ void fence_sums(Products<kColumns>& products) {
#pragma unroll
  for (float& sum : products.sum) asm volatile("" : "+f"(sum)::"memory");
}

// Around the products of a group.
template <int kColumns>
__device__ __forceinline__ void begin_products(Products<kColumns>& products) {
  fence_sums(products);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for these, behind which `kLater` groups were begun.
template <int kLater, int kColumns>
__device__ __forceinline__ void wait_products(Products<kColumns>& products) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLater) : "memory");
  fence_sums(products);
}

}  // namespace sgl_kernel
