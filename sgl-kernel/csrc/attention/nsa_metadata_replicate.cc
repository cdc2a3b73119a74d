// One call for a replay that generates into a staging set and copies it out: both runs on one stream, without going
// back to Python in between, and neither where one is refused.
#include "attention/plan_runs.h"
#include "sgl_kernel_ops.h"
#include "stack.h"

namespace sgl_kernel {

// (generate_plan, copy_plan, max_len): as nsa_metadata_generate_run, then as fused_metadata_copy_run.
void nsa_metadata_replicate_run(StableIValue* stack, uint64_t, uint64_t) {
  const TensorHandle generate_plan = take_tensor(stack[0]), copy_plan = take_tensor(stack[1]);
  const int64_t max_len = take<int64_t>(stack[2]);
  const GenerateRun generate = open_generate_run(generate_plan.get(), max_len);
  const CopyRun copy = open_copy_run(copy_plan.get(), -1, max_len);
  const int32_t device_index = generate.plan.header->device_index;
  if (copy.plan.header->device_index != device_index) {
    reject("nsa_metadata_replicate", {"copy_plan"}, "a plan of " + device_text(backend::device_type(), device_index),
           device_text(backend::device_type(), copy.plan.header->device_index));
  }
  const backend::Stream stream(device_index);
  generate.enqueue(stream);
  copy.enqueue(stream);
}

}  // namespace sgl_kernel
