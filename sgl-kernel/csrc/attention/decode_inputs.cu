// CUDA backend: the launch of the decode inputs.
#include "attention/cuda_launch.h"
#include "attention/decode_inputs.cuh"
#include "backend.h"

namespace sgl_kernel {

void load_decode_inputs_kernel() { load_kernel(decode_inputs_kernel, "loading decode_inputs_kernel"); }

namespace backend {

void launch_decode_inputs(const DecodeInputsParams& params, const Stream& stream) {
  const uint32_t blocks = (static_cast<uint32_t>(params.bs) + kBlockThreads - 1) / kBlockThreads;
  launch_kernel(decode_inputs_kernel, "launch of decode_inputs_kernel", stream, blocks, kBlockThreads, params);
}

}  // namespace backend
}  // namespace sgl_kernel
