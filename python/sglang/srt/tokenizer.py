"""The tokenizer of a model's folder."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Names of the class that is nothing but the folder's tokenizer.json.
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


class HasAddedTokens(Protocol):
    @property
    def added_tokens_decoder(self) -> dict[int, Any]: ...


def load_tokenizer(path: str, local_files_only: bool = True) -> PreTrainedTokenizerBase:
    """As `AutoTokenizer` loads it. A folder that names the plain class is spared what `AutoTokenizer` imports
    to choose one (torch and every model's configuration): half of what the HTTP process does to start.

    Raises what transformers raises, all kinds of exceptions, where a file is missing or wrong.
    """
    if _is_plain(Path(path)):
        from transformers import PreTrainedTokenizerFast as Tokenizer  # a second to import
    else:
        from transformers import AutoTokenizer as Tokenizer
    return Tokenizer.from_pretrained(path, local_files_only=local_files_only)


def _is_plain(folder: Path) -> bool:
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return False
    return (
        isinstance(config, dict)
        and config.get("tokenizer_class") in PLAIN_CLASSES
        and "auto_map" not in config
        and (folder / "tokenizer.json").is_file()
    )


@functools.lru_cache(maxsize=4)
def special_tokens(tokenizer: HasAddedTokens) -> dict[int, str]:
    """What `skip_special_tokens` leaves out, also those without a role that `all_special_ids` knows."""
    added = tokenizer.added_tokens_decoder
    return {token_id: token.content for token_id, token in added.items() if token.special}
