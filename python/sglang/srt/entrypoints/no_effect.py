"""Parameters of OpenAI's and SGLang's requests that this server takes and does not act on.

A table names each of them with the values that ask for nothing here; null, false and whatever is empty ask
for nothing in all of them, and so does a list (one value for each prompt) of such values. Any other value
is refused by name. The tables follow openai 2 and SGLang 0.5.9 to 0.5.12.
"""

from __future__ import annotations

from typing import Any

Values = tuple[Any, ...] | None
AnyValue: Values = None  # the parameter never changes what is generated

NOTHING = (None, False, "", [], {})

# What the sampler does not do, by SGLang's names for it. Both APIs spell these alike.
SAMPLING: dict[str, Values] = {
    "stop_regex": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "custom_params": (),
}

# What both of SGLang's APIs take beside the sampling parameters.
SGLANG: dict[str, Values] = {
    "lora_path": (),
    "session_params": (),
    "custom_logit_processor": (),
    "return_hidden_states": (),
    "return_routed_experts": (),
    "routed_experts_start_len": (0,),
    "use_audio_in_video": (),
    "max_dynamic_patch": (),
    "min_dynamic_patch": (),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "routed_dp_rank": (0,),  # of one
    "data_parallel_rank": (0,),
    "disagg_prefill_dp_rank": (),
    "extra_key": (),
    "priority": (0,),
    "custom_labels": (),
}

GENERATE: dict[str, Values] = SGLANG | {
    "input_embeds": (),
    "image_data": (),
    "video_data": (),
    "audio_data": (),
    "modalities": (),
    "token_ids_logprob": (),
    "return_indexer_topk": (),
    "return_bytes": (),
    "return_entropy": (),
    "lora_id": (),
    "positional_embed_overrides": (),
    "multi_item_delimiter_indices": (),
    "image_max_dynamic_patch": (),
    "video_max_dynamic_patch": (),
    "bootstrap_pair_key": (),
    "decode_tp_size": (1,),
    "require_reasoning": (),
    "background": (),
    "need_wait_for_image": (),
    "need_wait_for_mm_inputs": (),
    "num_items_assigned": (),
    "http_worker_ipc": (),
    "log_metrics": AnyValue,
    "no_logs": AnyValue,  # a prompt is never logged
    "conversation_id": AnyValue,
    "routing_key": AnyValue,
    "external_trace_header": AnyValue,
    "received_time": AnyValue,
}

GENERATE_SAMPLING: dict[str, Values] = SAMPLING | {
    "structural_tag": (),
    "stream_interval": (1,),
    "spaces_between_special_tokens": AnyValue,  # only tokenizers without a fast implementation heed it
}

OPENAI: dict[str, Values] = (
    SAMPLING
    | SGLANG
    | {
        "response_format": ({"type": "text"},),
        "return_cached_tokens_details": (),
        "cache_salt": (),
        "user": AnyValue,
    }
)

COMPLETION: dict[str, Values] = OPENAI | {"suffix": ()}

CHAT: dict[str, Values] = OPENAI | {
    "tools": (),
    "tool_choice": ("none", "auto"),
    "functions": (),
    "function_call": ("none", "auto"),
    "modalities": ("text",),
    "audio": (),
    "prediction": (),
    "moderation": (),
    "reasoning_effort": ("none", "medium"),
    "verbosity": (),
    "web_search_options": (),
    "store": (),
    "task": (),
    "continue_final_message": (),
    "chat_template_kwargs": (),
    "service_tier": ("auto", "default"),
    "separate_reasoning": AnyValue,  # there is no reasoning to tell apart
    "stream_reasoning": AnyValue,
    "parallel_tool_calls": AnyValue,
    "metadata": AnyValue,
    "safety_identifier": AnyValue,
    "prompt_cache_key": AnyValue,
    "prompt_cache_options": AnyValue,
    "prompt_cache_retention": AnyValue,
}

# Of a message that a client sends back as it came.
MESSAGE: dict[str, Values] = {
    "refusal": (),
    "annotations": (),
    "audio": (),
    "function_call": (),
    "tool_calls": (),
    "tools": (),
    "tool_call_id": (),
    "reasoning_content": (),
}

TOKENIZE: dict[str, Values] = {
    "tools": (),
    "tool_choice": ("none", "auto"),
    "reasoning_effort": ("none", "medium"),
    "continue_final_message": (),
    "chat_template_kwargs": (),
}

SCORE: dict[str, Values] = {
    "embed_override_token_id": (),
    "query_embed_overrides": (),
    "item_embed_overrides": (),
    "return_pooled_hidden_states": (),
}

STREAM_OPTIONS: dict[str, Values] = {"include_obfuscation": ()}


def asks_for_nothing(value: Any, values: Values) -> bool:
    if values is AnyValue:
        return True
    if any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in NOTHING):
        return True
    if isinstance(value, list):
        return all(asks_for_nothing(one, values) for one in value)
    return not isinstance(value, bool) and value in values
