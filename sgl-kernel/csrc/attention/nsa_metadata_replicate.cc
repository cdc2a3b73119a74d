// One call for a replay that generates into a staging set and copies it out: the two runs, one after the
// other on the current stream, without going back to Python in between.
#include "../stack.h"
#include "sgl_kernel_ops.h"

namespace sgl_kernel {

// (generate_plan, copy_plan, max_len): as nsa_metadata_generate_run, then as fused_metadata_copy_run.
void nsa_metadata_replicate_run(StableIValue* stack, uint64_t, uint64_t) {
  const StableIValue max_len = stack[2];
  TensorHandle copy_plan = take_tensor(stack[1]);  // freed here where the generation is refused
  nsa_metadata_generate_run(stack, 1, 0);
  StableIValue copy[3] = {torch::stable::detail::from(copy_plan.release()), torch::stable::detail::from(int64_t{-1}),
                          max_len};
  fused_metadata_copy_run(copy, 3, 0);
}

}  // namespace sgl_kernel
