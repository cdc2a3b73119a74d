"""What the server says of its metadata path: in the log at start, and in /get_server_info."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from sglang.srt.layers.attention.nsa.paths import MetadataSelection
from sglang.srt.model_executor.step_function import StepFunction

logger = logging.getLogger(__name__)


def log_metadata_paths(functions: Sequence[StepFunction]) -> None:
    for function in functions:
        graph = function.backend.graph_metadata
        held, separate = graph.table_bytes
        saving = "" if held == separate else f" instead of {separate / 2**20:.1f} MiB"
        logger.info(
            "NSA metadata of %s: path %s, %s, %d backend(s), page tables: %.1f MiB%s",
            function.name,
            graph.selection.path,
            graph.methods.copy,
            len(graph.offsets),
            held / 2**20,
            saving,
        )


def metadata_state(
    selection: MetadataSelection, functions: Sequence[StepFunction], draft_backends: int
) -> dict[str, Any]:
    """`nsa_metadata` of /get_server_info. Of functions that are not captured there is nothing to count."""
    graphs = [f.backend.graph_metadata for f in functions if f.backend.graph_metadata is not None]
    reasons = [g.fallback_reason for g in graphs if g.fallback_reason]
    return {
        "enabled": selection.enabled,
        "layout": selection.path,
        "copy": graphs[0].methods.copy if graphs else None,
        "draft_backends": draft_backends,
        "draft_seqlens": selection.draft_seqlens,
        "page_table_bytes": sum(g.table_bytes[0] for g in graphs),
        "replays": sum(g.replays for g in graphs),
        "fallbacks": sum(g.fallbacks for g in graphs),
        "fallback_reason": reasons[0] if reasons else None,
        "verify": selection.check_replays,
    }
