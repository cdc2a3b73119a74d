"""Flags of SGLang's that have one sensible value here: command lines written for it start this server.

A flag asks either for what this server does anyway, then every value is taken, or for what it does not do,
then its choices are the values that do not ask for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.arguments import group

SEVERAL_GPUS = "this server runs on one GPU; for several, use the plugin in SGLang"
CHECKPOINT = "the checkpoint decides"
NOT_HERE = "use SGLang, with the plugin for the metadata"

always = group("accepted from SGLang's command lines; what they ask for is so anyway")
never = group("accepted from SGLang's command lines with the values shown")


@dataclass(frozen=True, kw_only=True)
class SGLangArgs:
    """Nothing reads these fields but /server_info."""

    trust_remote_code: bool = always(False, "no code of a checkpoint is run")
    enable_metrics: bool = always(False, "/metrics is always there")
    enable_cache_report: bool = always(False, "`usage` always has the cached tokens")
    enable_deterministic_inference: bool = always(False, "a token depends on the seed and its position alone")
    disable_custom_all_reduce: bool = always(False, "there is one GPU")
    disable_shared_experts_fusion: bool = always(False, "shared experts are not fused")
    disable_flashinfer_autotune: bool = always(False, "nothing is tuned at start")
    enable_p2p_check: bool = always(False, "there is one GPU")
    sleep_on_idle: bool = always(False, "an idle scheduler waits for a message")
    schedule_conservativeness: float = always(1.0, "a request is admitted while a page is left for each one")
    watchdog_timeout: float = always(300.0, "seconds; /health says when the scheduler hangs")
    decode_log_interval: int = always(40, "the log has a line every two seconds of decoding")
    download_dir: str | None = always(None, "nothing is downloaded")
    weight_version: str = always("default", "reported by /model_info")

    tp_size: int = never(
        1, "tensor parallelism", (1,), ("--tensor-parallel-size", "--tp"), instead=SEVERAL_GPUS
    )
    dp_size: int = never(1, "data parallelism", (1,), ("--data-parallel-size", "--dp"), instead=SEVERAL_GPUS)
    pp_size: int = never(
        1, "pipeline parallelism", (1,), ("--pipeline-parallel-size", "--pp"), instead=SEVERAL_GPUS
    )
    ep_size: int = never(
        1, "expert parallelism", (1,), ("--expert-parallel-size", "--ep"), instead=SEVERAL_GPUS
    )
    attn_cp_size: int = never(1, "context parallelism", (1,), instead=SEVERAL_GPUS)
    moe_dp_size: int = never(1, "data parallelism of experts", (1,), instead=SEVERAL_GPUS)
    moe_dense_tp_size: int | None = never(
        None, "tensor parallelism of dense layers", (1,), instead=SEVERAL_GPUS
    )
    nnodes: int = never(1, "machines", (1,), instead=SEVERAL_GPUS)
    node_rank: int = never(0, "this machine's number", (0,), instead=SEVERAL_GPUS)
    enable_dp_attention: bool = never(False, "data parallel attention", (False,), instead=SEVERAL_GPUS)
    enable_dp_lm_head: bool = never(False, "data parallel head", (False,), instead=SEVERAL_GPUS)
    enable_eplb: bool = never(False, "balancing of experts", (False,), instead=SEVERAL_GPUS)
    base_gpu_id: int = never(0, "first GPU", (0,), instead="choose the GPU with CUDA_VISIBLE_DEVICES")
    moe_a2a_backend: str = never("none", "exchange between experts", ("none",), instead=SEVERAL_GPUS)
    moe_runner_backend: str = never(
        "auto", "implementation of experts", ("auto",), instead="there is one implementation of experts"
    )
    disaggregation_mode: str = never("null", "prefill and decode apart", ("null",), instead=SEVERAL_GPUS)
    enable_two_batch_overlap: bool = never(False, "two batches at once", (False,), instead=SEVERAL_GPUS)

    tokenizer_mode: str = never("auto", "kind of tokenizer", ("auto",), instead=CHECKPOINT)
    skip_tokenizer_init: bool = never(
        False, "serve token ids alone", (False,), instead="requests may carry ids beside a tokenizer"
    )
    model_impl: str = never("auto", "implementation of the model", ("auto", "sglang"), instead=NOT_HERE)
    revision: str | None = never(
        None, "of a model on the hub", (), instead="--model-path is a directory, which has one revision"
    )
    quantization: str | None = never(None, "quantize the weights", (), instead=NOT_HERE)
    is_embedding: bool = never(False, "serve embeddings", (False,), instead=NOT_HERE)
    json_model_override_args: str = never(
        "{}", "change the checkpoint's config", ("{}",), instead="edit config.json of --model-path"
    )
    chat_template: str | None = never(
        None, "another chat template", (), instead="the tokenizer's is used: put it into --tokenizer-path"
    )
    reasoning_parser: str | None = never(
        None, "take the reasoning out of an answer", (), instead="answers are returned whole"
    )
    tool_call_parser: str | None = never(
        None, "take tool calls out of an answer", (), instead="answers are returned whole"
    )
    enable_lora: bool = never(False, "adapters", (False,), instead=NOT_HERE)
    schedule_policy: str = never("fcfs", "order of waiting requests", ("fcfs",), instead="they run in order")
    enable_priority_scheduling: bool = never(False, "priorities", (False,), instead="requests run in order")
    max_prefill_tokens: int = never(
        16384, "tokens of one prefill", (16384,), instead="bound it with --chunked-prefill-size"
    )
    num_continuous_decode_steps: int = never(1, "steps of decode at once", (1,), instead="each step is one")
    stream_interval: int = never(1, "steps between events of a stream", (1,), instead="each step has one")
    radix_eviction_policy: str = never("lru", "what leaves the cache first", ("lru",), instead="least used")
    enable_hierarchical_cache: bool = never(False, "a cache on the host", (False,), instead=NOT_HERE)
    cpu_offload_gb: int = never(0, "weights on the host", (0,), instead=NOT_HERE)
    enable_torch_compile: bool = never(
        False, "compile the model", (False,), instead="decode steps run as captured graphs"
    )
    allow_auto_truncate: bool = never(
        False, "cut long prompts", (False,), instead="a prompt that is too long is refused"
    )
    log_requests: bool = never(False, "log prompts", (False,), instead="prompts are never logged")
    grammar_backend: str = never("none", "constrained decoding", ("none",), instead=NOT_HERE)
    sampling_defaults: str = never(
        "openai", "defaults of sampling", ("openai",), instead="generation_config.json is not read"
    )
    speculative_accept_threshold_single: float = never(
        1.0, "accept unlikely drafts", (1.0,), instead="drafts are verified exactly"
    )
    speculative_accept_threshold_acc: float = never(
        1.0, "accept unlikely drafts", (1.0,), instead="drafts are verified exactly"
    )
    speculative_attention_mode: str = never(
        "prefill", "attention of the verification", ("prefill",), instead="there is one kind"
    )
