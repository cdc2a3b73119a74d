"""Runs the model for the scheduler: prefill and plain decode; speculation builds on it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sglang.srt.environ import envs
from sglang.srt.layers.attention.nsa.dims import AttentionDims
from sglang.srt.layers.attention.nsa.metadata import MetadataMode
from sglang.srt.layers.attention.nsa.paths import GraphMetadata, MetadataSelection
from sglang.srt.layers.attention.nsa_backend import NativeSparseAttnBackend, NSAConfig
from sglang.srt.layers.attention.registry import select_attention_ops
from sglang.srt.layers.logprobs import token_logprobs
from sglang.srt.layers.sampler import sample
from sglang.srt.layers.sampler_flashinfer import select_keep_mask
from sglang.srt.managers.schedule_batch import PrefillChunk, Req, StepOutput
from sglang.srt.mem_cache.fp8_kv_pool import kv_pool_class
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.graph_runner import StepInputs, capture_batch_sizes
from sglang.srt.model_executor.model_runner import ExtendBatch, ModelRunner
from sglang.srt.model_executor.step_function import StepFunction, StepMetadata
from sglang.srt.model_loader import load_model
from sglang.srt.sampling.token_logprob import TokenLogprob
from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

_DEFAULT_CPU_TOKENS = 65536


@dataclass(frozen=True)
class DecodeBatch:
    """The running requests, as the worker sees them until their membership changes."""

    members: list[tuple[Req, int | None]]  # each with its row of the request pool
    indices: torch.Tensor  # [n], int32: rows of the request pool
    promises: dict[str, bool]  # to the sampler
    top_logprobs: int | None  # None: nobody asked for logprobs

    @classmethod
    def create(cls, reqs: list[Req], device: torch.device) -> DecodeBatch:
        params = [req.sampling_params for req in reqs]
        wanted = [req.top_logprobs_num for req in reqs if req.return_logprob]
        return cls(
            members=[(req, req.req_pool_idx) for req in reqs],
            indices=torch.tensor([req.req_pool_idx for req in reqs], dtype=torch.int32, device=device),
            promises={
                "all_greedy": all(p.temperature == 0 for p in params),
                "needs_filter": any(p.top_p < 1 or p.top_k > 0 or p.min_p > 0 for p in params),
            },
            top_logprobs=max(wanted) if wanted else None,
        )


class TpModelWorker:
    """The target model: one token a request and step."""

    lookahead = 1

    def __init__(self, server_args: ServerArgs, config: ModelConfig) -> None:
        self.server_args = server_args
        self.config = config
        self.device = torch.device(server_args.device)
        self.context_len = config.context_len
        self.vocab_size = config.vocab_size
        self.eos_token_ids = frozenset(config.eos_token_ids)
        self.page_size = server_args.page_size
        self.kv_pool_class = kv_pool_class(server_args)
        self.keep_mask = select_keep_mask(server_args.sampling_backend, self.device)
        target, nextn = load_model(
            config,
            server_args.load_format,
            with_nextn=server_args.speculative_algorithm is not None,
            seed=server_args.random_seed,
        )
        self.num_pages = self._num_pages()
        pages_wide = -(-(self.context_len + self.lookahead) // self.page_size)
        self.req_to_token_pool = ReqToTokenPool(
            server_args.max_running_requests, pages_wide * self.page_size, config.hidden_size, self.device
        )
        self.nsa_config = self._nsa_config()
        self.target = self._runner(target, config.num_hidden_layers)
        self.batch: DecodeBatch | None = None
        self._init_speculation(nextn)
        self.step_inputs = self._create_inputs(server_args.cuda_graph_max_bs)
        self._capture()

    # ---- the scheduler's interface

    @torch.inference_mode()
    def prefill(self, chunks: list[PrefillChunk]) -> StepOutput:
        """One eager pass over the chunks; samples where a chunk ends its prompt."""
        lens = [len(chunk.tokens) for chunk in chunks]
        indices = [chunk.req.req_pool_idx for chunk in chunks]
        extend = ExtendBatch.create(
            self.req_to_token_pool, indices, [chunk.req.kv_len for chunk in chunks], lens
        )
        input_ids = torch.tensor([t for chunk in chunks for t in chunk.tokens], device=self.device)
        hidden_states = self.target.extend(extend, input_ids)  # [T, hidden]

        last_rows = torch.tensor(lens, device=self.device).cumsum(0) - 1  # [bs]
        logits = self.target.model.compute_logits(hidden_states[last_rows])
        batch = DecodeBatch.create([chunk.req for chunk in chunks], self.device)
        positions = extend.seq_lens.long()[:, None]
        sampled = self._sample(logits, positions, extend.req_pool_indices, **batch.promises)[:, 0]

        known = torch.tensor(
            [-1 if c.next_token is None else c.next_token for c in chunks], device=self.device
        )
        next_tokens = torch.where(known < 0, sampled, known)  # [bs]
        pool = self.req_to_token_pool
        pool.seq_lens[extend.req_pool_indices] = extend.seq_lens
        pool.last_token[extend.req_pool_indices] = next_tokens
        self._after_prefill(extend, input_ids, next_tokens, hidden_states, last_rows)
        return self._prefill_output(chunks, batch, hidden_states, logits, sampled)

    @torch.inference_mode()
    def decode(self, reqs: list[Req]) -> StepOutput:
        """One token of every request."""
        step, captured = self._load_step(reqs)
        logits = self._run(self.decode_step, step, captured, self._max_len(reqs))  # [bs, vocab]
        positions = step.seq_lens.long()[:, None] + 1
        tokens = self._sample(logits, positions, step.req_pool_indices, **self.batch.promises)[:, 0]
        pool, indices = self.req_to_token_pool, step.req_pool_indices.long()
        pool.seq_lens.index_copy_(0, indices, step.seq_lens + (indices > 0))
        pool.last_token.index_copy_(0, indices, tokens)
        n = len(reqs)
        logprobs = None
        if self.batch.top_logprobs is not None:
            logprobs = [[t] for t in token_logprobs(logits[:n], tokens[:n], self.batch.top_logprobs)]
        return StepOutput([[token] for token in tokens[:n].tolist()], logprobs)

    def internal_state(self) -> dict[str, Any]:
        return {"avg_spec_accept_length": None, "nsa_metadata": self._metadata_state()}

    # ---- construction

    def _num_pages(self) -> int:
        tokens = self.server_args.max_total_tokens
        if tokens is None and self.device.type == "cpu":
            tokens = _DEFAULT_CPU_TOKENS
        if tokens is None:
            free, total = torch.cuda.mem_get_info(self.device)
            budget = free - total * (1 - self.server_args.mem_fraction_static)
            tokens = int(budget // self._bytes_per_token())
            # More than every request at full length is never used.
            tokens = min(tokens, self.server_args.max_running_requests * (self.context_len + self.lookahead))
        pages = tokens // self.page_size
        if pages < 1:
            raise ValueError(f"no memory for a single page: {tokens} tokens, page size {self.page_size}")
        return pages

    def _bytes_per_token(self) -> int:
        config = self.config
        kv_width, kv_dtype = self.kv_pool_class.kv_format(
            config.kv_lora_rank, config.qk_rope_head_dim, config.dtype
        )
        per_layer = kv_width * kv_dtype.itemsize + config.index_head_dim * config.dtype.itemsize
        return per_layer * (config.num_hidden_layers + config.num_nextn_predict_layers)

    def _nsa_config(self) -> NSAConfig:
        args = self.server_args
        selection = MetadataSelection(
            enabled=envs.SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA.get(),
            layout=args.nsa_metadata_layout,
            copy=args.nsa_metadata_copy,
            draft_seqlens=args.nsa_draft_seqlens,
            check_replays=envs.SGLANG_NSA_VERIFY_METADATA.get(),
        )
        dims = AttentionDims.of(self.config)
        return NSAConfig(
            topk=self.config.index_topk,
            page_size=self.page_size,
            width=self.req_to_token_pool.max_context_len,
            device=self.device,
            selection=selection,
            prefill_ops=select_attention_ops(args.nsa_prefill_backend, self.device, "prefill", dims),
            decode_ops=select_attention_ops(args.nsa_decode_backend, self.device, "decode", dims),
        )

    def _runner(self, model: torch.nn.Module, layers: int) -> ModelRunner:
        config = self.config
        kv_pool = self.kv_pool_class(
            self.num_pages,
            self.page_size,
            layers,
            config.kv_lora_rank,
            config.qk_rope_head_dim,
            config.index_head_dim,
            config.dtype,
            self.device,
        )
        return ModelRunner(model, kv_pool, self.req_to_token_pool, NativeSparseAttnBackend(self.nsa_config))

    def _init_speculation(self, nextn: torch.nn.Module | None) -> None:
        """A hook of the speculative worker's."""

    def _create_inputs(self, bs: int) -> StepInputs:
        return StepInputs.create(bs, self.lookahead, self.config.hidden_size, self.config.dtype, self.device)

    @cached_property
    def step_functions(self) -> tuple[StepFunction, ...]:
        """All functions that a decode step runs."""
        return (self.decode_step,)

    @cached_property
    def decode_step(self) -> StepFunction[torch.Tensor]:
        metadata = StepMetadata(MetadataMode.DECODE, 1, offsets=(1,))
        return StepFunction("decode", self._decode, self.target.attn_backend, metadata)

    @torch.inference_mode()
    def _capture(self) -> None:
        self.batch_sizes: list[int] = []
        if self.server_args.disable_cuda_graph:
            return
        self.batch_sizes = capture_batch_sizes(self.step_inputs.bs)
        for function in self.step_functions:
            function.capture(self.step_inputs, self.req_to_token_pool, self.batch_sizes)
        self._log_metadata_path()

    def _log_metadata_path(self) -> None:
        for function in self.step_functions:
            graph = function.backend.graph_metadata
            held, separate = graph.table_bytes
            saving = "" if held == separate else f" instead of {separate / 2**20:.1f} MiB"
            logger.info(
                "NSA metadata of %s: path %s, %s, %d backend(s), page tables: %.1f MiB%s",
                function.name,
                graph.selection.path,
                graph.methods.copy,
                len(graph.offsets),
                held / 2**20,
                saving,
            )

    # ---- a step

    def _decode(self, step: StepInputs, eager: bool) -> torch.Tensor:
        """The captured function: logits [bs, vocab] of each request's last token."""
        pool = self.req_to_token_pool
        tokens = pool.last_token[step.req_pool_indices.long()]
        forward_batch = self.target.rows_batch(
            ForwardMode.DECODE,
            step.req_pool_indices,
            step.seq_lens + 1,
            tokens[:, None],
            step.seq_lens.long()[:, None],
        )
        if eager:
            self.target.attn_backend.init_forward_metadata(forward_batch)
        return self.target.model.compute_logits(self.target.model.forward(forward_batch))

    def _load_step(self, reqs: list[Req]) -> tuple[StepInputs, bool]:
        """The step's inputs, loaded: the static ones of a captured size, or fresh ones where none fits."""
        if self.batch is None or self.batch.members != [(req, req.req_pool_idx) for req in reqs]:
            self.batch = DecodeBatch.create(reqs, self.device)
        captured = bool(self.batch_sizes) and len(reqs) <= self.batch_sizes[-1]
        if captured:
            bs = next(size for size in self.batch_sizes if size >= len(reqs))
            step = self.step_inputs.view(bs)
        else:
            step = self._create_inputs(len(reqs))
        step.set_batch(self.batch.indices, self.req_to_token_pool)
        return step, captured

    @staticmethod
    def _run(function: StepFunction, step: StepInputs, captured: bool, max_len: int) -> Any:
        return function.replay(step.bs, max_len) if captured else function.eager(step)

    def _max_len(self, reqs: list[Req]) -> int:
        """A bound of all row lengths of the step, from the host's own count."""
        return max(req.kv_len for req in reqs) + self.lookahead

    def _sample(
        self,
        logits: torch.Tensor,  # [bs * rows, vocab], float32
        positions: torch.Tensor,  # [bs, rows], int64: of the tokens to sample
        indices: torch.Tensor,  # [bs]: rows of the request pool
        *,
        all_greedy: bool,
        needs_filter: bool,
    ) -> torch.Tensor:  # [bs, rows], int64
        """Samples each request's rows; the host promises what it knows of all requests."""
        if all_greedy:
            return logits.argmax(dim=-1).view(positions.shape)
        requests = indices.long()[:, None].expand(positions.shape).reshape(-1)
        params = self.req_to_token_pool.sampling_params(requests)
        tokens = sample(
            logits, positions.reshape(-1), *params, needs_filter=needs_filter, keep=self.keep_mask
        )
        return tokens.view(positions.shape)

    # ---- prefill

    def _after_prefill(
        self,
        extend: ExtendBatch,
        input_ids: torch.Tensor,
        next_tokens: torch.Tensor,
        hidden_states: torch.Tensor,
        last_rows: torch.Tensor,
    ) -> None:
        """A hook of the speculative worker's."""

    def _prefill_output(
        self,
        chunks: list[PrefillChunk],
        batch: DecodeBatch,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        sampled: torch.Tensor,
    ) -> StepOutput:
        ends = [chunk.next_token is None for chunk in chunks]
        tokens = [[token] if end else [] for token, end in zip(sampled.tolist(), ends)]
        if batch.top_logprobs is None:
            return StepOutput(tokens)
        of_sampled = token_logprobs(logits, sampled, batch.top_logprobs)
        logprobs = [[logprob] if end else [] for logprob, end in zip(of_sampled, ends)]
        rows = hidden_states.split([len(chunk.tokens) for chunk in chunks])
        prompt = [self._prompt_logprobs(chunk, chunk_rows) for chunk, chunk_rows in zip(chunks, rows)]
        return StepOutput(tokens, logprobs, prompt)

    def _prompt_logprobs(self, chunk: PrefillChunk, hidden_states: torch.Tensor) -> list[TokenLogprob]:
        """Of the prompt tokens that the chunk's rows predict; the prompt's first token comes without."""
        req = chunk.req
        if req.logprob_start_len < 0:
            return []
        targets = chunk.tokens[1:] + ([] if chunk.next_token is None else [chunk.next_token])
        first = [TokenLogprob(chunk.tokens[0], None, [])] if req.kv_len == 0 else []
        if not targets:
            return first
        logits = self.target.model.compute_logits(hidden_states[: len(targets)])
        return first + token_logprobs(logits, torch.tensor(targets, device=self.device), req.top_logprobs_num)

    def _metadata_state(self) -> dict[str, Any]:
        graphs = [f.backend.graph_metadata for f in self.step_functions]
        return metadata_state(self.nsa_config.selection, [g for g in graphs if g is not None], 0)


def metadata_state(
    selection: MetadataSelection, graphs: list[GraphMetadata], draft_backends: int
) -> dict[str, Any]:
    """`nsa_metadata` of /get_server_info."""
    reasons = [g.fallback_reason for g in graphs if g.fallback_reason]
    return {
        "enabled": selection.enabled,
        "layout": selection.path,
        "copy": graphs[0].methods.copy if graphs else None,
        "draft_backends": draft_backends,
        "draft_seqlens": selection.draft_seqlens,
        "replays": sum(g.replays for g in graphs),
        "fallbacks": sum(g.fallbacks for g in graphs),
        "fallback_reason": reasons[0] if reasons else None,
        "verify": selection.check_replays,
    }
