"""Speculative decoding with the model's NextN (MTP) layer: draft S tokens, verify D = S + 1, extend.

The NextN layer's key at position p is made of the target's hidden state at p and the token at p + 1, so
its output at p predicts the token at p + 2. Between steps a request keeps its first draft, which the
draft-extend (or the prefill) has already made, and the hidden state that the next draft starts from.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from sglang.srt.layers.attention.nsa.metadata import MetadataMode
from sglang.srt.layers.attention.nsa_backend import NativeSparseAttnMultiStepBackend
from sglang.srt.layers.logprobs import token_logprobs
from sglang.srt.managers.schedule_batch import Req, StepOutput
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.graph_runner import StepInputs
from sglang.srt.model_executor.metadata_report import metadata_state
from sglang.srt.model_executor.model_runner import ExtendBatch
from sglang.srt.model_executor.step_function import StepFunction, StepMetadata
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.eagle_info import count_accepted

# Of requests about which nothing is known. Filters and penalties are left to the target, which has the last
# word.
DRAFT_SAMPLING = SamplingBatchInfo(all_greedy=False, needs_filter=False, changes_logits=False)


class EAGLEWorker(TpModelWorker):
    """Target and NextN layer; a decode step makes 1 .. D tokens a request."""

    def __init__(self, server_args: ServerArgs, config: ModelConfig) -> None:
        self.num_draft_tokens: int = server_args.speculative_num_draft_tokens  # D
        self.lookahead = self.num_draft_tokens
        self.verified_requests = 0
        self.accepted_tokens = 0
        super().__init__(server_args, config)

    @torch.inference_mode()
    def decode(self, reqs: list[Req]) -> StepOutput:
        """Draft, verify and draft-extend, all launched before anything is read back."""
        step, max_len = self._load_step(reqs), self._max_len(reqs)
        step.draft_tokens.copy_(self.draft_step.run(step, max_len))
        logits, hidden_states = self.verify_step.run(step, max_len)
        step.hidden_states.copy_(hidden_states)
        self._accept(step, logits)
        self.extend_step.run(step, max_len)
        return self._decode_output(len(reqs), step, logits)

    def internal_state(self) -> dict[str, Any]:
        accept_length = self.accepted_tokens / self.verified_requests if self.verified_requests else None
        drafts = self.num_draft_tokens - 1  # proposed for each verification
        return {
            "avg_spec_accept_length": accept_length,
            "avg_spec_accept_rate": None if accept_length is None else (accept_length - 1) / drafts,
            "nsa_metadata": metadata_state(
                self.nsa_config.selection, self.step_functions, len(self.draft_backend.attn_backends)
            ),
        }

    # ---- construction

    def _init_speculation(self, nextn: torch.nn.Module | None) -> None:
        self.nextn = self._runner(nextn, layers=1)
        self.draft_backend = NativeSparseAttnMultiStepBackend(self.nsa_config, self.num_draft_tokens - 2)

    @cached_property
    def step_functions(self) -> tuple[StepFunction, ...]:
        return self.draft_step, self.verify_step, self.extend_step

    @cached_property
    def draft_step(self) -> StepFunction[torch.Tensor]:
        metadata = StepMetadata(MetadataMode.DECODE, 1, self.draft_backend.offsets)
        return StepFunction("draft", self._draft, self.draft_backend, metadata)

    @cached_property
    def verify_step(self) -> StepFunction[tuple[torch.Tensor, torch.Tensor]]:
        metadata = StepMetadata(MetadataMode.TARGET_VERIFY, self.num_draft_tokens, offsets=(0,))
        return StepFunction("verify", self._verify, self.target.attn_backend, metadata)

    @cached_property
    def extend_step(self) -> StepFunction[None]:
        metadata = StepMetadata(MetadataMode.DRAFT_EXTEND, self.num_draft_tokens, offsets=(0,))
        return StepFunction("draft-extend", self._draft_extend, self.nextn.attn_backend, metadata)

    # ---- the three functions that are captured

    def _draft(self, step: StepInputs, eager: bool) -> torch.Tensor:
        """The S draft tokens [bs, S]: the one at hand and one more from each of the N draft steps."""
        pool, indices = self.req_to_token_pool, step.req_pool_indices.long()
        tokens = [pool.draft_token[indices]]
        hidden_states = pool.draft_hidden[indices].to(self.config.dtype)  # [bs, hidden]
        for i, backend in enumerate(self.draft_backend.attn_backends):
            positions = step.seq_lens.long() + i
            forward_batch = self.nextn.rows_batch(
                ForwardMode.DECODE,
                step.req_pool_indices,
                step.seq_lens,
                tokens[-1][:, None],
                positions[:, None],
                attn_backend=backend,
                hidden_states=hidden_states,
            )
            if eager and i == 0:
                self.draft_backend.init_forward_metadata(forward_batch)
            hidden_states = self.nextn.model.forward(forward_batch)
            tokens.append(self._draft_sample(hidden_states, positions + 2, indices, self._draft_sampling))
        return torch.stack(tokens, dim=1)

    def _verify(self, step: StepInputs, eager: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The target over the last token and its drafts: logits [bs * D, vocab], hidden [bs, D, hidden]."""
        last = self.req_to_token_pool.last_token[step.req_pool_indices.long()]
        tokens = torch.cat([last[:, None], step.draft_tokens], dim=1)  # [bs, D]
        forward_batch = self.target.rows_batch(
            ForwardMode.TARGET_VERIFY,
            step.req_pool_indices,
            step.seq_lens,
            tokens,
            self._draft_positions(step),
        )
        if eager:
            self.target.attn_backend.init_forward_metadata(forward_batch)
        hidden_states = self.target.model.forward(forward_batch)
        return self.target.model.compute_logits(hidden_states), hidden_states.view(*tokens.shape, -1)

    def _draft_extend(self, step: StepInputs, eager: bool) -> None:
        """The NextN layer over the accepted tokens: its keys, and each request's next first draft."""
        forward_batch = self.nextn.rows_batch(
            ForwardMode.DRAFT_EXTEND,
            step.req_pool_indices,
            step.extend_seq_lens,
            step.next_tokens,
            self._draft_positions(step),
            hidden_states=step.hidden_states.flatten(0, 1),
            accept_lens=step.accept_lens,
        )
        if eager:
            self.nextn.attn_backend.init_forward_metadata(forward_batch)
        hidden_states = self.nextn.model.forward(forward_batch).view(step.hidden_states.shape)
        last = (step.accept_lens.long() - 1).clamp(min=0)  # a padded request has accepted nothing
        rows = torch.arange(step.bs, device=self.device)
        self._keep_draft(
            hidden_states[rows, last], step.req_pool_indices, step.extend_seq_lens, self._draft_sampling
        )

    # ---- parts of a step

    def _draft_positions(self, step: StepInputs) -> torch.Tensor:  # [bs, D], int64
        return step.seq_lens.long()[:, None] + torch.arange(self.num_draft_tokens, device=self.device)

    @property
    def _draft_sampling(self) -> SamplingBatchInfo:
        """A captured draft runs for requests that come later; elsewhere greedy ones are spared the noise."""
        if self.device.type == "cuda":
            return DRAFT_SAMPLING
        return replace(DRAFT_SAMPLING, all_greedy=self.batch.sampling.all_greedy)

    def _draft_sample(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        indices: torch.Tensor,
        sampling: SamplingBatchInfo,
    ) -> torch.Tensor:
        """Draft tokens [bs] for `positions` [bs], with the noise that the target will sample them with: a
        sampled request's drafts then agree more often."""
        logits = self.nextn.model.compute_logits(hidden_states)
        return self.sampler(logits, positions[:, None], indices, sampling)[:, 0]

    def _keep_draft(
        self,
        hidden_states: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        sampling: SamplingBatchInfo,
    ) -> None:
        """Stores what the next step's draft starts from: the output [bs, hidden] at position seq_len - 1."""
        pool, indices = self.req_to_token_pool, req_pool_indices.long()
        tokens = self._draft_sample(hidden_states, seq_lens.long() + 1, indices, sampling)
        pool.draft_token.index_copy_(0, indices, tokens)
        pool.draft_hidden.index_copy_(0, indices, hidden_states.float())

    def _accept(self, step: StepInputs, logits: torch.Tensor) -> None:
        """Samples the target's tokens, counts the right drafts and advances the requests."""
        positions = self._draft_positions(step) + 1
        sampling = self.batch.sampling
        step.next_tokens.copy_(
            self.sampler(logits, positions, step.req_pool_indices, sampling, step.draft_tokens)
        )
        real = step.req_pool_indices > 0
        step.accept_lens.copy_(count_accepted(step.draft_tokens, step.next_tokens) * real)
        torch.add(step.seq_lens, step.accept_lens, out=step.extend_seq_lens)
        pool, indices = self.req_to_token_pool, step.req_pool_indices.long()
        last = (step.accept_lens.long() - 1).clamp(min=0)
        pool.last_token.index_copy_(0, indices, step.next_tokens.gather(1, last[:, None])[:, 0])
        pool.seq_lens.index_copy_(0, indices, step.extend_seq_lens)
        if sampling.changes_logits:
            pool.penalties.add_outputs(indices, step.next_tokens, step.accept_lens)

    def _decode_output(self, n: int, step: StepInputs, logits: torch.Tensor) -> StepOutput:
        rows = torch.cat([step.next_tokens[:n], step.accept_lens[:n, None]], dim=1).tolist()  # the one sync
        tokens = [row[: row[-1]] for row in rows]
        self.verified_requests += n
        self.accepted_tokens += sum(row[-1] for row in rows)
        if self.batch.top_logprobs is None:
            return StepOutput(tokens)
        all_rows = token_logprobs(
            logits[: n * self.num_draft_tokens], step.next_tokens[:n].flatten(), self.batch.top_logprobs
        )
        starts = range(0, len(all_rows), self.num_draft_tokens)
        return StepOutput(tokens, [all_rows[at : at + len(t)] for at, t in zip(starts, tokens)])

    def _after_prefill(
        self,
        extend: ExtendBatch,
        input_ids: torch.Tensor,
        next_tokens: torch.Tensor,
        hidden_states: torch.Tensor,
        last_rows: torch.Tensor,
    ) -> None:
        """The NextN layer over the same rows, each with the token after it."""
        following = input_ids.roll(-1)
        following[last_rows] = next_tokens
        outputs = self.nextn.extend(extend, following, hidden_states)
        self._keep_draft(outputs[last_rows], extend.req_pool_indices, extend.seq_lens, DRAFT_SAMPLING)
