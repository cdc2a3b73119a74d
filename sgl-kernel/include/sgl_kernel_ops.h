// The operators, as torch's stable ABI calls them: a stack of StableIValue in, the results in its first
// places out. csrc/common_extension.cc registers them; the schemas stand there. Errors are
// std::runtime_error.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>

namespace sgl_kernel {

// Raised whenever an operator's schema or a plan's layout changes; Python refuses a library with another
// number.
constexpr int64_t kAbiVersion = 11;

using BoxedOperator = void(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);

void abi_version(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);

// Of every planned operator: ..._plan makes the plan, ..._run runs it, and ..._once does both, with all that is written
// marked in its schema, for compilers.

// Regions from one source set into N destination sets.
BoxedOperator fused_metadata_copy_plan;
BoxedOperator fused_metadata_copy_run;
BoxedOperator fused_metadata_copy_once;

// SGLang's signatures: one destination with any mode; three destinations in DECODE.
BoxedOperator fused_metadata_copy;
BoxedOperator fused_metadata_copy_multi;
std::string fused_metadata_copy_schema();
std::string fused_metadata_copy_multi_schema();

// Sources that are new at every step into a captured graph's inputs: any fields, and mini-sglang's six.
// A run is an operator for each number of sources, since a list of tensors costs twice what as many arguments do.
constexpr int kMaxReplayFields = 12;
BoxedOperator replay_copy_plan;
BoxedOperator replay_copy_run;
std::string replay_copy_run_name(int num_sources);
std::string replay_copy_run_schema(int num_sources);
BoxedOperator replay_copy_once;
BoxedOperator replay_copy_method;  // a run as a Python builtin: the address of its definition
BoxedOperator fused_copy_replay_data;
std::string fused_copy_replay_data_schema();

// seq_lens, req_pool_indices, req_to_token -> all fields of N destinations.
BoxedOperator nsa_metadata_generate_plan;
BoxedOperator nsa_metadata_generate_run;
BoxedOperator nsa_metadata_generate_once;

// The last token of every request, its position and its slot.
BoxedOperator decode_inputs_plan;
BoxedOperator decode_inputs_run;
BoxedOperator decode_inputs_once;

// Lengths -> DeepGEMM's schedule of paged MQA logits, any number of them.
BoxedOperator paged_mqa_schedule_plan;
BoxedOperator paged_mqa_schedule_run;
BoxedOperator paged_mqa_schedule_once;

// The lightning indexer's scores, and whether a device has them.
BoxedOperator index_scores;
BoxedOperator index_scores_served;

// The slots of each row's highest scores.
BoxedOperator topk_slots;

// A generation, a copy, or both, as a Python builtin: the address of its definition.
BoxedOperator metadata_replay_method;

}  // namespace sgl_kernel
