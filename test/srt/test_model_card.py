"""The prompts that a model's card offers, and the page that shows them."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from server_fixture import ROOT
from sglang.srt.model_card import example_prompts


def test_the_shipped_models_card_has_two() -> None:
    prompts = example_prompts(str(ROOT / "models" / "tiny-nsa"))
    assert [p["title"] for p in prompts] == ["a program's main", "an optional import"]
    assert prompts[1]["text"] == "try:\n    import json\nexcept"


ONE = b"---\nwidget:\n- text: a b\n---\n"
WRONG_ENTRIES = b"---\nwidget:\n- 3\n- text: [1]\n- text: x\n  example_title: 7\n---\n"
CARDS: dict[str, tuple[bytes | None, list[dict[str, str]], bool]] = {  # name: card, prompts, is it a warning
    "no card": (None, [], False),
    "bare": (b"# no front matter", [], False),
    "no widget": (b"---\nlicense: mit\n---\n", [], False),
    "one": (ONE, [{"title": "prompt 1", "text": "a b"}], False),
    "wrong entries": (WRONG_ENTRIES, [{"title": "7", "text": "x"}], False),
    "wrong widget": (b"---\nwidget: x\n---\n", [], False),
    "no yaml": (b"---\nwidget: [\n---\n", [], True),
    "a list": (b"---\n- 1\n---\n", [], True),
    "no utf-8": (b"---\n\xff\n---\n", [], True),
}


@pytest.mark.parametrize("name", CARDS)
def test_cards(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    card, expected, warns = CARDS[name]
    if card is not None:
        (tmp_path / "README.md").write_bytes(card)
    assert example_prompts(str(tmp_path)) == expected
    assert any("front matter" in record.message for record in caplog.records) == warns


def test_the_page_is_served_and_may_load_nothing_else(client: httpx.Client) -> None:
    """Its behaviour is tested in a browser, by test/page."""
    page = client.get("/", headers={"Accept": "text/html"})
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "//" not in policy
    assert client.get("/page/page.js").headers["content-type"] == "text/javascript; charset=utf-8"
    for path in ("/page/routes.py", "/page/..%2froutes.py", "/page/"):
        assert client.get(path).status_code == 404
    assert client.head("/").status_code == 200
    assert client.get("/get_model_info").json()["example_prompts"] == []
