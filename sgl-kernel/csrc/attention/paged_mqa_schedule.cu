// CUDA backend: the launch of the schedule kernel.
#include "attention/cuda_launch.h"
#include "attention/paged_mqa_schedule.cuh"
#include "backend.h"

namespace sgl_kernel {

void load_paged_mqa_schedule_kernel() { load_kernel(paged_mqa_schedule_kernel, "loading paged_mqa_schedule_kernel"); }

namespace backend {

void launch_paged_mqa_schedule(const PagedMQAScheduleParams& params, const Stream& stream) {
  launch_kernel(paged_mqa_schedule_kernel, "launch of paged_mqa_schedule_kernel", stream,
                static_cast<uint32_t>(params.num_schedules), kBlockThreads, params);
}

}  // namespace backend
}  // namespace sgl_kernel
