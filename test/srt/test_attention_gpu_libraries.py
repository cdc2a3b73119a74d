"""Kernels of libraries on a GPU, each against torch: FlashInfer and FlashMLA attention, FlashInfer's filters
and norm, DeepGEMM's schedule. What is not installed is skipped, with the reason.

`scripts/gpu_check.sh` runs these under compute-sanitizer too: a library may read no row but the cache's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.nsa.dims import AttentionDims
from sglang.srt.layers.attention.nsa.metadata import MetadataMode, MetadataShape
from sglang.srt.layers.attention.nsa.nsa_backend_mtp_precompute import MetadataInputs
from sglang.srt.layers.attention.nsa.paths import GraphMetadata, MetadataSelection
from sglang.srt.layers.attention.nsa.schedules import NO_STATE, paged_mqa_logits_schedule
from sglang.srt.layers.attention.nsa.sparse_mla import sparse_mla
from sglang.srt.layers.attention.registry import SparseAttentionOps, select_attention_ops
from sglang.srt.layers.layernorm import RMSNorm, flashinfer_rmsnorm
from sglang.srt.layers.sampler import keep_mask, sample
from sglang.srt.layers.sampler_flashinfer import FlashInferKeepMask
from sglang.srt.mem_cache.fp8_kv import dequantize_kv, quantize_kv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CUDA = torch.device("cuda")
# The cache takes whole steps of torch's allocator (2 MiB) in either format: its ends are those of its memory.
LATENT, ROPE, SLOTS = 512, 64, 1 << 17
LIBRARIES = ("flashinfer", "flashmla_sparse", "flashmla_kv")


def dims_of(heads: int, topk: int) -> AttentionDims:
    return AttentionDims(heads, LATENT, ROPE, topk, 192**-0.5, torch.bfloat16)


def ops_of(name: str, dims: AttentionDims) -> SparseAttentionOps:
    try:
        return select_attention_ops(name, CUDA, "decode", dims)
    except ImportError as error:
        pytest.skip(str(error))


@dataclass(frozen=True)
class LengthsCase:
    """Rows of these lengths, one a request."""

    name: str
    lengths: tuple[int, ...]
    heads: int = 128
    topk: int = 2048

    def __str__(self) -> str:
        return self.name


CASES = [
    LengthsCase("one", (5,)),
    LengthsCase("one_long", (9000,)),
    LengthsCase("around_topk", (2047, 2048, 2049)),
    LengthsCase("mixed", (1, 4000, 63, 64, 65, 700, 2048, 12000)),
    LengthsCase("dead_rows", (0, 900, 0, 1), heads=64, topk=512),
    LengthsCase("few_heads", (1, 300, 129, 128, 5000), heads=8, topk=128),
    LengthsCase("odd_heads", (77, 1000), heads=40, topk=256),
    LengthsCase("many_rows", tuple(range(1, 3000, 23))),
]


class PoisonedNeighbours:
    """A copy of a tensor in memory of its own, between two allocations of nothing but NaN (0xff bytes)."""

    def __init__(self, tensor: torch.Tensor) -> None:
        torch.cuda.empty_cache()  # so that nothing is carved out of larger blocks

        def bytes_of_its_size() -> torch.Tensor:
            size = tensor.numel() * tensor.element_size()
            return torch.full((size,), 0xFF, dtype=torch.uint8, device=CUDA)

        self.before, memory, self.after = (bytes_of_its_size() for _ in range(3))
        self.tensor = memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)


class Problem:
    """Random queries over a random cache whose slot 0, that of padded rows, holds NaN.

    `cache` is what the implementation `name` reads, `kv` the same as the reference reads it.
    """

    def __init__(self, ops: SparseAttentionOps, case: LengthsCase, backends: int = 1) -> None:
        self.case, self.dims, self.padding_slot = case, dims_of(case.heads, case.topk), ops.padding_slot
        generator = torch.Generator(CUDA).manual_seed(len(case.lengths))
        self.generator = generator
        rows = len(case.lengths)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=CUDA).bfloat16()

        self.q = [normal(rows, case.heads, LATENT + ROPE) for _ in range(backends)]
        self.kv = normal(SLOTS, LATENT + ROPE)
        self.kv[0] = float("nan")
        self.fp8 = ops.name == "flashmla_kv"
        cache = self.kv
        if self.fp8:
            cache = quantize_kv(self.kv[:, :LATENT], self.kv[:, LATENT:])
            self.kv = dequantize_kv(cache).bfloat16()
        self.memory = PoisonedNeighbours(cache)
        self.cache = self.memory.tensor
        self.live = [torch.zeros((rows, 1), dtype=torch.int32, device=CUDA) for _ in range(backends)]
        self.slots = [torch.empty((rows, case.topk), dtype=torch.int32, device=CUDA) for _ in range(backends)]

    def fill_slots(self, lengths: list[list[int]]) -> None:
        """As select_topk leaves them: min(length, topk) slots, the cache's last among them, then padding."""
        for slots, live, of_rows in zip(self.slots, self.live, lengths):
            slots.fill_(self.padding_slot)
            for row, length in enumerate(of_rows):
                n = live[row] = min(length, self.case.topk)
                picked = torch.randperm(SLOTS - 1, generator=self.generator, device=CUDA)[:n] + 1
                slots[row, :n] = picked.int()
                slots[row, : min(n, 1)] = SLOTS - 1

    def inputs(self, backend: int = 0) -> tuple[torch.Tensor, ...]:
        q = self.q[backend]
        return q[..., :LATENT], q[..., LATENT:], self.cache, self.slots[backend], self.dims.softmax_scale

    def check(self, out: torch.Tensor, backend: int = 0) -> None:
        q_nope, q_rope, _, slots, scale = self.inputs(backend)
        dead = torch.arange(self.case.topk, device=CUDA) >= self.live[backend]
        expected = sparse_mla(q_nope, q_rope, self.kv, slots.masked_fill(dead, -1), scale)
        tolerance = 4e-2 if self.fp8 else 2e-2  # over FP8 keys the kernel rounds more
        torch.testing.assert_close(out.float(), expected.float(), atol=tolerance, rtol=tolerance)


def metadata_inputs(seq_lens: torch.Tensor, topk: int) -> MetadataInputs:
    bs, width = seq_lens.shape[0], SLOTS
    return MetadataInputs(
        shape=MetadataShape(MetadataMode.DECODE, bs, 1, width, page_size=64, topk=topk),
        seq_lens=seq_lens,
        req_pool_indices=torch.zeros(bs, dtype=torch.int32, device=CUDA),
        req_to_token=torch.arange(width, dtype=torch.int32, device=CUDA)[None],
    )


def planned_graph(
    ops: SparseAttentionOps, inputs: MetadataInputs, layout: str, offsets: tuple[int, ...]
) -> GraphMetadata:
    enabled = layout != "recompute"
    selection = MetadataSelection(enabled, layout if enabled else "replicate", "auto")
    graph = GraphMetadata(selection, inputs.shape, offsets, CUDA, prepare=ops.prepare, reads=ops.reads)
    graph.capture(inputs)
    return graph


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_attends_like_the_reference(name: str, case: LengthsCase) -> None:
    ops = ops_of(name, dims_of(case.heads, case.topk))
    problem = Problem(ops, case)
    problem.fill_slots([list(case.lengths)])
    seq_lens = torch.tensor(case.lengths, dtype=torch.int32, device=CUDA)
    graph = planned_graph(ops, metadata_inputs(seq_lens, case.topk), "recompute", (0,))
    graph.replay(seq_lens.shape[0], -1)
    out = ops.sparse_mla(*problem.inputs(), graph.backends[seq_lens.shape[0]][0].reader)
    problem.check(out)
    dead = seq_lens == 0
    assert not out[dead].any()


@pytest.mark.parametrize("layout", ["recompute", "replicate", "shared", "in_graph", "indirect"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_captured_graph_follows_the_lengths_of_every_backend(name: str, layout: str) -> None:
    """Seven draft steps in one graph: each follows when the lengths change."""
    offsets = tuple(range(1, 8))
    case = LengthsCase("graph", (1, 1, 1, 1), heads=128, topk=512)
    ops = ops_of(name, dims_of(case.heads, case.topk))
    problem = Problem(ops, case, backends=len(offsets))
    bs = len(case.lengths)
    seq_lens = torch.ones(bs, dtype=torch.int32, device=CUDA)
    metadata = planned_graph(ops, metadata_inputs(seq_lens, case.topk), layout, offsets)
    # As many slots as the metadata says: a library follows each of them, in the runs before the capture, too.
    problem.fill_slots([[1 + offset] * bs for offset in offsets])

    def steps() -> list[torch.Tensor]:
        metadata.run_in_graph(bs)
        return [
            ops.sparse_mla(*problem.inputs(i), metadata.backends[bs][i].reader) for i in range(len(offsets))
        ]

    metadata.replay(bs, -1)
    steps()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = steps()
    for lengths in ([500, 3, 5000, 64], [1, 509, 1, 12000], [2048, 2048, 2048, 2048], [1, 1, 1, 1]):
        seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        problem.fill_slots([[n + offset for n in lengths] for offset in offsets])
        metadata.replay(bs, -1)
        graph.replay()
        metadata.check(bs)
        for i, out in enumerate(outs):
            problem.check(out, i)


@pytest.mark.parametrize("name", LIBRARIES)
def test_no_rows_are_legal(name: str) -> None:
    ops = ops_of(name, dims_of(128, 2048))
    q = torch.zeros((0, 128, LATENT + ROPE), dtype=torch.bfloat16, device=CUDA)
    kv = torch.zeros((64, LATENT + ROPE), dtype=torch.bfloat16, device=CUDA)
    slots = torch.zeros((0, 2048), dtype=torch.int32, device=CUDA)
    out = ops.sparse_mla(q[..., :LATENT], q[..., LATENT:], kv, slots, 192**-0.5)
    assert out.shape == (0, 128, LATENT)


@pytest.mark.parametrize("name", ["flashmla_sparse", "flashmla_kv"])
def test_flashmla_serves_prefill(name: str) -> None:
    dims = dims_of(128, 2048)
    ops_of(name, dims)  # or skipped
    ops = select_attention_ops(name, CUDA, "prefill", dims)
    problem = Problem(ops, LengthsCase("chunk", tuple(range(1, 400))))
    lengths = list(problem.case.lengths)
    problem.fill_slots([lengths])
    ragged = SimpleNamespace(nsa_seqlens_expanded=torch.tensor(lengths, dtype=torch.int32, device=CUDA))
    reader = NO_STATE if ops.prepare is None else ops.prepare(ragged)
    problem.check(ops.sparse_mla(*problem.inputs(), reader))


# ---- sampling


@pytest.fixture(scope="module")
def flashinfer_keep_mask() -> FlashInferKeepMask:
    try:
        return FlashInferKeepMask(CUDA)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("vocab", [97, 4096, 129280])
def test_flashinfer_keeps_the_tokens_that_torch_keeps(
    flashinfer_keep_mask: Callable[..., torch.Tensor], vocab: int
) -> None:
    """But for tokens next to the limit of top-p, whose sums of probabilities are rounded differently."""
    generator = torch.Generator(CUDA).manual_seed(vocab)
    limits = [
        *((1.0, 0, 0.0), (0.9, 0, 0.0), (0.3, 0, 0.0), (0.001, 0, 0.0)),
        *((1.0, 1, 0.0), (1.0, 40, 0.0), (1.0, vocab + 5, 0.0)),
        *((0.8, 20, 0.0), (0.95, 50, 0.05), (1.0, 0, 0.2)),
    ]
    scores = 4 * torch.randn((len(limits), vocab), generator=generator, device=CUDA)
    top_p, top_k, min_p = (torch.tensor(values, device=CUDA) for values in zip(*limits))
    arguments = scores, top_p, top_k.long(), min_p
    found, expected = flashinfer_keep_mask(*arguments), keep_mask(*arguments)
    assert found.dtype == torch.bool and found.shape == scores.shape
    probs = scores.softmax(dim=-1)
    differ = found != expected
    limited_by_p = (top_p < 1) & (top_p > 0.01)
    assert not differ[~limited_by_p].any()
    assert ((probs * differ).sum(dim=-1) < 1e-4).all()
    assert found.gather(1, scores.argmax(dim=-1, keepdim=True)).all()


def test_sampling_by_flashinfer_draws_the_same_tokens(
    flashinfer_keep_mask: Callable[..., torch.Tensor],
) -> None:
    """Randomness stays a function of (seed, position): a row draws the same alone and in a batch."""
    rows, vocab = 64, 32000
    generator = torch.Generator(CUDA).manual_seed(7)
    logits = 3 * torch.randn((rows, vocab), generator=generator, device=CUDA)
    arguments = (
        logits,
        torch.arange(rows, device=CUDA),
        torch.full((rows,), 0.8, device=CUDA),
        torch.full((rows,), 0.9, device=CUDA),
        torch.full((rows,), 50, device=CUDA),
        torch.zeros(rows, device=CUDA),
        torch.arange(rows, device=CUDA) % 5,
    )
    tokens = sample(*arguments, keep=flashinfer_keep_mask)
    assert (tokens == sample(*arguments)).float().mean() > 0.95
    alone = [sample(*(a[i : i + 1] for a in arguments), keep=flashinfer_keep_mask) for i in range(rows)]
    assert torch.equal(tokens, torch.cat(alone))


# ---- norm


@pytest.mark.parametrize(
    ("rows", "size", "stride"), [(1, 7168, 7168), (33, 512, 576), (5, 64, 83), (0, 512, 512)]
)
def test_flashinfer_norm_equals_torch_within_bfloat16(rows: int, size: int, stride: int) -> None:
    if flashinfer_rmsnorm() is None:
        pytest.skip("flashinfer's RMSNorm is not available")
    norm = RMSNorm(size, 1e-6, dtype=torch.bfloat16, device=CUDA)
    generator = torch.Generator(CUDA).manual_seed(rows)
    norm.weight.copy_(torch.randn(size, generator=generator, device=CUDA))
    x = torch.randn((rows, stride), generator=generator, device=CUDA).bfloat16()[:, :size]
    found = norm(x)
    norm.kernel = None
    torch.testing.assert_close(found, norm(x), atol=2e-2, rtol=2e-2)
    x32 = x.float()
    exact = norm.weight.float() * x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(found.float(), exact, atol=1e-3, rtol=2**-7)


def test_float32_norms_stay_with_torch() -> None:
    assert RMSNorm(64, 1e-6, dtype=torch.float32, device=CUDA).kernel is None


# ---- DeepGEMM's schedule


@pytest.mark.parametrize("lengths", [[1], [0, 0, 5], [256, 257, 1], [4096] * 32, list(range(1, 40000, 997))])
def test_schedule_equals_that_of_deep_gemm(lengths: list[int]) -> None:
    deep_gemm = pytest.importorskip("deep_gemm")
    lens = torch.tensor(lengths, dtype=torch.int32, device=CUDA)
    num_sms = deep_gemm.get_num_sms()
    try:
        expected = deep_gemm.get_paged_mqa_logits_metadata(lens[:, None], 64, num_sms)
    except RuntimeError as error:
        pytest.skip(f"deep_gemm does not run here: {error}")
    found = paged_mqa_logits_schedule(lens[:, None], num_sms)
    assert torch.equal(found, expected.view(torch.int32))
