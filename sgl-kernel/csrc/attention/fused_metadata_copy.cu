// CUDA backend: device queries, loading of the kernels, and the launch of the copy.
#include <atomic>

#include "attention/cuda_launch.h"
#include "attention/fused_metadata_copy.cuh"
#include "backend.h"

namespace sgl_kernel {

void load_decode_inputs_kernel();       // decode_inputs.cu
void load_generate_kernels();           // nsa_metadata_generate.cu
void load_index_scores_kernels();       // index_scores.cu
void load_paged_mqa_schedule_kernel();  // paged_mqa_schedule.cu
void load_topk_slots_kernels();         // topk_slots.cu

namespace {

constexpr int kMaxDevices = 64;  // of which something is remembered

// One block per tile, however many: the memory then sees the tiles in order, and no SM waits for another at the end.
template <typename Params>
void launch(const Params& params, const backend::Stream& stream) {
  if (params.num_tiles == 0) return;
  launch_kernel(fused_metadata_copy_kernel<Params>, "launch of fused_metadata_copy_kernel", stream, params.num_tiles,
                kBlockThreads, params);
}

int32_t count_multiprocessors(int32_t device_index) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_index), "counting multiprocessors");
  return count;
}

}  // namespace

namespace backend {

const char* device_name() { return "cuda"; }
int32_t device_type() { return aoti_torch_device_type_cuda(); }

void prepare(int32_t device_index) {
  static std::atomic<bool> loaded[kMaxDevices];
  const bool known = device_index >= 0 && device_index < kMaxDevices;
  if (known && loaded[device_index].load(std::memory_order_acquire)) return;
  check_driver();
  const DeviceScope scope(device_index);
  load_kernel(fused_metadata_copy_kernel<CopyParams>, "loading fused_metadata_copy_kernel");
  load_kernel(fused_metadata_copy_kernel<ReplayCopyParams>, "loading fused_metadata_copy_kernel");
  load_decode_inputs_kernel();
  load_generate_kernels();
  load_paged_mqa_schedule_kernel();
  load_topk_slots_kernels();
  if (serves_index_scores(device_index)) load_index_scores_kernels();
  if (known) loaded[device_index].store(true, std::memory_order_release);
}

int32_t multiprocessors(int32_t device_index) {
  static std::atomic<int32_t> counts[kMaxDevices];
  if (device_index < 0 || device_index >= kMaxDevices) return count_multiprocessors(device_index);
  int32_t count = counts[device_index].load(std::memory_order_relaxed);
  if (count == 0) {
    count = count_multiprocessors(device_index);
    counts[device_index].store(count, std::memory_order_relaxed);
  }
  return count;
}

Stream::Stream(int32_t device_index) : device_(device_index) {
  check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
  if (aoti_torch_get_current_cuda_stream(device_, &stream_) != 0) {
    throw std::runtime_error("sgl_kernel: torch did not tell the current CUDA stream");
  }
  if (previous_ != device_) check_cuda(cudaSetDevice(device_), "cudaSetDevice");
}
Stream::~Stream() {
  if (previous_ != device_) cudaSetDevice(previous_);
}

void launch_copy(const CopyParams& params, const Stream& stream) { launch(params, stream); }
void launch_copy(const ReplayCopyParams& params, const Stream& stream) { launch(params, stream); }

}  // namespace backend
}  // namespace sgl_kernel
