// The device's part of a programmatic dependent launch (`launch_dependent_kernel`).
#pragma once

namespace sgl_kernel {

// Starts while the kernel before still runs, and lets the next one start: as `launch_triton.py` has it.
__device__ __forceinline__ void wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace sgl_kernel
