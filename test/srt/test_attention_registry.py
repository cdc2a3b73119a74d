"""Which implementation of sparse attention a name stands for, and why one is not available."""

from __future__ import annotations

import importlib.util
import logging
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention import registry, sparse_mla_flashinfer, sparse_mla_flashmla
from sglang.srt.layers.attention.nsa import indexer
from sglang.srt.layers.attention.nsa.dims import AttentionDims
from sglang.srt.layers.attention.nsa.indexer import select_topk
from sglang.srt.layers.attention.nsa.metadata import MetadataMode, MetadataShape, as_backend_metadata
from sglang.srt.layers.attention.nsa.nsa_backend_mtp_precompute import MetadataInputs, precompute_metadata
from sglang.srt.layers.attention.nsa.schedules import NO_STATE
from sglang.srt.layers.attention.nsa.sparse_mla import sparse_mla
from sglang.srt.layers.attention.registry import (
    FILLING_ROWS,
    IMPLEMENTATIONS,
    SparseAttentionOps,
    select_attention_ops,
)
from sglang.srt.layers.attention.sparse_mla_flashinfer import FlashInferSparseMLA, read_plan
from sglang.srt.layers.attention.sparse_mla_flashmla import FlashMLAKV, FlashMLASparse, padded_heads
from sglang.srt.libraries import flashmla
from sglang.srt.libraries.flashinfer import load_flashinfer
from sglang.srt.libraries.flashmla import FlashMLALibrary, load_flashmla
from sglang.srt.server_args import NSA_BACKENDS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEEPSEEK = AttentionDims(
    num_attention_heads=128,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    index_topk=2048,
    softmax_scale=192**-0.5,
    dtype=torch.bfloat16,
)
WRONG_DIMS = [
    ("kv_lora_rank", 64),
    ("qk_rope_head_dim", 16),
    ("dtype", torch.float32),
]


def test_server_args_offer_what_there_is() -> None:
    assert set(NSA_BACKENDS) == {"auto", *IMPLEMENTATIONS}


def test_auto_on_the_cpu_is_torch_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, registry.__name__):
        ops = select_attention_ops("auto", CPU, "decode", DEEPSEEK)
    assert ops.name == "torch" and ops.prepare is None
    assert "decode: auto chose torch" in caplog.text


@pytest.fixture
def triton_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's place taken by torch, so that what `auto` makes of it runs anywhere."""
    monkeypatch.setitem(IMPLEMENTATIONS, "triton", IMPLEMENTATIONS["torch"])
    monkeypatch.setitem(sys.modules, f"{indexer.__package__}.indexer_triton", indexer)


def test_auto_on_cuda_takes_flashmla_for_many_rows(
    triton_in_torch: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows_seen = []

    def sparse_fwd(q, kv, indices, scale, latent):
        rows_seen.append(q.shape[0])
        return [sparse_mla(q[..., :latent], q[..., latent:], kv[:, 0], indices[:, 0], scale)]

    library = FlashMLALibrary("a test", sparse_fwd)
    monkeypatch.setattr(sparse_mla_flashmla, "load_flashmla", lambda: library)
    dims = replace(DEEPSEEK, num_attention_heads=8, index_topk=128)
    with caplog.at_level(logging.INFO, registry.__name__):
        ops = select_attention_ops("auto", CUDA, "prefill", dims)
    assert f"prefill: auto chose flashmla_sparse from {FILLING_ROWS} rows, torch below" in caplog.text
    assert ops.padding_slot == -1 and not ops.fixed_topk
    assert ops.reads == IMPLEMENTATIONS["flashmla_sparse"].reads
    for rows in (1, FILLING_ROWS - 1, FILLING_ROWS, FILLING_ROWS + 1):
        q_nope, q_rope, kv, slots = random_inputs(rows, 8, 128)
        out = ops.sparse_mla(q_nope, q_rope, kv, slots, 0.1, NO_STATE)
        torch.testing.assert_close(out, sparse_mla(q_nope, q_rope, kv, slots, 0.1))
    assert rows_seen == [FILLING_ROWS, FILLING_ROWS + 1]


@pytest.mark.parametrize(("name", "value"), WRONG_DIMS)
def test_auto_on_cuda_says_why_not_flashmla(
    name: str, value: object, triton_in_torch: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, registry.__name__):
        ops = select_attention_ops("auto", CUDA, "decode", replace(DEEPSEEK, **{name: value}))
    assert ops.name == "torch"
    assert f"decode: auto chose torch; not flashmla_sparse: FlashMLA needs {name}" in caplog.text


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


def test_a_flashmla_that_does_not_run_on_the_device_is_an_import_error() -> None:
    def sparse_fwd(*_: object) -> None:
        raise RuntimeError("no kernel image is available")

    attention = FlashMLASparse(DEEPSEEK, FlashMLALibrary("a test", sparse_fwd))
    with pytest.raises(ImportError, match="a test does not run on cpu: no kernel image"):
        attention.check_runs(CPU)


@pytest.mark.parametrize("legacy", [True, False])
def test_sgl_flash_mla_is_asked_for_the_kernels_of_v32(legacy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_mla_sparse_fwd(
        q, kv, indices, sm_scale, d_v=512, topk_length=None, use_legacy=False, return_log2_lse=None
    ):
        return topk_length, use_legacy, return_log2_lse

    module = SimpleNamespace(
        flash_mla_sparse_fwd=flash_mla_sparse_fwd, has_legacy=lambda: legacy, __version__="1.0.0"
    )
    monkeypatch.setitem(sys.modules, "flash_mla", module)
    if legacy:
        library = flashmla._from_module("flash_mla")
        assert library.source == "flash_mla 1.0.0" and library.takes_lengths
        assert library.sparse_fwd(None, None, None, 0.1, 512, topk_length=3) == (3, True, False)
    else:
        with pytest.raises(ImportError, match=r"1\.0\.0 was built without the kernels of DeepSeek-V3.2"):
            flashmla._from_module("flash_mla")


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"for decode must be auto or one of \['torch'.*got 'fa3'"):
        select_attention_ops("fa3", CPU, "decode")


@pytest.mark.parametrize("name", [n for n, i in IMPLEMENTATIONS.items() if i.of_library])
def test_a_library_needs_cuda_and_the_dims(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} for decode needs CUDA, got cpu"):
        select_attention_ops(name, CPU, "decode", DEEPSEEK)
    with pytest.raises(ValueError, match=f"{name} for decode needs the model's dims"):
        select_attention_ops(name, CUDA, "decode")


def test_flashinfer_does_not_serve_prefill() -> None:
    with pytest.raises(ValueError, match="flashinfer serves decode only, got it for prefill"):
        select_attention_ops("flashinfer", CUDA, "prefill", DEEPSEEK)


@pytest.mark.parametrize(("name", "value"), WRONG_DIMS)
@pytest.mark.parametrize("implementation", ["flashinfer", "flashmla_sparse", "flashmla_kv"])
def test_a_model_that_a_library_cannot_serve_is_named(implementation: str, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"needs {name} .*, got {value}"):
        select_attention_ops(implementation, CUDA, "decode", replace(DEEPSEEK, **{name: value}))


@pytest.mark.parametrize(("name", "value"), [*WRONG_DIMS, ("index_topk", 192), ("num_attention_heads", 129)])
def test_flashmla_names_what_it_cannot_serve(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"FlashMLA needs {name} .*, got {value}"):
        padded_heads(replace(DEEPSEEK, **{name: value}))


@pytest.mark.parametrize(("heads", "padded"), [(1, 64), (8, 64), (64, 64), (65, 128), (128, 128)])
def test_flashmla_pads_heads(heads: int, padded: int) -> None:
    assert padded_heads(replace(DEEPSEEK, num_attention_heads=heads)) == padded


# ---- libraries that are not there, or not the right ones


def install(folder: Path, name: str, version: str, files: tuple[str, ...] = ()) -> None:
    """A distribution with only its records, as pip leaves it."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{f},,\n" for f in files))
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"not a shared object")


@pytest.fixture
def empty_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of sys.path, in which distributions are found first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    load_flashmla.cache_clear()
    load_flashinfer.cache_clear()
    yield tmp_path
    load_flashmla.cache_clear()
    load_flashinfer.cache_clear()


def installed(*names: str) -> bool:
    return any(map(importlib.util.find_spec, names))


def carries_flashmla() -> bool:
    names = {distribution.name for distribution in metadata.distributions()}
    return bool(names & {"sglang-kernel", "sgl-kernel"}) or installed("flash_mla", "sgl_flash_mla")


@pytest.mark.skipif(carries_flashmla(), reason="FlashMLA is installed")
def test_flashmla_missing_or_unloadable_is_an_import_error(empty_site: Path) -> None:
    with pytest.raises(ImportError, match=r"flash_mla: No module named.*sglang-kernel: not installed"):
        load_flashmla()
    install(empty_site, "sgl-kernel", "0.1.0", ("sgl_kernel_x/other.so",))
    with pytest.raises(ImportError, match=r"sgl-kernel: version 0\.1\.0 carries no flashmla_ops"):
        load_flashmla()
    install(empty_site, "sglang-kernel", "0.4.2", ("sgl_kernel_x/flashmla_ops.abi3.so",))
    with pytest.raises(
        ImportError, match=r"sglang-kernel: .*flashmla_ops.abi3.so: .*(invalid ELF|too short)"
    ):
        load_flashmla()


@pytest.mark.skipif(carries_flashmla(), reason="FlashMLA is installed")
@pytest.mark.parametrize("name", ["flashmla_sparse", "flashmla_kv"])
def test_flashmla_asked_for_by_name_names_the_reason(empty_site: Path, name: str) -> None:
    with pytest.raises(ImportError, match=f"{name} for decode: FlashMLA is not available"):
        select_attention_ops(name, CUDA, "decode", DEEPSEEK)


@pytest.mark.parametrize("version", ["0.2.8", "0.6.10.post1", "0.6.10rc3"])
def test_an_old_flashinfer_is_an_import_error(empty_site: Path, version: str) -> None:
    install(empty_site, "flashinfer-python", version)
    with pytest.raises(ImportError, match=f"flashinfer-python 0.6.11 or later is needed, found {version}"):
        load_flashinfer("mla")


def test_a_flashinfer_that_breaks_at_import_is_an_import_error(empty_site: Path) -> None:
    install(empty_site, "flashinfer-python", "0.6.11")
    (empty_site / "flashinfer").mkdir()
    (empty_site / "flashinfer" / "__init__.py").write_text("raise AttributeError('no such driver')")
    loaded = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "flashinfer"}
    try:
        with pytest.raises(
            ImportError, match=r"0\.6\.11 does not import: AttributeError\('no such driver'\)"
        ):
            load_flashinfer("mla")
    finally:
        sys.modules.update(loaded)


@pytest.mark.skipif(installed("flashinfer"), reason="flashinfer is installed")
def test_flashinfer_missing_is_an_import_error(empty_site: Path) -> None:
    with pytest.raises(ImportError, match="flashinfer for decode: flashinfer-python is not installed"):
        select_attention_ops("flashinfer", CUDA, "decode", DEEPSEEK)


# ---- what goes into and comes out of the kernels, with the kernel's part in torch


def random_inputs(rows: int, heads: int, topk: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * heads)
    q = torch.randn((rows, heads, 576), generator=generator).bfloat16()
    kv = torch.randn((4 * topk, 576), generator=generator).bfloat16()
    kv[0] = float("nan")  # nobody reads the slot of padded rows
    slots = torch.full((rows, topk), -1, dtype=torch.int32)
    for row in range(rows):
        n = (0, 1, topk // 3, topk)[row % 4]
        slots[row, :n] = torch.randperm(4 * topk - 1, generator=generator)[:n].int() + 1
    return q[..., :512], q[..., 512:], kv, slots


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


def test_modules_do_not_import_libraries_before_they_are_chosen() -> None:
    assert not hasattr(sparse_mla_flashinfer, "flashinfer")
    assert not hasattr(flashmla, "sgl_kernel")
    assert FlashInferSparseMLA.__module__ == sparse_mla_flashinfer.__name__
