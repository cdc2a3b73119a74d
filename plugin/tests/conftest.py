"""These tests run in an environment of their own, beside a released SGLang (see `make test-plugin`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import stand_ins

if os.environ.get("PLUGIN_TEST_DEVICE", "cpu") == "cpu":
    stand_ins.install()

FLAGS = (
    "SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA",
    "SGLANG_DSA_ENABLE_MTP_PRECOMPUTE_METADATA",
    "SGLANG_NSA_PLUGIN_LAYOUT",
    "SGLANG_NSA_PLUGIN_BACKENDS",
    "SGLANG_NSA_PLUGIN_STRICT",
    "SGLANG_NSA_PLUGIN_ALTERNATE",
    "SGLANG_NSA_VERIFY_METADATA",
)


@pytest.fixture
def plugin(monkeypatch) -> Iterator[Callable]:
    """plugin(layout, kind, **flags): loads the plugin as SGLang does, through its entry point and
    HookRegistry. Returns the hooks of the kind, None where there are none."""
    import harness
    import sglang.srt.plugins as plugins
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang_nsa import entry
    from sglang_nsa.family import FAMILIES, find_installed
    from sglang_nsa.fields import MissingError

    before = []
    for kind in FAMILIES:
        try:
            installed = find_installed(kind)
        except MissingError:  # of a release that is beside packages of another
            continue
        owner = installed.wrapper_class
        before += [(owner, name, vars(owner)[name]) for name in ("__init__", *installed.family.methods)]
    registered = []
    original = entry.register
    monkeypatch.setattr(entry, "register", lambda: registered.append(original()))

    harness.replace_fused_copy(monkeypatch, None)
    if not harness.ON_GPU:
        monkeypatch.setenv("SGLANG_OPT_USE_TOPK_V2", "0")  # its planner is compiled for a GPU at first use

    def load(layout="shared", kind="nsa", **flags):
        for name in FLAGS:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("SGLANG_NSA_PLUGIN_LAYOUT", layout)
        monkeypatch.setenv("SGLANG_PLUGINS", "sglang_nsa")
        for name, value in flags.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(plugins, "_plugins_loaded", False)
        HookRegistry.reset()
        plugins.load_plugins()
        return registered[-1].get(kind)

    yield load
    HookRegistry.reset()
    for owner, name, method in before:
        setattr(owner, name, method)
