"""The entry point of group `sglang.srt.plugins`: SGLang calls it once in each of its processes."""

from __future__ import annotations

import logging

from .family import UnsupportedError, find_installed
from .hooks import Hooks
from .settings import Settings

logger = logging.getLogger(__name__)


def register() -> Hooks | None:
    """Registers the hooks; SGLang applies them once all plugins are loaded.

    An Exception here SGLang would only log, and start without the plugin; so what must stop it is SystemExit.
    """
    try:
        settings = Settings.from_environment()
    except ValueError as error:
        raise SystemExit(f"sglang-nsa-plugin: {error}") from error
    if not settings.enabled:
        logger.info("sglang-nsa-plugin: MTP precompute is switched off; SGLang's own path is untouched")
        return None
    try:
        installed = find_installed()
    except Exception as error:
        reason = str(error) if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {error}"
        if settings.strict:
            raise SystemExit(f"sglang-nsa-plugin (strict): {reason}") from error
        logger.warning("sglang-nsa-plugin leaves this SGLang alone: %s", reason)
        return None
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hooks = Hooks(installed, settings)
    for target, hook in hooks.by_target.items():
        HookRegistry.register(target, hook, HookType.AROUND)
    return hooks
