"""The FP8 cache, and FlashMLA's metadata: once for each batch size, the same for every backend.

The kernel's part is done by torch here, over the same bytes; test_attention_gpu_libraries.py has the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.layers.attention.nsa.dims import AttentionDims
from sglang.srt.layers.attention.nsa.metadata import FIELDS, MetadataMode, MetadataShape
from sglang.srt.layers.attention.nsa.nsa_backend_mtp_precompute import MetadataInputs
from sglang.srt.layers.attention.nsa.paths import GraphMetadata, MetadataSelection
from sglang.srt.layers.attention.nsa.sparse_mla import sparse_mla
from sglang.srt.layers.attention.registry import IMPLEMENTATIONS
from sglang.srt.layers.attention.sparse_mla_flashmla import FlashMLAKV
from sglang.srt.libraries.flashmla import FlashMLALibrary
from sglang.srt.mem_cache.fp8_kv import BYTES, dequantize_kv, quantize_kv
from sglang.srt.mem_cache.fp8_kv_pool import FP8MLATokenToKVPool, kv_pool_class
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
from sglang.srt.server_args import ServerArgs

CPU = torch.device("cpu")
TOPK = 128
PARTS = 5


def dims_of(heads: int) -> AttentionDims:
    return AttentionDims(heads, 512, 64, TOPK, 0.1, torch.bfloat16)


@dataclass
class TorchLibrary:
    """FlashMLA's decode contract in torch; counts how often the metadata is asked for."""

    asked: list[int] = field(default_factory=list)

    def decode_metadata(self, lengths, heads_per_key, key_heads, heads, is_fp8, topk):
        assert lengths.dtype == torch.int32 and heads_per_key == heads in (64, 128)
        assert (key_heads, is_fp8, topk) == (1, True, TOPK)
        rows = lengths.shape[0]
        self.asked.append(rows)
        return [torch.full((PARTS, 8), rows, dtype=torch.int32), torch.arange(rows + 1, dtype=torch.int32)]

    def decode(self, q, kv, latent, lengths, block_table, scale, causal, metadata, splits, is_fp8, indices):
        rows = q.shape[0]
        assert q.shape[1:] in ((1, 64, 576), (1, 128, 576)) and q.dtype == torch.bfloat16
        assert kv.shape[1:] == (64, 1, BYTES) and kv.dtype == torch.float8_e4m3fn and not causal and is_fp8
        assert lengths.shape == (rows,) and block_table.shape == (rows, 0)
        assert metadata.tolist() == [[rows] * 8] * PARTS and splits.shape == (rows + 1,)
        keys = dequantize_kv(kv.reshape(-1, BYTES).view(torch.uint8)).bfloat16()
        out = sparse_mla(q[:, 0, :, :latent], q[:, 0, :, latent:], keys, indices[:, 0], scale)
        return [out[:, None], None]


def attention_of(heads: int) -> tuple[FlashMLAKV, TorchLibrary]:
    kernels = TorchLibrary()
    library = FlashMLALibrary("a test", sparse_mla, kernels.decode_metadata, kernels.decode)
    return FlashMLAKV(dims_of(heads), CPU, library), kernels


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 50.0, 3e4]),
    rows=st.integers(0, 5),
)
def test_quantized_keys_come_back_within_a_sixteenth(seed: int, scale: float, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    latent = (torch.randn((rows, 512), generator=generator) * scale).bfloat16()
    rope = torch.randn((rows, 64), generator=generator).bfloat16()
    packed = quantize_kv(latent, rope)
    assert packed.shape == (rows, 656) and packed.dtype == torch.uint8
    back = dequantize_kv(packed)
    assert torch.equal(back[:, 512:], rope.float())
    largest = latent.float().view(rows, 4, 128).abs().amax(dim=-1, keepdim=True).expand(rows, 4, 128)
    # e4m3 has 3 bits of mantissa; below 2^-6 of its own units its steps are even.
    bound = latent.float().abs() / 16 + largest.reshape(rows, 512) / 448 / 512
    assert ((back[:, :512] - latent.float()).abs() <= 1.001 * bound + 1e-30).all()


def test_bytes_lie_where_flashmla_reads_them() -> None:
    latent = torch.zeros((1, 512))
    latent[0, 128] = 896.0  # the second tile: scale 2, and the largest float8
    rope = torch.arange(64.0)[None]
    packed = quantize_kv(latent, rope)[0]
    assert packed[128].item() == 0x7E  # 448 in e4m3
    assert packed[512:528].view(torch.float32).tolist() == [1.0, 2.0, 1.0, 1.0]
    assert packed[528:].view(torch.bfloat16).tolist() == list(range(64))


@pytest.mark.parametrize("heads", [8, 64, 128])
def test_attention_over_the_fp8_pool(heads: int) -> None:
    generator = torch.Generator().manual_seed(heads)
    pool = FP8MLATokenToKVPool(7, 64, 2, 512, 64, 32, torch.bfloat16, CPU)
    slots = pool.kv_buffer[1].shape[0]
    latent = torch.randn((slots, 512), generator=generator).bfloat16()
    rope = torch.randn((slots, 64), generator=generator).bfloat16()
    pool.set_mla_kv_buffer(1, torch.arange(slots), latent, rope)
    assert not pool.kv_buffer[0].any()
    assert pool.memory_bytes() == 2 * slots * (656 + 2 * 32)

    attention, _ = attention_of(heads)
    lengths = torch.tensor([1, 0, 100, TOPK], dtype=torch.int32)
    topk_slots = torch.full((4, TOPK), -1, dtype=torch.int32)
    for row, n in enumerate(lengths.tolist()):
        topk_slots[row, :n] = torch.randperm(slots, generator=generator)[:n]
    q = torch.randn((4, heads, 576), generator=generator).bfloat16()
    metadata = decode_graph(attention, (0,), lengths).backends[4][0]
    out = attention.sparse_mla(
        q[..., :512], q[..., 512:], pool.kv_buffer[1], topk_slots, 0.1, metadata.reader
    )
    exact = sparse_mla(
        q[..., :512].float(), q[..., 512:].float(), torch.cat((latent, rope), dim=1).float(), topk_slots, 0.1
    )
    assert out.shape == (4, heads, 512)
    assert not out[1].any()
    assert ((out - exact).abs().amax() / exact.abs().amax()) < 0.1  # what FP8 keys cost


def decode_graph(
    attention: FlashMLAKV, offsets: tuple[int, ...], seq_lens: torch.Tensor, layout: str = "replicate"
) -> GraphMetadata:
    bs = seq_lens.shape[0]
    shape = MetadataShape(MetadataMode.DECODE, bs, 1, width=512, page_size=64, topk=TOPK)
    graph = GraphMetadata(
        MetadataSelection(True, layout, "torch"),
        shape,
        offsets,
        CPU,
        prepare=attention.prepare,
        reads=IMPLEMENTATIONS["flashmla_kv"].reads,
    )
    table = torch.arange(512, dtype=torch.int32)[None]
    for n in range(bs, 0, -1):
        shape_n = MetadataShape(MetadataMode.DECODE, n, 1, width=512, page_size=64, topk=TOPK)
        graph.capture(MetadataInputs(shape_n, seq_lens[:n], torch.zeros(n, dtype=torch.int32), table))
    return graph


@pytest.mark.parametrize("layout", ["replicate", "shared", "in_graph", "indirect"])
def test_flashmla_metadata_is_made_once_for_each_batch_size(layout: str) -> None:
    """Whatever the lengths, however many backends; and every backend holds it under SGLang's field names."""
    attention, kernels = attention_of(128)
    seq_lens = torch.ones(3, dtype=torch.int32)
    graph = decode_graph(attention, (1, 2, 3, 4, 5, 6, 7), seq_lens, layout)
    assert sorted(kernels.asked) == [1, 2, 3]
    for step in range(3):
        seq_lens += 50 * step
        graph.replay(3, -1)
        graph.run_in_graph(3)
    assert sorted(kernels.asked) == [1, 2, 3]
    fixed_fields = [f for f in FIELDS if f.backend.startswith("flashmla_metadata.")]
    assert len(fixed_fields) == 2
    for bs, backends in graph.backends.items():
        for fixed_field in fixed_fields:
            tensors = [fixed_field.of(metadata) for metadata in backends]
            assert all(tensor is tensors[0] for tensor in tensors)
        assert fixed_fields[1].of(backends[0]).shape == (bs + 1,)


@pytest.mark.parametrize(
    ("prefill", "decode", "page_size", "message"),
    [
        ("flashmla_kv", "auto", 64, "must be both --nsa-prefill-backend and"),
        ("triton", "flashmla_kv", 64, "got triton and flashmla_kv"),
        ("flashmla_kv", "flashmla_kv", 16, "needs --page-size a multiple of 64, got 16"),
    ],
)
def test_both_roles_must_read_the_same_cache(prefill: str, decode: str, page_size: int, message: str) -> None:
    args = ServerArgs(
        model_path="m",
        device="cuda",
        nsa_prefill_backend=prefill,
        nsa_decode_backend=decode,
        page_size=page_size,
    )
    with pytest.raises(ValueError, match=message):
        kv_pool_class(args)


def test_the_cache_follows_the_backends() -> None:
    assert kv_pool_class(ServerArgs(model_path="m", device="cpu")) is MLATokenToKVPool
    both = ServerArgs(
        model_path="m", device="cuda", nsa_prefill_backend="flashmla_kv", nsa_decode_backend="flashmla_kv"
    )
    assert kv_pool_class(both) is FP8MLATokenToKVPool
    with pytest.raises(ValueError, match="needs kv_lora_rank 512 and qk_rope_head_dim 64, got 64 and 16"):
        FP8MLATokenToKVPool(1, 64, 1, 64, 16, 32, torch.bfloat16, CPU)
