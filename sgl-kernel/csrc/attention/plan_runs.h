// The runs of plans, opened and checked before anything is enqueued: operators may do more than one.
#pragma once

#include "attention/copy_launch.h"
#include "attention/nsa_metadata_generate.h"
#include "plan.h"

namespace sgl_kernel {

struct GenerateRun {
  PlanView<GenerateParams> plan;
  int64_t max_len;  // says how long the rows are, at most; -1: not known. The result does not depend on it.

  void enqueue(const backend::Stream& stream) const;
};
GenerateRun open_generate_run(AtenTensorHandle plan, int64_t max_len);
GenerateRun open_generate_run(const PlanHeader* plan, int64_t max_len);

struct CopyRun {
  PlanView<CopyLaunch> plan;
  int64_t expanded_rows, max_len;  // -1: the full extent

  void enqueue(const backend::Stream& stream) const;
};
CopyRun open_copy_run(AtenTensorHandle plan, int64_t expanded_rows, int64_t max_len);
CopyRun open_copy_run(const PlanHeader* plan, int64_t expanded_rows, int64_t max_len);

}  // namespace sgl_kernel
