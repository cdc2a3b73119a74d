// CUDA backend: in place of index_scores.cu where the library is not built for sm_90.
#include <stdexcept>

#include "attention/index_scores.h"
#include "backend.h"

namespace sgl_kernel {

void load_index_scores_kernels() {}

namespace backend {

bool serves_index_scores(int32_t) { return false; }

void launch_index_scores(const IndexScoresParams&, const RowBlocks&, const Stream&) {
  throw std::logic_error("index_scores: the library was not built for sm_90");
}

}  // namespace backend
}  // namespace sgl_kernel
