"""Speculative decoding with the model's NextN (MTP) layer: draft S tokens, verify D = S + 1, extend.

The NextN layer's key at position p is made of the target's hidden state at p and the token at p + 1, so
its output at p predicts the token at p + 2. Between steps a request keeps its first draft, which the
draft-extend (or the prefill) has already made, and the hidden state that the next draft starts from.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch

from sglang.srt.layers.attention.nsa.metadata import MetadataMode
from sglang.srt.layers.attention.nsa_backend import NativeSparseAttnMultiStepBackend
from sglang.srt.managers.schedule_batch import StepOutput
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.graph_runner import StepInputs
from sglang.srt.model_executor.metadata_report import metadata_state
from sglang.srt.model_executor.model_runner import ExtendBatch
from sglang.srt.model_executor.step_function import StepFunction, StepMetadata
from sglang.srt.model_executor.step_graph import StepGraph
from sglang.srt.model_executor.step_rows import StepRows
from sglang.srt.sampling.sampling_batch_info import UNFILTERED, SamplingBatchInfo
from sglang.srt.server_args import ServerArgs


class EAGLEWorker(TpModelWorker):
    """Target and NextN layer; a decode step makes 1 .. D tokens a request."""

    def __init__(self, server_args: ServerArgs, config: ModelConfig) -> None:
        self.num_draft_tokens: int = server_args.speculative_num_draft_tokens  # D
        self.lookahead = self.num_draft_tokens
        self.verified_requests = 0
        self.accepted_tokens = 0
        super().__init__(server_args, config)

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
    def draft_step(self) -> StepFunction[None]:
        metadata = StepMetadata(MetadataMode.DECODE, 1, self.draft_backend.offsets)
        return StepFunction("draft", self._draft, self.draft_backend, metadata)

    @cached_property
    def verify_step(self) -> StepFunction[torch.Tensor]:
        metadata = StepMetadata(MetadataMode.TARGET_VERIFY, self.num_draft_tokens, offsets=(0,))
        return StepFunction("verify", self._verify, self.target.attn_backend, metadata)

    @cached_property
    def extend_step(self) -> StepFunction[None]:
        mode, rows = MetadataMode.DRAFT_EXTEND, self.num_draft_tokens
        metadata = StepMetadata(mode, rows, offsets=(0,), follows_step=True)
        return StepFunction("draft-extend", self._draft_extend, self.nextn.attn_backend, metadata)

    @cached_property
    def step_graphs(self) -> tuple[StepGraph, ...]:
        return (*super().step_graphs, self.extend_part)

    @cached_property
    def forward_part(self) -> StepGraph[torch.Tensor]:
        functions = (self.draft_step, self.verify_step)
        return StepGraph("draft and verify", functions, partial(self._forward, sampling=UNFILTERED))

    @cached_property
    def extend_part(self) -> StepGraph[None]:
        return StepGraph("draft-extend", (self.extend_step,), partial(self._after, sampling=UNFILTERED))

    # ---- a step

    def _forward(self, step: StepInputs, sampling: SamplingBatchInfo) -> torch.Tensor:
        """Drafts, and the target's logits over them. The drafts' own sampling looks at no filter and no
        penalty: they are left to the target, which has the last word."""
        self.steps.load_in_graph(step)
        rows = self.make_rows(step.req_pool_indices, step.seq_lens)
        self.draft_step(step, rows, sampling)
        return self.verify_step(step, rows)

    def _after(self, step: StepInputs, sampling: SamplingBatchInfo) -> None:
        self.extend_step(step, sampling)

    def _run_after(self, step: StepInputs, max_len: int) -> None:
        self.extend_part.run(step, max_len)

    # ---- the functions

    def _draft(self, step: StepInputs, rows: StepRows, sampling: SamplingBatchInfo) -> None:
        """The tokens to verify: the last one, the draft at hand, one more from each of the N draft steps."""
        indices = step.req_pool_indices
        last, first, hidden_states = self.req_to_token_pool.load_drafts(indices)
        tokens = [last, first]
        for i, backend in enumerate(self.draft_backend.attn_backends):
            row = rows.column(i)
            forward_batch = self.nextn.rows_batch(
                ForwardMode.DECODE,
                indices,
                step.seq_lens,
                tokens[-1],
                row,
                attn_backend=backend,
                hidden_states=hidden_states,
            )
            if i == 0 and not step.is_static:
                self.draft_backend.init_forward_metadata(forward_batch)
            hidden_states = self.nextn.model.forward(forward_batch)
            tokens.append(self._draft_sample(hidden_states, row.positions[:, 0], 2, indices, sampling))
        torch.stack(tokens, dim=1, out=step.tokens)

    def _verify(self, step: StepInputs, rows: StepRows) -> torch.Tensor:
        """The target over the last token and its drafts: logits [bs * D, vocab]; keeps the hidden states."""
        forward_batch = self.target.rows_batch(
            ForwardMode.TARGET_VERIFY, step.req_pool_indices, step.seq_lens, step.tokens, rows
        )
        if not step.is_static:
            self.target.attn_backend.init_forward_metadata(forward_batch)
        hidden_states = self.target.model.forward(forward_batch)
        step.hidden_states.copy_(hidden_states.view(step.hidden_states.shape))
        return self.target.model.compute_logits(hidden_states)

    def _draft_extend(self, step: StepInputs, sampling: SamplingBatchInfo) -> None:
        """The NextN layer over the accepted tokens: its keys, and each request's next first draft."""
        rows = self.make_rows(step.req_pool_indices, step.seq_lens, step.accept_lens)
        forward_batch = self.nextn.rows_batch(
            ForwardMode.DRAFT_EXTEND,
            step.req_pool_indices,
            step.extend_seq_lens,
            step.next_tokens,
            rows,
            hidden_states=step.hidden_states.flatten(0, 1),
            accept_lens=step.accept_lens,
        )
        if not step.is_static:
            self.nextn.attn_backend.init_forward_metadata(forward_batch)
        hidden_states = self.nextn.model.forward(forward_batch).index_select(0, step.last_rows)
        self._keep_draft(hidden_states, step.req_pool_indices, step.extend_seq_lens, sampling)

    # ---- parts of a step

    def _draft_sample(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        distance: int,
        indices: torch.Tensor,
        sampling: SamplingBatchInfo,
    ) -> torch.Tensor:
        """The tokens at `positions` [bs] + distance that the NextN layer's rows say, which are two before
        them; with the noise that the target will sample them with: drafts then agree more often."""
        logits = self.nextn.model.compute_logits(hidden_states)
        ahead = None if sampling.all_greedy else positions.long()[:, None] + distance
        return self.sampler(logits, ahead, indices, sampling)[:, 0]

    def _keep_draft(
        self,
        hidden_states: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        sampling: SamplingBatchInfo,
    ) -> None:
        """Stores what the next step's draft starts from: the output [bs, hidden] at position seq_len - 1."""
        tokens = self._draft_sample(hidden_states, seq_lens, 1, req_pool_indices, sampling)
        self.req_to_token_pool.keep_drafts(req_pool_indices, tokens, hidden_states)

    def _decode_output(
        self, step: StepInputs, logits: torch.Tensor, top_logprobs: int | None, tokens: list[list[int]]
    ) -> StepOutput:
        self.verified_requests += len(tokens)
        self.accepted_tokens += sum(map(len, tokens))
        return super()._decode_output(step, logits, top_logprobs, tokens)

    def _after_prefill(
        self,
        extend: ExtendBatch,
        next_tokens: torch.Tensor,
        hidden_states: torch.Tensor,
    ) -> None:
        """The NextN layer over the same rows, each with the token after it: keys of all, and each request's
        first draft, which its last row makes."""
        following = extend.input_ids.roll(-1)
        following[extend.last_rows] = next_tokens
        outputs = self.nextn.extend(extend, following, hidden_states, extend.last_rows)
        self._keep_draft(outputs, extend.req_pool_indices, extend.seq_lens, UNFILTERED)
