// The CUDA kernels as a backend for CPU tensors, emulated.
// clang-format off: torch must come before the emulation's macros, the kernels after them
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <array>

#include "cuda_emulation.h"

#include "attention/decode_inputs.cuh"
#include "attention/fused_metadata_copy.cuh"
#include "attention/nsa_metadata_generate.cuh"
#include "attention/paged_mqa_schedule.cuh"
#include "attention/topk_slots.cuh"
#include "cpu/index_scores.h"
// clang-format on

namespace sgl_kernel {
namespace {

template <typename Params>
void copy(const Params& params) {
  const uint32_t blocks = std::min(params.num_tiles, static_cast<uint32_t>(kBlocksPerSm));
  emulation::block.launch(blocks, kBlockThreads, [&] { fused_metadata_copy_kernel(params); });
}

}  // namespace

namespace backend {

const char* device_name() { return "cpu"; }
int32_t device_type() { return aoti_torch_device_type_cpu(); }
void prepare(int32_t) {}
Stream::Stream(int32_t) {}
Stream::~Stream() = default;
int32_t multiprocessors(int32_t) { return 1; }  // few, so that blocks take several tiles

void launch_copy(const CopyParams& params, const Stream&) { copy(params); }
void launch_copy(const ReplayCopyParams& params, const Stream&) { copy(params); }

void launch_generate(const GenerateParams& params, const TableGrid& grid, const Stream&) {
  const GenerateKernel kernel = generate_kernel(params.mode, grid.threads, params.whole_pages);
  emulation::block.launch(static_cast<uint32_t>(params.num_vectors + grid.blocks), grid.threads,
                          [&] { kernel(grid, params); });
}

void launch_paged_mqa_schedule(const PagedMQAScheduleParams& params, const Stream&) {
  emulation::block.launch(static_cast<uint32_t>(params.num_schedules), kBlockThreads,
                          [&] { paged_mqa_schedule_kernel(params); });
}

void launch_decode_inputs(const DecodeInputsParams& params, const Stream&) {
  const uint32_t blocks = (static_cast<uint32_t>(params.bs) + kBlockThreads - 1) / kBlockThreads;
  emulation::block.launch(blocks, kBlockThreads, [&] { decode_inputs_kernel(params); });
}

void launch_topk_slots(const TopkSlotsParams& params, const TopkLevel& level, const Stream&) {
  emulation::block.launch(static_cast<uint32_t>(params.rows * level.pieces), level.block.threads,
                          [&] { topk_slots_kernel_of(level.block)(params, level); });
}

bool serves_index_scores(int32_t) { return true; }

void launch_index_scores(const IndexScoresParams& params, const RowBlocks&, const Stream&) {
  for (int32_t row = 0; row < params.rows; ++row) write_index_scores(params, row);
}

}  // namespace backend
}  // namespace sgl_kernel
