"""GET / in a real browser, with real servers of the small model."""

from __future__ import annotations

import signal
from collections import Counter
from itertools import pairwise

import httpx
import pytest
from page_driver import KEY, MODEL, Page
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from server_fixture import ROOT, RunningServer
from sglang.srt.model_card import example_prompts

PHONE = 390
HOSTILE = "<script>document.title = 1</script>"
SOURCES = range(5)  # of four draft steps


def generate(server: RunningServer, text: str, tokens: int) -> dict:
    """What the page asks for, asked without it."""
    body = {"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": tokens}}
    with server.client() as client:
        return client.post("/generate", json=body | {"return_token_sources": True}).raise_for_status().json()


def test_an_answer_with_the_sources_of_its_tokens(browser: Chrome, open_server: RunningServer) -> None:
    page = Page(browser, open_server.url).connect()
    examples = example_prompts(str(MODEL))
    assert len(examples) == 2 and page.text("model") == "tiny-nsa"
    for i, example in enumerate(examples):
        page.get(f"example-{i}").click()
        assert page.get("prompt").get_property("value") == example["text"]
        page.complete(tokens=48)
        answer = generate(open_server, example["text"], 48)
        offsets = answer["meta_info"]["output_text_offsets"]
        expected = [
            (source, answer["text"][a:b])
            for source, (a, b) in zip(answer["meta_info"]["output_token_sources"], pairwise([0, *offsets]))
        ]
        assert page.tokens() == [pair for pair in expected if pair[1]]
        assert page.text("answer") == example["text"] + answer["text"]
        counts = Counter(answer["meta_info"]["output_token_sources"])
        shown = [int(n.text) for n in page.get("sources").find_elements(By.CLASS_NAME, "count")]
        assert shown == [counts[source] for source in SOURCES] and sum(shown) == 48
        length = answer["meta_info"]["spec_accept_length"]
        assert page.text("accept-length") == f"{length:.2f}"
        assert float(page.text("speed")) > 0
        for chart in ("accept-chart", "speed-chart"):
            points = page.get(chart).find_element(By.TAG_NAME, "polyline").get_attribute("points")
            assert len(points.split()) >= 5
    assert page.console() == []


def test_the_metadata_path_is_the_servers(browser: Chrome, open_server: RunningServer) -> None:
    page = Page(browser, open_server.url).connect()
    page.complete(tokens=32)
    page.wait(lambda: "with this answer" in page.text("metadata"), "the replays of the answer")
    state = open_server.internal_state()["nsa_metadata"]
    rows = [d.text for d in page.get("metadata").find_elements(By.TAG_NAME, "dd")]
    assert rows[:3] == [state["layout"], state["copy"], str(state["draft_backends"])]
    total, _, rest = rows[3].partition(" (+")
    assert total == f"{state['replays']:,}" and int(rest.split()[0]) > 0
    assert rows[4].split(":")[0] == str(state["fallbacks"])


def test_the_key_is_asked_for_and_stays_in_the_tab(browser: Chrome, guarded_server: RunningServer) -> None:
    page = Page(browser, guarded_server.url)
    page.wait(lambda: page.get("key-dialog").is_displayed(), "the page asks for the key")
    assert page.focus == "key"
    page.type("wrong", Keys.ENTER)
    page.wait(lambda: "refused" in page.text("key-message"), "a wrong key is refused")
    page.type(KEY, Keys.ENTER)
    page.connect()
    page.complete(tokens=8)
    assert page.script("return localStorage.length") == 0 and page.script("return document.cookie") == ""
    page.browser.refresh()
    page.connect()  # the tab still knows it
    again = Page(browser, guarded_server.url)
    again.wait(lambda: again.get("key-dialog").is_displayed(), "another tab does not")
    again.type(Keys.ESCAPE)
    assert "API key" in again.error()
    again.send("x")
    again.wait(lambda: again.get("key-dialog").is_displayed(), "a request asks again")


@pytest.mark.parametrize("width", [320, PHONE])
def test_a_phones_width(browser: Chrome, open_server: RunningServer, width: int) -> None:
    page = Page(browser, open_server.url, width, 844).connect()
    page.get("numbers").click()
    page.complete("x = " + "very_long_name_" * 20, tokens=48)
    widths = page.script("return [document.documentElement.scrollWidth, innerWidth]")
    assert widths == [width, width], "the page scrolls sideways"
    for id in ("prompt", "send", "answer", "sources", "metadata", "speed-chart"):
        box = page.get(id).rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["width"] > 0, id
    assert page.get("send").rect["height"] >= 40  # a finger's


def test_keyboard_only(browser: Chrome, open_server: RunningServer) -> None:
    page = Page(browser, open_server.url).connect()
    page.tab_to("example-0")
    page.type(Keys.ARROW_DOWN)
    assert page.get("prompt").get_property("value") == example_prompts(str(MODEL))[1]["text"]
    page.tab_to("prompt")
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert page.script(outline) == "solid", "the focus can be seen"
    page.type(Keys.CONTROL, "a", Keys.NULL)
    page.type("import os\n")
    page.tab_to("max-new-tokens")
    page.type(Keys.CONTROL, "a", Keys.NULL)
    page.type("2000")
    page.tab_to("temperature")
    page.tab_to("send")
    page.type(Keys.ENTER)
    page.wait(lambda: len(page.tokens()) > 3, "the answer comes")
    page.type(Keys.ESCAPE)
    page.wait(lambda: "stopped" in page.text("status"), "Esc stops")
    open_server.wait_state(num_running_reqs=0)
    assert page.focus == "send"
    page.tab_to("answer")
    page.tab_to("numbers")
    page.type(Keys.SPACE)
    number = 'return getComputedStyle(document.querySelector(".token"), "::before").content'
    assert page.script(number) == '"0"'
    page.tab_to("prompt")
    page.fill("max-new-tokens", "4")
    page.type(Keys.CONTROL, Keys.ENTER)
    page.wait(
        lambda: "4 tokens" in page.text("status") and "ended" in page.text("status"), "Ctrl Enter sends"
    )


def test_every_control_has_a_name(browser: Chrome, open_server: RunningServer) -> None:
    page = Page(browser, open_server.url).connect()
    tree = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = {"textbox", "spinbutton", "button", "radio", "checkbox", "image", "group", "region", "form"}
    named = [
        (node["role"]["value"], node["name"]["value"])
        for node in tree
        if not node["ignored"] and node["role"]["value"] in controls
    ]
    assert {role for role, _ in named} >= controls - {"image", "group"}
    assert all(name for _, name in named), named


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read_and_told_apart(browser: Chrome, open_server: RunningServer, scheme: str) -> None:
    """Contrast by WCAG 2: text at least 4.5. Sources differ in lightness or, the target's own, in hue."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page = Page(browser, open_server.url).connect()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.complete(tokens=64)
    pixels = page.script("""
        const canvas = document.createElement("canvas").getContext("2d");
        const rgb = (colour) => {
            canvas.fillStyle = colour;
            canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
        };
        const swatches = [...document.querySelectorAll("#sources .name .swatch")];
        const fills = swatches.map((swatch) => rgb(getComputedStyle(swatch).backgroundColor));
        const pairs = fills.map((fill) => [rgb(getComputedStyle(document.body).color), fill]);
        for (const id of ["status", "description", "send", "stop", "prompt"]) {
            let style = getComputedStyle(document.getElementById(id));
            let at = document.getElementById(id);
            while (getComputedStyle(at).backgroundColor === "rgba(0, 0, 0, 0)") at = at.parentElement;
            pairs.push([rgb(style.color), rgb(getComputedStyle(at).backgroundColor)]);
        }
        return [pairs, fills];
    """)
    pairs, fills = pixels
    for text, ground in pairs:
        assert contrast(text, ground) >= 4.5, (text, ground)
    drafts = [luminance(fill) for fill in fills[1:]]
    steps = [contrast(a, b) for a, b in pairwise(fills[1:])]
    assert drafts == sorted(drafts, reverse=scheme == "light") and min(steps) > 1.05
    assert fills[0][0] > fills[0][2] and all(fill[0] < fill[2] for fill in fills[1:])  # warm against cold


def luminance(rgb: list[int]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: list[int], b: list[int]) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_the_servers_error_is_shown_and_the_next_request_works(
    browser: Chrome, open_server: RunningServer
) -> None:
    page = Page(browser, open_server.url).connect()
    page.send(tokens=100_000)
    assert "max_new_tokens is 100000" in page.error()
    page.complete(tokens=4)
    assert not page.get("error").is_displayed() and page.tokens()


def test_hostile_output_is_text(browser: Chrome, open_server: RunningServer) -> None:
    prompt = f'text = "{HOSTILE}"\n' * 6
    page = Page(browser, open_server.url).connect()
    page.complete(prompt, tokens=60)
    assert HOSTILE in page.text("answer").removeprefix(prompt), "the model does not repeat it"
    assert page.script('return document.querySelectorAll("#answer *:not(span)").length') == 0
    assert page.browser.title.startswith("tiny-nsa")
    markup = "document.getElementById('answer').innerHTML = '<b>x</b>'"
    caught = f"try {{ {markup}; return 'taken'; }} catch (error) {{ return error.name; }}"
    assert page.script(caught) == "TypeError", "the policy lets text become HTML"


def test_the_policy_names_no_other_host(open_server: RunningServer) -> None:
    response = httpx.get(open_server.url)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "//" not in policy
    for file in (ROOT / "python" / "sglang" / "srt" / "entrypoints" / "page").iterdir():
        if file.suffix in (".html", ".css", ".js"):
            assert "//" not in file.read_text().replace("// ", ""), f"{file.name} names a host"
    assert httpx.get(open_server.url + "/page/routes.py").status_code == 404


def test_screenshot(browser: Chrome, open_server: RunningServer, pytestconfig: pytest.Config) -> None:
    page = Page(browser, open_server.url, 1280, 870).connect()
    page.complete(tokens=128)
    picture = page.browser.get_screenshot_as_png()
    assert picture.startswith(b"\x89PNG")
    if target := pytestconfig.getoption("--screenshot"):
        target.write_bytes(picture)


def test_the_server_goes_away_in_a_stream(browser: Chrome, guarded_server: RunningServer) -> None:
    """Last: it kills the server. What has come stays."""
    page = Page(browser, guarded_server.url)
    page.wait(lambda: page.get("key-dialog").is_displayed(), "the page asks for the key")
    page.type(KEY, Keys.ENTER)
    page.connect()
    page.send(tokens=2000)
    page.wait(lambda: len(page.tokens()) > 3, "the answer comes")
    guarded_server.process.send_signal(signal.SIGKILL)
    assert "connection" in page.error().lower()
    assert len(page.tokens()) > 3 and page.get("send").is_enabled()
    page.get("send").click()
    page.wait(lambda: "cannot be reached" in page.text("error"), "the next request says so")
