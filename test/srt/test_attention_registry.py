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
from library_inputs import DEEPSEEK, random_inputs
from sglang.srt.layers.attention import registry, sparse_mla_flashinfer, sparse_mla_flashmla
from sglang.srt.layers.attention.nsa import indexer
from sglang.srt.layers.attention.nsa.schedules import NO_STATE
from sglang.srt.layers.attention.nsa.sparse_mla import sparse_mla
from sglang.srt.layers.attention.registry import (
    FILLING_ROWS,
    IMPLEMENTATIONS,
    select_attention_ops,
)
from sglang.srt.layers.attention.sparse_mla_flashinfer import FlashInferSparseMLA
from sglang.srt.layers.attention.sparse_mla_flashmla import FlashMLASparse, padded_heads
from sglang.srt.libraries import flashmla
from sglang.srt.libraries.flashinfer import load_flashinfer
from sglang.srt.libraries.flashmla import FlashMLALibrary, load_flashmla
from sglang.srt.server_args import NSA_BACKENDS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
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


def test_modules_do_not_import_libraries_before_they_are_chosen() -> None:
    assert not hasattr(sparse_mla_flashinfer, "flashinfer")
    assert not hasattr(flashmla, "sgl_kernel")
    assert FlashInferSparseMLA.__module__ == sparse_mla_flashinfer.__name__
