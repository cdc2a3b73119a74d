"""How SGLang finds the plugin, and what happens where it must not act."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import sys
from types import SimpleNamespace

import harness
import pytest
import torch
from sglang_nsa.family import FAMILIES, UnsupportedError, find_installed
from sglang_nsa.fields import MetadataForm, MissingError
from sglang_nsa.hooks import draft_metadata_of
from sglang_nsa.real_classes import Sizes, make_batch
from sglang_nsa.settings import Settings


def served(plugin, monkeypatch, steps=4, sizes=Sizes(topk=64), server_args=None, **flags):  # noqa: B008
    installed = plugin(**flags).installed
    harness.replace_constructor(monkeypatch, installed)
    wrapper = installed.wrapper_class(harness.model_runner(sizes, **(server_args or {})), 1, steps)
    return harness.Runner(installed, wrapper, 4)


def test_entry_point():
    (found,) = importlib.metadata.entry_points(group="sglang.srt.plugins", name="sglang_nsa")
    assert found.value == "sglang_nsa.entry:register"
    assert found.dist.name == "sglang-nsa-plugin"


def test_the_wheel_holds_core_and_kernels():
    from sglang_nsa.nsa.kernels import load_kernels

    library = load_kernels("cpu")
    assert library.__name__ == "sglang_nsa.sgl_kernel"
    assert "sgl_kernel" not in sys.modules or sys.modules["sgl_kernel"] is not library


def test_hooks_are_in_place(plugin):
    hooks = plugin()
    assert hooks.not_applied() == []
    for name in ("__init__", *hooks.installed.family.methods):
        assert hasattr(getattr(hooks.installed.wrapper_class, name), "__wrapped__")


def test_signatures_of_every_seam():
    installed = find_installed()
    for name, arguments in installed.family.methods.items():
        method = inspect.unwrap(getattr(installed.wrapper_class, name))
        assert tuple(inspect.signature(method).parameters)[1:] == arguments
    constructor = inspect.unwrap(installed.wrapper_class.__init__)
    parameters = list(inspect.signature(constructor).parameters)
    assert parameters[1:4] == ["model_runner", "topk", "speculative_num_steps"]


@pytest.mark.parametrize("name", ["SGLANG_NSA", "SGLANG_DSA"])
def test_flag_0_leaves_sglang_untouched(plugin, name):
    installed = find_installed()
    before = {m: installed.wrapper_class.__dict__[m] for m in installed.family.methods}
    assert plugin(**{f"{name}_ENABLE_MTP_PRECOMPUTE_METADATA": "0"}) is None
    assert before == {m: installed.wrapper_class.__dict__[m] for m in installed.family.methods}


@pytest.mark.parametrize(
    "flags",
    [
        {"SGLANG_NSA_PLUGIN_LAYOUT": "both"},
        {"SGLANG_NSA_PLUGIN_STRICT": "maybe"},
        {"SGLANG_NSA_PLUGIN_BACKENDS": "nsa,fa2"},
        {"SGLANG_NSA_PLUGIN_ALTERNATE": "-1"},
        {"SGLANG_NSA_VERIFY_METADATA": "2"},
    ],
)
def test_a_setting_that_does_not_parse_stops_the_start(plugin, flags):
    ((name, value),) = flags.items()
    with pytest.raises(SystemExit, match=rf"{name}.*{value}"):
        plugin(**flags)


def test_settings_of_an_empty_environment():
    assert Settings.from_environment({}) == Settings()


def unknown_release(monkeypatch):
    installed = find_installed()

    def init_cuda_graph_state(self, max_bs, max_num_tokens, something_new):
        raise AssertionError

    monkeypatch.setattr(installed.wrapper_class, "init_cuda_graph_state", init_cuda_graph_state)


def test_unknown_release_is_left_alone(plugin, monkeypatch, caplog):
    unknown_release(monkeypatch)
    assert plugin() is None
    (warning,) = [r for r in caplog.records if r.name.startswith("sglang_nsa") and r.levelname == "WARNING"]
    assert "something_new" in warning.getMessage()


def test_strict_stops_an_unknown_release(plugin, monkeypatch):
    unknown_release(monkeypatch)
    with pytest.raises(SystemExit, match="something_new"):
        plugin(SGLANG_NSA_PLUGIN_STRICT=1)


def test_strict_is_content_with_one_kind_that_imports(plugin, monkeypatch):
    """What does not import, no server can use either."""

    def missing(kind):
        raise MissingError("no such module")

    def only_nsa(kind):
        return find_installed(kind) if kind == "nsa" else missing(kind)

    monkeypatch.setattr("sglang_nsa.entry.find_installed", only_nsa)
    assert plugin(SGLANG_NSA_PLUGIN_STRICT=1).not_applied() == []
    assert plugin(kind="fa3", SGLANG_NSA_PLUGIN_STRICT=1) is None
    monkeypatch.setattr("sglang_nsa.entry.find_installed", missing)
    with pytest.raises(SystemExit, match="none of nsa, fa3 is there"):
        plugin(SGLANG_NSA_PLUGIN_STRICT=1)


def test_no_family_names_what_was_looked_for(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError) as caught:
        find_installed()
    assert all(family.module in str(caught.value) for family in FAMILIES["nsa"])


def run_and_compare(runner):
    """One replay; every backend holds the batch's lengths."""
    runner.capture(4)
    runner.replay(make_batch(runner.installed, [5, 300, 64, 65], [4, 1, 3, 2]), 4)
    for backend in runner.wrapper.attn_backends:
        found = backend.decode_cuda_graph_metadata[4].cache_seqlens_int32
        assert torch.equal(found, torch.tensor([5, 300, 64, 65], dtype=torch.int32))


def test_missing_library_shares_and_lets_sglang_refresh(plugin, monkeypatch, caplog):
    def missing(device_type):
        raise ImportError("no library here")

    monkeypatch.setattr("sglang_nsa.nsa.metadata_generators.load_kernels", missing)
    runner = served(plugin, monkeypatch, layout="in_graph")
    draft = draft_metadata_of(runner.wrapper)
    assert (draft.layout, draft.reason) == ("shared", "no library here")
    run_and_compare(runner)
    assert (draft.counters.generated, draft.counters.own_refreshes) == (0, 1)


LEFT_ALONE = [
    ({"enable_two_batch_overlap": True}, "two-batch overlap"),
    ({"enable_breakable_cuda_graph": True}, "breakable"),
]


@pytest.mark.parametrize("server_args, reason", LEFT_ALONE)
def test_a_server_that_is_left_alone(plugin, monkeypatch, caplog, server_args, reason):
    runner = served(plugin, monkeypatch, server_args=server_args)
    draft = draft_metadata_of(runner.wrapper)
    assert draft.layout is None and reason in draft.reason
    tables = {b.decode_cuda_graph_metadata["page_table"].data_ptr() for b in runner.wrapper.attn_backends}
    assert len(tables) == 3  # SGLang's own state, one for each backend
    run_and_compare(runner)


def resolved_settings(overlap=False, decode="full"):
    decode = SimpleNamespace(backend=decode)
    return SimpleNamespace(
        overlap=SimpleNamespace(enable_two_batch_overlap=overlap),
        graph=SimpleNamespace(cuda_graph_config=SimpleNamespace(decode=decode)),
    )


@pytest.mark.parametrize(
    "resolved, reason",
    [
        (resolved_settings(overlap=True), "two-batch overlap"),
        (resolved_settings(decode="breakable"), "decode graphs are breakable"),
        (resolved_settings(), None),
    ],
)
def test_what_a_server_has_resolved_counts(plugin, monkeypatch, resolved, reason):
    """From 0.5.19 on its arguments stay as they were given, and were all that was looked at: graphs made
    breakable by another flag or by a default were shared."""
    context = pytest.importorskip("sglang.srt.runtime_context", reason="a release that resolves in place")
    monkeypatch.setattr(context, "get_exec", lambda: resolved, raising=False)
    given = {"enable_two_batch_overlap": False, "cuda_graph_config": None}
    draft = draft_metadata_of(served(plugin, monkeypatch, server_args=given).wrapper)
    assert (draft.layout is None) == (reason is not None)
    assert reason is None or reason in draft.reason


def test_settings_lie_where_they_are_looked_for():
    """A setting that a release renames or moves would be taken for one that is off."""
    server_args = importlib.import_module("sglang.srt.server_args").ServerArgs
    try:
        utils = importlib.import_module("sglang.srt.arg_groups.arg_utils")
    except ModuleNotFoundError:
        utils = None  # an earlier release
    if hasattr(utils, "namespace_of"):  # in the process's context
        found = utils.namespace_of(server_args)
        assert found["enable_two_batch_overlap"] == "exec.overlap"
        assert found["cuda_graph_config"] == "exec.graph"
    else:
        names = {field.name for field in dataclasses.fields(server_args)}
        assert "enable_two_batch_overlap" in names
        assert names & {"enable_breakable_cuda_graph", "cuda_graph_config"}


def test_an_unknown_setting_is_left_alone(plugin, monkeypatch):
    runner = served(plugin, monkeypatch, server_args={"enable_two_batch_overlap": None})
    assert "no setting says" in draft_metadata_of(runner.wrapper).reason


def test_strict_stops_such_a_server(plugin, monkeypatch):
    with pytest.raises(SystemExit, match="two-batch overlap"):
        served(
            plugin, monkeypatch, server_args={"enable_two_batch_overlap": True}, SGLANG_NSA_PLUGIN_STRICT=1
        )


def test_wrapped_backends_are_left_alone(plugin, monkeypatch):
    installed = plugin().installed
    harness.replace_constructor(monkeypatch, installed)
    wrapper = installed.wrapper_class(harness.model_runner(Sizes(topk=64)), 1, 4)
    model_runner = harness.model_runner(Sizes(topk=64))
    wrapper.attn_backends[1] = type("Wrapped", (installed.backend_class,), {})(model_runner)
    runner = harness.Runner(installed, wrapper, 4)
    assert "Wrapped" in draft_metadata_of(wrapper).reason
    run_and_compare(runner)


def test_lengths_that_differ_by_step_are_left_alone(plugin, monkeypatch):
    """The day SGLang gives draft step i its own lengths, sharing would be wrong."""
    installed = plugin().installed
    harness.replace_constructor(monkeypatch, installed)
    wrapper = installed.wrapper_class(harness.model_runner(Sizes(topk=64)), 1, 4)
    replay = "init_forward_metadata_replay_cuda_graph_from_precomputed"
    copy = getattr(installed.backend_class, replay)

    def with_step(self, bs, precomputed, forward_mode):
        copy(self, bs, precomputed, forward_mode)
        self.decode_cuda_graph_metadata[bs].cache_seqlens_int32.add_(self.step)

    for step, backend in enumerate(wrapper.attn_backends):
        backend.step = step
    monkeypatch.setattr(installed.backend_class, replay, with_step)
    wrapper.init_cuda_graph_state(4, 4)
    draft = draft_metadata_of(wrapper)
    assert draft.layout is None and "differ from each other: " in draft.reason


def test_unknown_fields_are_refreshed_by_sglang(plugin, monkeypatch):
    monkeypatch.setattr(MetadataForm, "unknown", lambda form, metadata: ["pooled_something"])
    runner = served(plugin, monkeypatch)
    draft = draft_metadata_of(runner.wrapper)
    assert draft.layout == "shared" and "pooled_something" in draft.reason
    run_and_compare(runner)
    assert draft.counters.own_refreshes == 1


def test_inputs_that_are_not_in_the_buffers_fall_back(plugin, monkeypatch, caplog):
    """A runner that does not copy the batch into its buffers first: only the batch itself can be read."""
    runner = served(plugin, monkeypatch)
    runner.capture(4)
    monkeypatch.setattr(runner.buffers, "set", lambda batch, bs: batch)
    runner.replay(make_batch(runner.installed, [5, 300, 64, 65], [4, 1, 3, 2]), 4)
    for backend in runner.wrapper.attn_backends:
        found = backend.decode_cuda_graph_metadata[4].cache_seqlens_int32
        assert torch.equal(found, torch.tensor([5, 300, 64, 65], dtype=torch.int32))
    assert "buffers do not hold the batch" in caplog.text


def test_alternation_measures_both_paths(plugin, monkeypatch):
    runner = served(plugin, monkeypatch, SGLANG_NSA_PLUGIN_ALTERNATE=10)
    runner.capture(4)
    for _ in range(40):
        runner.replay(make_batch(runner.installed, [5, 300, 64, 65], [4, 1, 3, 2]), 4)
    (row,) = draft_metadata_of(runner.wrapper)._alternation.table()
    assert row["bs"] == 4 and row["host_sglang_n"] > 0 and row["host_plugin_n"] > 0
    assert draft_metadata_of(runner.wrapper).counters.generated == 20


def test_doctor_says_what_would_happen(plugin, capsys, monkeypatch):
    from sglang_nsa.__main__ import main

    for name in ("SGLANG_NSA_PLUGIN_LAYOUT", "SGLANG_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    harness.replace_fused_copy(monkeypatch, None)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "shared" in said and "one launch of the plugin" in said
    monkeypatch.setenv("SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA", "0")
    assert main(["doctor"]) == 1


def test_prometheus_series(plugin, monkeypatch, tmp_path):
    """Where SGLang serves metrics it names a directory; the series go to the same registry."""
    from prometheus_client import REGISTRY, generate_latest

    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    before = set(REGISTRY._collector_to_names)
    try:
        runner = served(plugin, monkeypatch)
        runner.capture(4)
        for _ in range(64):
            runner.replay(make_batch(runner.installed, [5, 300, 64, 65], [4, 1, 3, 2]), 4)
        text = generate_latest().decode()
    finally:
        for collector in set(REGISTRY._collector_to_names) - before:
            REGISTRY.unregister(collector)
    assert 'sglang:nsa_plugin_replays_total{by="plugin",rank="0"} 64.0' in text
    assert 'sglang:nsa_plugin_draft_backends{layout="shared",rank="0"} 3.0' in text
    assert "sglang:nsa_plugin_page_table_bytes_saved" in text
