"""What a model's card offers to try: the `widget` of its front matter, as on the Hugging Face hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

logger = logging.getLogger(__name__)


def example_prompts(model_path: str) -> list[dict[str, str]]:
    """`{"title", "text"}` of each prompt; none without a card. A card that cannot be read is a warning."""
    path = Path(model_path) / "README.md"
    if not path.is_file():
        return []
    try:
        widget = ModelCard.load(path).data.get("widget")
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        logger.warning("%s has no front matter that can be read: %s", path, error)
        return []
    entries: list[Any] = widget if isinstance(widget, list) else []
    texts = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("text"), str)]
    return [
        {"title": str(entry.get("example_title", f"prompt {i}")), "text": entry["text"]}
        for i, entry in enumerate(texts, 1)
    ]
