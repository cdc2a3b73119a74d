"""The entry point of group `sglang.srt.plugins`: SGLang calls it once in each of its processes."""

from __future__ import annotations

import logging

from .counters import Counters
from .family import MissingError, UnsupportedError, find_installed
from .hooks import Hooks
from .settings import Settings

logger = logging.getLogger(__name__)


def register() -> dict[str, Hooks]:
    """Registers the hooks of each kind of backend; SGLang applies them once all plugins are loaded.

    An Exception here SGLang would only log, and start without the plugin; so what must stop it is SystemExit.
    """
    try:
        settings = Settings.from_environment()
    except ValueError as error:
        raise SystemExit(f"sglang-nsa-plugin: {error}") from error
    if not settings.enabled:
        logger.info("sglang-nsa-plugin: MTP precompute is switched off; SGLang's own path is untouched")
        return {}
    counters = Counters()
    hooks = {kind: found for kind in settings.backends if (found := _hooks(kind, settings, counters))}
    if settings.strict and not hooks:
        raise SystemExit(f"sglang-nsa-plugin (strict): none of {', '.join(settings.backends)} is there")
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    # Merged: where the captured draft function begins is one place for all kinds.
    by_target = {target: hook for found in hooks.values() for target, hook in found.by_target.items()}
    for target, hook in by_target.items():
        HookRegistry.register(target, hook, HookType.AROUND)
    return hooks


def _hooks(kind: str, settings: Settings, counters: Counters) -> Hooks | None:
    try:
        return Hooks(find_installed(kind), settings, counters)
    except Exception as error:
        reason = str(error) if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {error}"
        if settings.strict and not isinstance(error, MissingError):
            raise SystemExit(f"sglang-nsa-plugin (strict): {kind}: {reason}") from error
        logger.warning("sglang-nsa-plugin leaves this SGLang's %s backends alone: %s", kind, reason)
        return None
