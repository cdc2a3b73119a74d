// A replay as a Python builtin of one argument, bound to its plans.
#include "attention/plan_runs.h"
#include "python_builtin.h"
#include "sgl_kernel_ops.h"

namespace sgl_kernel {
namespace {

// The generation into a staging set and the copy out of it on one stream, and neither where one is refused.
void enqueue_both(const GenerateRun& generate, const CopyRun& copy) {
  const int32_t device_index = generate.plan.header->device_index;
  if (copy.plan.header->device_index != device_index) {
    reject("metadata_replay", {"copy"}, "a plan of " + device_text(backend::device_type(), device_index),
           device_text(backend::device_type(), copy.plan.header->device_index));
  }
  const backend::Stream stream(device_index);
  generate.enqueue(stream);
  copy.enqueue(stream);
}

void enqueue(const PlanHeader* generate, const PlanHeader* copy, int64_t max_len) {
  if (generate != nullptr && copy != nullptr) {
    enqueue_both(open_generate_run(generate, max_len), open_copy_run(copy, -1, max_len));
  } else if (generate != nullptr) {
    open_generate_run(generate, max_len).enqueue(backend::Stream(generate->device_index));
  } else if (copy != nullptr) {
    open_copy_run(copy, -1, max_len).enqueue(backend::Stream(copy->device_index));
  }
}

// `self`: a tuple that begins with the addresses of a plan of nsa_metadata_generate and of one of fused_metadata_copy,
// 0 for one that is not wanted; what follows keeps them alive. `argument`: max_len.
PyObject* replay(PyObject* self, PyObject* argument) {
  int64_t max_len = 0;
  if (!take_integer(argument, max_len)) return nullptr;
  const auto* const generate = held_address<PlanHeader>(self, 0);
  const auto* const copy = held_address<PlanHeader>(self, 1);
  return run_without_lock([&] { enqueue(generate, copy, max_len); });
}

PyMethodDef kReplay{"metadata_replay", reinterpret_cast<void*>(replay), kOneArgument,
                    "metadata_replay(max_len: int) -> None"};

}  // namespace

// () -> the address of the builtin's PyMethodDef.
void metadata_replay_method(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = torch::stable::detail::from(static_cast<int64_t>(reinterpret_cast<uintptr_t>(&kReplay)));
}

}  // namespace sgl_kernel
