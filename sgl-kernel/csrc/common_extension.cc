// Registers the operators with torch's stable ABI. Compiled once per library: SGL_KERNEL_NAMESPACE is
// sgl_kernel_nsa_cpu or sgl_kernel_nsa_cuda, so both can be loaded side by side, and beside the sgl-kernel
// wheels.
//
// A plan holds the addresses of the tensors that a run writes: the run's schema marks the plan as mutated.
#include "sgl_kernel_ops.h"

namespace {

// The three operators of a plan. ..._plan writes nothing that it is given.
void def_planned(torch::stable::detail::StableLibrary& m, const std::string& name, const std::string& planned,
                 const std::string& run = "") {
  std::string read = planned;
  for (size_t at; (at = read.find("!)")) != std::string::npos;) read.erase(at - 2, 4);
  m.def((name + "_plan(" + read + ") -> Tensor").c_str());
  m.def((name + "_run(Tensor(a!) plan" + (run.empty() ? "" : ", " + run) + ") -> ()").c_str());
  m.def((name + "_once(" + planned + (run.empty() ? "" : ", " + run) + ") -> ()").c_str());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SGL_KERNEL_NAMESPACE, m) {
  m.def("abi_version() -> int");

  const std::string copy_regions =
      "Tensor[] srcs, Tensor(a!)[] dsts, int[] num_dsts, int[] rows_expanded, int[] rows_extra, int[] cols_per";
  def_planned(m, "fused_metadata_copy", copy_regions, "int expanded_rows, int max_len");
  m.def(sgl_kernel::fused_metadata_copy_schema().c_str());
  m.def(sgl_kernel::fused_metadata_copy_multi_schema().c_str());

  m.def("replay_copy_plan(Tensor[] dsts, str names, int[] extras) -> Tensor");
  m.def("replay_copy_once(Tensor(a!)[] dsts, str names, int[] extras, Tensor[] srcs, int batch_size, int width) -> ()");
  for (int n = 1; n <= sgl_kernel::kMaxReplayFields; ++n) m.def(sgl_kernel::replay_copy_run_schema(n).c_str());
  m.def(sgl_kernel::fused_copy_replay_data_schema().c_str());
  def_planned(
      m, "nsa_metadata_generate",
      "int forward_mode, int bs, Tensor seq_lens, Tensor req_pool_indices, Tensor req_to_token, Tensor(a!)[] dsts, "
      "int[] dst_fields, int[] seqlens_offsets, int page_size, int topk, int rows_per_req, Tensor? accept_lens, "
      "bool packed, bool whole_pages",
      "int max_len");
  def_planned(m, "decode_inputs",
              "int bs, Tensor seq_lens, Tensor req_pool_indices, Tensor req_to_token, Tensor token_pool, "
              "Tensor(a!) input_ids, Tensor(b!) out_cache_loc, Tensor(c!) positions");
  def_planned(m, "paged_mqa_schedule",
              "Tensor[] context_lens, Tensor(a!)[] schedules, int[] atoms, int segment, bool remainder_last, "
              "bool segment_major");

  m.def(
      "index_scores(Tensor q_index, Tensor index_weights, Tensor index_k, Tensor page_table, Tensor? table_rows, "
      "Tensor lengths, Tensor(a!) scores, int first_row, int? rows_per_req, int width, int topk) -> ()");
  m.def("index_scores_served(int device_index, int heads, int dim) -> bool");
  m.def(
      "topk_slots(Tensor scores, Tensor page_table, Tensor? table_rows, Tensor lengths, Tensor(a!) slots, "
      "int first_row, int rows_per_req, int width, int padding_slot) -> ()");

  m.def("metadata_replay_method() -> int");
  m.def("replay_copy_method() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(SGL_KERNEL_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("abi_version", sgl_kernel::abi_version);
  m.impl("fused_metadata_copy_plan", sgl_kernel::fused_metadata_copy_plan);
  m.impl("fused_metadata_copy_run", sgl_kernel::fused_metadata_copy_run);
  m.impl("fused_metadata_copy_once", sgl_kernel::fused_metadata_copy_once);
  m.impl("fused_metadata_copy", sgl_kernel::fused_metadata_copy);
  m.impl("fused_metadata_copy_multi", sgl_kernel::fused_metadata_copy_multi);
  m.impl("replay_copy_plan", sgl_kernel::replay_copy_plan);
  for (int n = 1; n <= sgl_kernel::kMaxReplayFields; ++n) {
    m.impl(sgl_kernel::replay_copy_run_name(n).c_str(), sgl_kernel::replay_copy_run);
  }
  m.impl("replay_copy_once", sgl_kernel::replay_copy_once);
  m.impl("fused_copy_replay_data", sgl_kernel::fused_copy_replay_data);
  m.impl("nsa_metadata_generate_plan", sgl_kernel::nsa_metadata_generate_plan);
  m.impl("nsa_metadata_generate_run", sgl_kernel::nsa_metadata_generate_run);
  m.impl("nsa_metadata_generate_once", sgl_kernel::nsa_metadata_generate_once);
  m.impl("decode_inputs_plan", sgl_kernel::decode_inputs_plan);
  m.impl("decode_inputs_run", sgl_kernel::decode_inputs_run);
  m.impl("decode_inputs_once", sgl_kernel::decode_inputs_once);
  m.impl("paged_mqa_schedule_plan", sgl_kernel::paged_mqa_schedule_plan);
  m.impl("paged_mqa_schedule_run", sgl_kernel::paged_mqa_schedule_run);
  m.impl("paged_mqa_schedule_once", sgl_kernel::paged_mqa_schedule_once);
  m.impl("index_scores", sgl_kernel::index_scores);
  m.impl("index_scores_served", sgl_kernel::index_scores_served);
  m.impl("topk_slots", sgl_kernel::topk_slots);
  m.impl("metadata_replay_method", sgl_kernel::metadata_replay_method);
  m.impl("replay_copy_method", sgl_kernel::replay_copy_method);
}

// What is called once a step is registered for the key that a plan, a tensor on the CPU, is dispatched to first: else
// torch's fallback of that key stands in between.
STABLE_TORCH_LIBRARY_IMPL(SGL_KERNEL_NAMESPACE, AutogradCPU, m) {
  m.impl("paged_mqa_schedule_run", sgl_kernel::paged_mqa_schedule_run);
}

namespace sgl_kernel {

void abi_version(StableIValue* stack, uint64_t, uint64_t) { stack[0] = torch::stable::detail::from(kAbiVersion); }

}  // namespace sgl_kernel
