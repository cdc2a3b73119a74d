"""A tokenizer loaded by the short way is the one that `AutoTokenizer` loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers
from sglang.srt.tokenizer import PLAIN_CLASSES, load_tokenizer

TEXTS = ("def f(x):\n    return x", " <user>\u00e9\u4e2d <eos>", "", "a  b .")
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<bos>"}]


@pytest.fixture
def folder(dummy_model: Path, tmp_path: Path) -> Path:
    shutil.copytree(dummy_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "model"


def declare(folder: Path, tokenizer_class: str) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": tokenizer_class}))


@pytest.mark.parametrize("tokenizer_class", [*PLAIN_CLASSES, "LlamaTokenizerFast"])
def test_as_auto_tokenizer_loads_it(folder: Path, tokenizer_class: str) -> None:
    declare(folder, tokenizer_class)
    expected, given = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(str(folder))
    assert type(given) is type(expected)
    assert given.all_special_ids == expected.all_special_ids
    for text in TEXTS:
        ids = expected.encode(text)
        assert given.encode(text) == ids
        for hidden in (False, True):
            options = {"skip_special_tokens": hidden}
            assert given.decode(ids, **options) == expected.decode(ids, **options)
    prompts = [tokenizer.apply_chat_template(MESSAGES, tokenize=False) for tokenizer in (given, expected)]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize("config", ["{", "[]", None])
def test_a_wrong_file_is_named_as_auto_tokenizer_names_it(folder: Path, config: str | None) -> None:
    """The short way is left to files that are as they should be."""
    (folder / "tokenizer.json").unlink()
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config)
    errors = []
    for load in (transformers.AutoTokenizer.from_pretrained, load_tokenizer):
        with pytest.raises(Exception) as error:  # transformers raises all kinds
            load(str(folder))
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]
