"""Runs the model for the scheduler: prefill and plain decode; speculation builds on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from sglang.srt.environ import envs
from sglang.srt.layers.attention.nsa.metadata import MetadataMode
from sglang.srt.layers.attention.nsa_backend import NativeSparseAttnBackend
from sglang.srt.layers.logprobs import hidden_logprobs, token_logprobs
from sglang.srt.layers.request_sampler import RequestSampler
from sglang.srt.managers.schedule_batch import PrefillChunk, Req, StepOutput
from sglang.srt.managers.warm_up import warm_up
from sglang.srt.mem_cache.fp8_kv_pool import kv_pool_class
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.pool_size import num_pages
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.attention_config import attention_config
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.graph_runner import StepInputs
from sglang.srt.model_executor.metadata_report import log_metadata_paths, metadata_state
from sglang.srt.model_executor.model_runner import ExtendBatch, ModelRunner, to_device
from sglang.srt.model_executor.read_back import ReadBack
from sglang.srt.model_executor.step_function import StepFunction, StepMetadata
from sglang.srt.model_executor.step_graph import StepGraph
from sglang.srt.model_executor.step_rows import rows_maker
from sglang.srt.model_executor.step_runner import StepRunner
from sglang.srt.model_loader import load_model
from sglang.srt.sampling.sampling_batch_info import GREEDY, UNFILTERED, SamplingBatchInfo
from sglang.srt.sampling.token_logprob import TokenLogprob
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.eagle_info import advance


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
        rows = torch.tensor([req.req_pool_idx for req in reqs], dtype=torch.int32)
        return cls(
            members=[(req, req.req_pool_idx) for req in reqs],
            indices=to_device(rows, device=device)[0],
            sampling=SamplingBatchInfo.of([req.sampling_params for req in reqs]),
            top_logprobs=max(wanted) if wanted else None,
        )


@dataclass(frozen=True)
class PendingDecode:
    """A launched step, until its tokens are read."""

    rows: Callable[[], list[list[int]]]  # waits for [n, D + 1]: the target's tokens, then how many count
    finish: Callable[[list[list[int]]], StepOutput]

    def read(self) -> StepOutput:
        return self.finish([row[: row[-1]] for row in self.rows()])


class TpModelWorker:
    """The target model: one token a request and step.

    A step is a forward pass, the sampling of what it says, and, where the worker speculates, what follows
    from that. It runs as one graph, or in three parts where the sampling depends on what only the batch at
    hand knows: penalties and filters.
    """

    lookahead = 1

    def __init__(self, server_args: ServerArgs, config: ModelConfig) -> None:
        self.server_args = server_args
        self.config = config
        self.device = torch.device(server_args.device)
        self.context_len = config.context_len
        self.vocab_size = config.vocab_size
        self.eos_token_ids = frozenset(config.eos_token_ids)
        self.page_size = server_args.page_size
        # A CPU has nothing to do meanwhile, and what is verified must not lag behind.
        self.overlaps = (
            self.device.type == "cuda"
            and not server_args.disable_overlap_schedule
            and not envs.SGLANG_NSA_VERIFY_METADATA.get()
        )
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
            self.page_size,
        )
        self.sampler = RequestSampler(self.req_to_token_pool, server_args.sampling_backend, self.device)
        self.nsa_config = attention_config(server_args, config, width, self.device)
        self.target = self._runner(target, config.num_hidden_layers)
        self.batch: DecodeBatch | None = None
        self._init_speculation(nextn)
        self.row_numbers = torch.arange(self.lookahead, device=self.device)  # 0 .. D - 1
        self.make_rows = rows_maker(
            self.req_to_token_pool, self.target.model.rotary_emb, self.lookahead, self.device
        )
        self.read_back = ReadBack(server_args.max_running_requests, self.lookahead + 1, self.device)
        self.first_tokens = ReadBack(server_args.max_running_requests, 1, self.device)  # of prompts
        self.steps = StepRunner(
            self.step_functions, self.step_graphs, self._create_inputs, self.req_to_token_pool
        )
        if not server_args.disable_cuda_graph:
            self.steps.capture(server_args.cuda_graph_max_bs)
            log_metadata_paths(self.step_functions)
        if self.device.type == "cuda" and not server_args.skip_server_warmup:
            captured = 0 if server_args.disable_cuda_graph else server_args.cuda_graph_max_bs
            sizes = config.index_topk, captured, server_args.max_running_requests
            warm_up(self, server_args.chunked_prefill_size, *sizes)

    # ---- the scheduler's interface

    @torch.inference_mode()
    def prefill(self, chunks: list[PrefillChunk]) -> StepOutput:
        """One eager pass over the chunks; samples where a chunk ends its prompt."""
        pool = self.req_to_token_pool
        extend = ExtendBatch.create(
            pool,
            [chunk.req.req_pool_idx for chunk in chunks],
            [chunk.req.kv_len for chunk in chunks],
            [chunk.tokens for chunk in chunks],
        )
        following = torch.tensor([-1 if c.next_token is None else c.next_token for c in chunks])
        (known,) = to_device(following, device=self.device)  # [bs]: -1 where it is to be sampled
        batch = DecodeBatch.create([chunk.req for chunk in chunks], self.device)
        hidden_states = self.target.extend(extend, extend.input_ids)  # [T, hidden]

        logits = self.target.model.compute_logits(hidden_states[extend.last_rows]).float()
        positions = extend.seq_lens.long()[:, None]
        sampled = self.sampler(logits, positions, extend.req_pool_indices, batch.sampling)  # [bs, 1]
        first_tokens = self.first_tokens.start(sampled)  # on their way while the NextN layer runs
        sampled = sampled[:, 0]
        next_tokens = torch.where(known < 0, sampled, known)  # [bs]
        pool.seq_lens[extend.req_pool_indices] = extend.seq_lens
        pool.last_token[extend.req_pool_indices] = next_tokens
        if batch.sampling.changes_logits:
            pool.penalties.add_outputs(extend.req_pool_indices, sampled[:, None], known < 0)
        self._after_prefill(extend, next_tokens, hidden_states)
        return self._prefill_output(chunks, batch, hidden_states, logits, sampled, first_tokens())

    @torch.inference_mode()
    def launch_decode(self, reqs: list[Req]) -> PendingDecode:
        """Launches all of a step of every request; nothing in it is read back before `read`."""
        step, max_len = self._load_step(reqs), self._max_len(reqs)
        logits = self._run_step(step, max_len)
        finish = partial(self._decode_output, step, logits, self.batch.top_logprobs)
        return PendingDecode(self.read_back.start(step.output[: len(reqs)]), finish)

    def decode(self, reqs: list[Req]) -> StepOutput:
        """One step of every request, from its launch to its tokens."""
        return self.launch_decode(reqs).read()

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
        """All functions with metadata of their own that a decode step runs."""
        return (self.decode_step,)

    @cached_property
    def decode_step(self) -> StepFunction[torch.Tensor]:
        metadata = StepMetadata(MetadataMode.DECODE, 1, offsets=(1,))
        return StepFunction("decode", self._decode, self.target.attn_backend, metadata)

    @cached_property
    def step_graphs(self) -> tuple[StepGraph, ...]:
        """All graphs of a decode step: the whole one by how it samples, and its parts."""
        return (*self.whole_steps.values(), self.forward_part)

    @cached_property
    def whole_steps(self) -> dict[SamplingBatchInfo, StepGraph[torch.Tensor]]:
        """Of each kind of sampling that a graph can hold."""
        return {
            sampling: StepGraph(f"step, {name}", self.step_functions, partial(self._step, sampling=sampling))
            for name, sampling in (("greedy", GREEDY), ("sampled", UNFILTERED))
        }

    @cached_property
    def forward_part(self) -> StepGraph[torch.Tensor]:
        return StepGraph("forward", (self.decode_step,), partial(self._forward, sampling=UNFILTERED))

    # ---- a step

    def _run_step(self, step: StepInputs, max_len: int) -> torch.Tensor:
        """Returns logits [bs * D, vocab], as the tokens were sampled from them."""
        sampling = self.batch.sampling
        whole = self.whole_steps.get(sampling)
        if whole is not None:
            return whole.run(step, max_len)
        logits = self.forward_part.run(step, max_len).float()  # penalties change them
        self._accept(step, logits, sampling)
        self._run_after(step, max_len)
        return logits

    def _step(self, step: StepInputs, sampling: SamplingBatchInfo) -> torch.Tensor:
        """The whole step, captured."""
        logits = self._forward(step, sampling)
        self._accept(step, logits, sampling)
        self._after(step, sampling)
        return logits

    def _forward(self, step: StepInputs, sampling: SamplingBatchInfo) -> torch.Tensor:
        """Logits [bs * D, vocab] of all rows."""
        self.steps.load_in_graph(step)
        return self.decode_step(step)

    def _after(self, step: StepInputs, sampling: SamplingBatchInfo) -> None:
        """What follows from the accepted tokens: a hook of the speculative worker's."""

    def _run_after(self, step: StepInputs, max_len: int) -> None:
        """The same in a graph of its own."""

    def _decode(self, step: StepInputs) -> torch.Tensor:
        """Logits [bs, vocab] of each request's last token."""
        pool = self.req_to_token_pool
        tokens = pool.last_token[step.req_pool_indices.long()]
        forward_batch = self.target.rows_batch(
            ForwardMode.DECODE,
            step.req_pool_indices,
            step.seq_lens + 1,
            tokens[:, None],
            self.make_rows(step.req_pool_indices, step.seq_lens),
        )
        if not step.is_static:
            self.target.attn_backend.init_forward_metadata(forward_batch)
        return self.target.model.compute_logits(self.target.model.forward(forward_batch))

    def _accept(self, step: StepInputs, logits: torch.Tensor, sampling: SamplingBatchInfo) -> None:
        """Samples the target's tokens, counts the right drafts and advances the requests."""
        pool, numbers = self.req_to_token_pool, self.row_numbers
        positions = None if sampling.all_greedy and not sampling.changes_logits else step.seq_lens.long()
        if positions is not None:  # of the tokens that follow the rows
            positions = positions[:, None] + numbers + 1
        tokens = self.sampler(logits, positions, step.req_pool_indices, sampling, step.draft_tokens)
        advance(tokens.view(-1, self.lookahead), step, pool)
        if sampling.changes_logits:
            pool.penalties.add_outputs(step.req_pool_indices.long(), tokens, step.accept_lens)

    def _decode_output(
        self, step: StepInputs, logits: torch.Tensor, top_logprobs: int | None, tokens: list[list[int]]
    ) -> StepOutput:
        if top_logprobs is None:
            return StepOutput(tokens)
        n, rows = len(tokens), self.lookahead
        entries = token_logprobs(logits[: n * rows], step.next_tokens[:n].flatten(), top_logprobs)
        return StepOutput(tokens, [entries[i * rows : i * rows + len(t)] for i, t in enumerate(tokens)])

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
        """A bound of all row lengths of the step, from the host's own count, which may be a step behind."""
        return max(req.kv_len for req in reqs) + self.lookahead * (1 + self.overlaps)

    # ---- prefill

    def _after_prefill(
        self,
        extend: ExtendBatch,
        next_tokens: torch.Tensor,
        hidden_states: torch.Tensor,
    ) -> None:
        """A hook of the speculative worker's."""

    def _prefill_output(
        self,
        chunks: list[PrefillChunk],
        batch: DecodeBatch,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        sampled: torch.Tensor,
        first_tokens: list[list[int]],
    ) -> StepOutput:
        ends = [chunk.next_token is None for chunk in chunks]
        tokens = [token if end else [] for token, end in zip(first_tokens, ends)]
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
