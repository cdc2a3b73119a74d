// CUDA backend: the launch of the schedule kernel.
#include "attention/cuda_launch.h"
#include "attention/paged_mqa_schedule.cuh"
#include "backend.h"

namespace sgl_kernel {

void load_paged_mqa_schedule_kernel() {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, paged_mqa_schedule_kernel), "loading paged_mqa_schedule_kernel");
}

namespace backend {

void launch_paged_mqa_schedule(const PagedMQAScheduleParams& params, int32_t device_index) {
  const DeviceScope scope(device_index);
  paged_mqa_schedule_kernel<<<params.num_schedules, kBlockThreads, 0, current_stream(device_index)>>>(params);
  check_cuda(cudaGetLastError(), "launch of paged_mqa_schedule_kernel");
}

}  // namespace backend
}  // namespace sgl_kernel
