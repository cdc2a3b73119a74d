// What a device must offer to the operators. csrc/attention/*.cu implement it for CUDA, csrc/cpu/*.cc for the
// CPU; a library links exactly one of them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SGLK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SGLK_HOST_DEVICE inline
#endif

namespace sgl_kernel {

constexpr int kBlockThreads = 256;  // threads of a block, in the kernels that have no reason for another number
constexpr int kBlocksPerSm = 5;     // resident together: 48 registers a thread, enough loads in flight for the memory

struct CopyParams;
struct ReplayCopyParams;
struct GenerateParams;
struct TableGrid;
struct PagedMQAScheduleParams;
struct DecodeInputsParams;
struct TopkSlotsParams;
struct TopkLevel;
struct IndexScoresParams;
struct RowBlocks;

namespace backend {

const char* device_name();                      // "cpu" or "cuda"
int32_t device_type();                          // torch's number for it
void prepare(int32_t device_index);             // loads the kernels, once, so that a later launch may be captured
int32_t multiprocessors(int32_t device_index);  // what blocks run on at the same time

// Where launches go: the device's current stream. The device is the current one for the life of the object.
class Stream {
 public:
  explicit Stream(int32_t device_index);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  void* get() const { return stream_; }

 private:
  void* stream_ = nullptr;
  int32_t device_ = 0, previous_ = 0;
};

// They enqueue and return at once (the CPU: when done).
void launch_copy(const CopyParams& params, const Stream& stream);
void launch_copy(const ReplayCopyParams& params, const Stream& stream);
void launch_generate(const GenerateParams& params, const TableGrid& grid, const Stream& stream);
void launch_paged_mqa_schedule(const PagedMQAScheduleParams& params, const Stream& stream);
void launch_decode_inputs(const DecodeInputsParams& params, const Stream& stream);
void launch_topk_slots(const TopkSlotsParams& params, const TopkLevel& level, const Stream& stream);
bool serves_index_scores(int32_t device_index);  // else the next is not called
void launch_index_scores(const IndexScoresParams& params, const RowBlocks& blocks, const Stream& stream);

}  // namespace backend
}  // namespace sgl_kernel
