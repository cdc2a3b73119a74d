"""The page as its user sees it: what is on it, and what can be done with a keyboard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from server_fixture import ROOT

MODEL = ROOT / "models" / "tiny-nsa"
KEY = "a secret key"
TIMEOUT_S = 60


class Page:
    """The page of one server, opened anew, in a session that knows no key."""

    def __init__(self, browser: Chrome, url: str, width: int = 1280, height: int = 1000) -> None:
        self.browser = browser
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get_log("browser")  # of the test before
        browser.switch_to.new_window("tab")  # a session of its own
        old = next(handle for handle in browser.window_handles if handle != browser.current_window_handle)
        browser.switch_to.window(old)
        browser.close()
        browser.switch_to.window(browser.window_handles[0])
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(url)

    def get(self, id: str) -> WebElement:
        return self.browser.find_element(By.ID, id)

    def text(self, id: str) -> str:
        return self.get(id).get_property("textContent")

    def script(self, code: str, *arguments: Any) -> Any:
        return self.browser.execute_script(code, *arguments)

    def wait(self, reached: Callable[[], Any], what: str) -> Any:
        """The first true value of `reached`."""
        return WebDriverWait(self.browser, TIMEOUT_S, 0.05).until(lambda _: reached(), what)

    def connect(self) -> Page:
        self.wait(lambda: "draft steps" in self.text("description"), "the page shows what the server is")
        return self

    def type(self, *keys: str) -> None:
        """To whatever has the focus."""
        self.browser.switch_to.active_element.send_keys(*keys)

    @property
    def focus(self) -> str:
        return self.browser.switch_to.active_element.get_attribute("id")

    def tab_to(self, id: str) -> None:
        for _ in range(30):
            if self.focus == id:
                return
            self.type(Keys.TAB)
        raise AssertionError(f"the tabulator does not reach {id}")

    def fill(self, id: str, value: str) -> None:
        self.script("document.getElementById(arguments[0]).value = arguments[1]", id, value)

    def complete(self, prompt: str | None = None, tokens: int = 64) -> None:
        """Sends the request, and waits for its end."""
        self.send(prompt, tokens)
        self.wait(lambda: "ended by" in self.text("status"), "the answer ends")

    def send(self, prompt: str | None = None, tokens: int = 64) -> None:
        if prompt is not None:
            self.fill("prompt", prompt)
        self.fill("max-new-tokens", str(tokens))
        self.get("send").click()

    def error(self) -> str:
        self.wait(lambda: self.get("error").is_displayed(), "an error is shown")
        return self.text("error")

    def tokens(self) -> list[tuple[int, str]]:
        """(source, text) of each token on the page."""
        code = """return [...document.querySelectorAll("#answer .token")]
                  .map((token) => [Number(token.dataset.source), token.textContent])"""
        return [tuple(pair) for pair in self.script(code)]

    def console(self) -> list[str]:
        """What the browser complained about, a refused resource or a breach of the page's policy included."""
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]
