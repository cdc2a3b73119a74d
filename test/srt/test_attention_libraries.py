"""What goes into and comes out of the kernels of FlashMLA and FlashInfer, with the kernel's part in torch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from library_inputs import DEEPSEEK, random_inputs
from sglang.srt.layers.attention import sparse_mla_flashinfer
from sglang.srt.layers.attention.nsa.indexer import select_topk
from sglang.srt.layers.attention.nsa.metadata import MetadataMode, MetadataShape, as_backend_metadata
from sglang.srt.layers.attention.nsa.nsa_backend_mtp_precompute import MetadataInputs, precompute_metadata
from sglang.srt.layers.attention.nsa.sparse_mla import sparse_mla
from sglang.srt.layers.attention.registry import IMPLEMENTATIONS, SparseAttentionOps
from sglang.srt.layers.attention.sparse_mla_flashinfer import FlashInferSparseMLA, read_plan
from sglang.srt.layers.attention.sparse_mla_flashmla import FlashMLAKV, FlashMLASparse
from sglang.srt.libraries.flashmla import FlashMLALibrary

CPU = torch.device("cpu")


@pytest.mark.parametrize("takes_lengths", [True, False])
def test_flashmla_gets_the_rows_lengths_where_it_takes_them(takes_lengths: bool) -> None:
    """The lengths are the metadata's own tensor: what a graph refreshes is what the kernel reads."""
    seen = []

    def sparse_fwd(q, kv, indices, scale, latent, **lengths):
        seen.append(lengths)
        return [sparse_mla(q[..., :latent], q[..., latent:], kv[:, 0], indices[:, 0], scale)]

    dims = replace(DEEPSEEK, num_attention_heads=8, index_topk=128)
    attention = FlashMLASparse(dims, FlashMLALibrary("a test", sparse_fwd, takes_lengths=takes_lengths))
    metadata = SimpleNamespace(nsa_cache_seqlens_int32=torch.tensor([0, 1, 42, 128, 0], dtype=torch.int32))
    q_nope, q_rope, kv, slots = random_inputs(5, 8, 128)
    attention.sparse_mla(q_nope, q_rope, kv, slots, 0.1, attention.prepare(metadata))
    (lengths,) = seen
    if takes_lengths:
        assert lengths["topk_length"] is metadata.nsa_cache_seqlens_int32
    else:
        assert not lengths


@pytest.mark.parametrize("heads", [8, 64, 128])
def test_flashmla_gets_the_shapes_it_wants(heads: int) -> None:
    """The kernel's contract, carried out by the torch reference: padded heads, one key head, -1 slots."""

    def sparse_fwd(q, kv, indices, scale, latent):
        assert q.shape[1:] == (64 if heads <= 64 else 128, 576) and q.is_contiguous()
        assert kv.shape[1:] == (1, 576) and indices.shape[1] == 1 and indices.dtype == torch.int32
        assert not q[:, heads:].any()
        out = sparse_mla(q[..., :latent], q[..., latent:], kv[:, 0], indices[:, 0], scale)
        return [
            out.masked_fill((indices[:, 0, :1, None] < 0), float("nan"))
        ]  # dead rows are not its business

    dims = replace(DEEPSEEK, num_attention_heads=heads, index_topk=128)
    attention = FlashMLASparse(dims, FlashMLALibrary("a test", sparse_fwd))
    q_nope, q_rope, kv, slots = random_inputs(5, heads, 128)
    out = attention.sparse_mla(q_nope, q_rope, kv, slots, 0.1)
    # Padded heads: another matrix size, whose products some CPUs round differently.
    torch.testing.assert_close(out, sparse_mla(q_nope, q_rope, kv, slots, 0.1))
    assert attention.sparse_mla(q_nope[:0], q_rope[:0], kv, slots[:0], 0.1).shape == (0, heads, 512)


def test_flashmla_kv_without_a_known_decode_kernel_is_an_import_error() -> None:
    with pytest.raises(ImportError, match="a package has no decode kernel"):
        FlashMLAKV(DEEPSEEK, CPU, FlashMLALibrary("a package", sparse_mla))


PLAN_FIELDS = 18
MAX_WORKS = 64


def plan_arrays(works: list[tuple[int, int, int]], topk: int) -> tuple[list[int], torch.Tensor]:
    """A plan laid out as FlashInfer's: works are (row, start, end), all of the first of two clusters."""
    info = [0] * PLAN_FIELDS
    info[1] = 2  # clusters
    workspace = torch.full((16 * MAX_WORKS,), -99, dtype=torch.int32)
    arrays = {
        3: [row * topk for row, _, _ in works],
        11: [topk] * len(works),
        13: [start for _, start, _ in works],
        14: [end for _, _, end in works],
        15: [0, len(works), len(works)],
    }
    for place, (field, values) in enumerate(arrays.items()):
        info[field] = 4 * MAX_WORKS * place
        workspace[MAX_WORKS * place : MAX_WORKS * place + len(values)] = torch.tensor(values)
    return info, workspace.view(torch.uint8)


def test_flashinfer_bounds_are_cut_to_the_lengths() -> None:
    works = [(0, 0, 256), (1, 0, 256), (0, 256, 512), (1, 256, 512), (2, 0, 512)]
    info, workspace = plan_arrays(works, topk=512)
    bounds, live = read_plan(info, workspace, rows=3, topk=512)
    assert live.tolist() == [[512] * 5, [256, 256, 512, 512, 512]]
    cut = bounds.cut(torch.tensor([300, 7, 0], dtype=torch.int32))
    assert cut.tolist() == [[300, 7, 300, 7, 0], [256, 7, 300, 7, 0]]
    live.copy_(cut)
    ints = workspace.view(torch.int32)
    assert ints[MAX_WORKS : MAX_WORKS + 5].tolist() == [300, 7, 300, 7, 0]
    assert ints[3 * MAX_WORKS : 3 * MAX_WORKS + 5].tolist() == [256, 7, 300, 7, 0]
    # The next cut starts from the plan, not from the last one.
    assert bounds.cut(torch.tensor([512, 512, 512])).tolist() == [[512] * 5, [256, 256, 512, 512, 512]]


class StrictWrapper:
    """FlashInfer's MLA wrapper in torch: it follows every index that it is given, and each must exist.

    So does the kernel with those of a row's length, and nothing says that another version does not with the
    others: a slot of -1 is the row in front of the cache.
    """

    def __init__(self, workspace, kv_indices, kv_len_arr, **_: object) -> None:
        self._kv_indices_buf, self.rows = kv_indices, kv_len_arr.shape[0]

    def plan(self, qo_indptr, kv_indptr, kv_indices, kv_lens, *_: object) -> None:
        self.topk = int(kv_lens[0])
        works = [(row, 0, self.topk) for row in range(self.rows)]
        self._plan_info, self._int_workspace_buffer = plan_arrays(works, self.topk)

    def run(self, q_nope, q_rope, latents, ropes):
        slots = self._kv_indices_buf.view(self.rows, self.topk).long()
        assert ((slots >= 0) & (slots < latents.shape[0])).all(), "a slot that is not there"
        ends = self._int_workspace_buffer.view(torch.int32)[3 * MAX_WORKS :][: self.rows]
        dead = torch.arange(self.topk) >= ends[:, None]
        kv = torch.cat((latents, ropes), dim=-1)[:, 0]
        out = sparse_mla(q_nope, q_rope, kv, slots.int().masked_fill(dead, -1), 0.1)
        out[ends == 0] = float("nan")  # rows without work are not written
        return out


def test_flashinfer_gets_only_slots_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was handed top-k's -1: under compute-sanitizer, reads one row in front of the cache."""
    dims = replace(DEEPSEEK, num_attention_heads=8, index_topk=16, softmax_scale=0.1)
    monkeypatch.setattr(sparse_mla_flashinfer, "WORKSPACE_BYTES", 16)
    mla = SimpleNamespace(BatchMLAPagedAttentionWrapper=StrictWrapper)
    attention = FlashInferSparseMLA(dims, CPU, mla)
    lengths = torch.tensor([3, 0, 16, 40, 1], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    req_to_token = (torch.randperm(5 * 40, generator=generator) + 1).view(5, 40).int()
    slots = select_topk(
        torch.randn((5, 4, 32), generator=generator),
        torch.randn((5, 4), generator=generator),
        torch.randn((201, 32), generator=generator),
        *(req_to_token, torch.arange(5), lengths, 16, 40),
        rows_per_req=1,
        padding_slot=attention.padding_slot,
    )
    q = torch.randn((5, 8, 576), generator=generator).bfloat16()
    kv = torch.randn((201, 576), generator=generator).bfloat16()
    kv[0] = float("nan")  # the padding's slot exists, but nobody attends to it
    inputs = MetadataInputs(
        MetadataShape(MetadataMode.DECODE, 5, 1, 40, 64, 16), lengths, torch.arange(5), req_to_token
    )
    metadata = as_backend_metadata(precompute_metadata(inputs)).prepared(attention.prepare)
    out = attention.sparse_mla(q[..., :512], q[..., 512:], kv, slots, 0.1, metadata.reader)
    live = torch.arange(16) < lengths[:, None]
    expected = sparse_mla(q[..., :512], q[..., 512:], kv, slots.masked_fill(~live, -1), 0.1)
    torch.testing.assert_close(out, expected)
    assert not out[1].any()


def test_what_libraries_take_beyond_a_rows_slots() -> None:
    """FlashInfer: any slot that exists; FlashMLA: -1 alone is none."""
    assert FlashInferSparseMLA.padding_slot == 0
    for ops in (IMPLEMENTATIONS["torch"].build(None, CPU), SparseAttentionOps("any", sparse_mla, sparse_mla)):
        assert ops.padding_slot == -1


@pytest.mark.parametrize(
    "works",
    [
        [],
        [(0, 0, 512)],  # row 1 is missing
        [(0, 0, 512), (1, 0, 511)],
        [(0, 0, 512), (5, 0, 512)],
        [(0, 0, 512), (1, 256, 256), (1, 0, 512)],
    ],
)
def test_a_flashinfer_plan_of_another_layout_is_refused(works: list[tuple[int, int, int]]) -> None:
    info, workspace = plan_arrays(works, topk=512)
    with pytest.raises(RuntimeError, match="not laid out as in"):
        read_plan(info, workspace, rows=2, topk=512)
    with pytest.raises(RuntimeError, match="has 17 fields, expected 18"):
        read_plan(info[:-1], workspace, rows=2, topk=512)
