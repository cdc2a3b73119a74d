// What a device must offer to the operators. csrc/attention/*.cu implement it for CUDA, csrc/cpu/*.cc for the
// CPU; a library links exactly one of them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SGLK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SGLK_HOST_DEVICE inline
#endif

namespace sgl_kernel {

constexpr int kBlockThreads = 256;  // threads of a block, in the kernels that have no reason for another number
constexpr int kBlocksPerSm = 5;     // resident together: 48 registers a thread, enough loads in flight for the memory

struct CopyParams;
struct GenerateParams;
struct PagedMQAScheduleParams;
struct DecodeInputsParams;

namespace backend {

const char* device_name();                      // "cpu" or "cuda"
int32_t device_type();                          // torch's number for it
void prepare(int32_t device_index);             // loads the kernels, once, so that a later launch may be captured
int32_t multiprocessors(int32_t device_index);  // what blocks run on at the same time

// They enqueue on the device's current stream and return at once (the CPU: when done).
void launch_copy(const CopyParams& params, int32_t device_index);
void launch_generate(const GenerateParams& params, int32_t device_index);
void launch_paged_mqa_schedule(const PagedMQAScheduleParams& params, int32_t device_index);
void launch_decode_inputs(const DecodeInputsParams& params, int32_t device_index);

}  // namespace backend
}  // namespace sgl_kernel
