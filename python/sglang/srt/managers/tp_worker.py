"""Runs the model for the scheduler: prefill and plain decode; speculation builds on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sglang.srt.layers.attention.nsa.metadata import MetadataMode
from sglang.srt.layers.attention.nsa_backend import NativeSparseAttnBackend
from sglang.srt.layers.logprobs import hidden_logprobs, token_logprobs
from sglang.srt.layers.request_sampler import RequestSampler
from sglang.srt.managers.schedule_batch import PrefillChunk, Req, StepOutput
from sglang.srt.mem_cache.fp8_kv_pool import kv_pool_class
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.pool_size import num_pages
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.attention_config import attention_config
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.graph_runner import StepInputs
from sglang.srt.model_executor.metadata_report import log_metadata_paths, metadata_state
from sglang.srt.model_executor.model_runner import ExtendBatch, ModelRunner
from sglang.srt.model_executor.step_function import StepFunction, StepMetadata
from sglang.srt.model_executor.step_runner import StepRunner
from sglang.srt.model_loader import load_model
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.token_logprob import TokenLogprob
from sglang.srt.server_args import ServerArgs


@dataclass(frozen=True)
class DecodeBatch:
    """The running requests, as the worker sees them until their membership changes."""

    members: list[tuple[Req, int | None]]  # each with its row of the request pool
    indices: torch.Tensor  # [n], int32: rows of the request pool
    sampling: SamplingBatchInfo
    top_logprobs: int | None  # None: nobody asked for logprobs

    @classmethod
    def create(cls, reqs: list[Req], device: torch.device) -> DecodeBatch:
        wanted = [req.top_logprobs_num for req in reqs if req.return_logprob]
        return cls(
            members=[(req, req.req_pool_idx) for req in reqs],
            indices=torch.tensor([req.req_pool_idx for req in reqs], dtype=torch.int32, device=device),
            sampling=SamplingBatchInfo.of([req.sampling_params for req in reqs]),
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
        target, nextn = load_model(
            config,
            server_args.load_format,
            with_nextn=server_args.speculative_algorithm is not None,
            seed=server_args.random_seed,
        )
        self.num_pages = num_pages(server_args, config, self.kv_pool_class, self.lookahead, self.device)
        width = -(-(self.context_len + self.lookahead) // self.page_size) * self.page_size
        self.req_to_token_pool = ReqToTokenPool(
            server_args.max_running_requests,
            width,
            config.hidden_size,
            self.device,
            config.vocab_size,
            config.eos_token_ids,
        )
        self.sampler = RequestSampler(self.req_to_token_pool, server_args.sampling_backend, self.device)
        self.nsa_config = attention_config(server_args, config, width, self.device)
        self.target = self._runner(target, config.num_hidden_layers)
        self.batch: DecodeBatch | None = None
        self._init_speculation(nextn)
        self.steps = StepRunner(self.step_functions, self._create_inputs, self.req_to_token_pool)
        if not server_args.disable_cuda_graph:
            self.steps.capture(server_args.cuda_graph_max_bs)
            log_metadata_paths(self.step_functions)

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
        sampled = self.sampler(logits, positions, extend.req_pool_indices, batch.sampling)[:, 0]

        known = torch.tensor(
            [-1 if c.next_token is None else c.next_token for c in chunks], device=self.device
        )
        next_tokens = torch.where(known < 0, sampled, known)  # [bs]
        pool = self.req_to_token_pool
        pool.seq_lens[extend.req_pool_indices] = extend.seq_lens
        pool.last_token[extend.req_pool_indices] = next_tokens
        if batch.sampling.changes_logits:
            pool.penalties.add_outputs(extend.req_pool_indices, sampled[:, None], known < 0)
        self._after_prefill(extend, input_ids, next_tokens, hidden_states, last_rows)
        return self._prefill_output(chunks, batch, hidden_states, logits, sampled)

    @torch.inference_mode()
    def decode(self, reqs: list[Req]) -> StepOutput:
        """One token of every request."""
        step = self._load_step(reqs)
        logits = self.decode_step.run(step, self._max_len(reqs))  # [bs, vocab]
        positions = step.seq_lens.long()[:, None] + 1
        tokens = self.sampler(logits, positions, step.req_pool_indices, self.batch.sampling)[:, 0]
        pool, indices = self.req_to_token_pool, step.req_pool_indices.long()
        pool.seq_lens.index_copy_(0, indices, step.seq_lens + (indices > 0))
        pool.last_token.index_copy_(0, indices, tokens)
        if self.batch.sampling.changes_logits:
            pool.penalties.add_outputs(indices, tokens[:, None], torch.ones_like(indices))
        n = len(reqs)
        logprobs = None
        if self.batch.top_logprobs is not None:
            logprobs = [[t] for t in token_logprobs(logits[:n], tokens[:n], self.batch.top_logprobs)]
        return StepOutput([[token] for token in tokens[:n].tolist()], logprobs)

    def internal_state(self) -> dict[str, Any]:
        metadata = metadata_state(self.nsa_config.selection, self.step_functions, draft_backends=0)
        return {"avg_spec_accept_length": None, "nsa_metadata": metadata}

    # ---- construction

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

    def _load_step(self, reqs: list[Req]) -> StepInputs:
        if self.batch is None or self.batch.members != [(req, req.req_pool_idx) for req in reqs]:
            self.batch = DecodeBatch.create(reqs, self.device)
        if self.nsa_config.selection.check_replays:
            self._check_lengths(reqs)
        return self.steps.load(self.batch.indices)

    def _check_lengths(self, reqs: list[Req]) -> None:
        """Raises RuntimeError where host and device have counted differently: the host's count bounds the
        rows that a replay brings up to date."""
        lengths = self.req_to_token_pool.seq_lens[self.batch.indices].tolist()
        for req, length in zip(reqs, lengths):
            if req.kv_len != length:
                raise RuntimeError(
                    f"request {req.rid}: kv_len of the host is {req.kv_len}, seq_lens of the device {length}"
                )

    def _max_len(self, reqs: list[Req]) -> int:
        """A bound of all row lengths of the step, from the host's own count."""
        return max(req.kv_len for req in reqs) + self.lookahead

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
        token_ids = torch.tensor(targets, device=self.device)  # [len(targets)], int64
        logits_of, top = self.target.model.compute_logits, req.top_logprobs_num
        return first + hidden_logprobs(hidden_states[: len(targets)], logits_of, token_ids, top)
