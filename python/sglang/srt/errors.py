"""What a client is told when its request cannot be served."""

from __future__ import annotations

import reprlib
from typing import Any

MAX_SHOWN = 80  # characters of a value that somebody sent
MAX_MESSAGE = 1000


def shown(value: Any) -> str:
    """A value for a message: on one line, and not longer than anybody reads."""
    text = reprlib.repr(value) if not isinstance(value, str) else repr(value[:MAX_SHOWN])
    return printable(text, MAX_SHOWN)


def printable(text: str, limit: int = MAX_MESSAGE) -> str:
    """Without control characters, which could forge lines of a log, and cut."""
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


class RequestError(Exception):
    """An error with an HTTP status, reported in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        message = printable(message)
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.param = None if param is None else printable(param, MAX_SHOWN)

    @property
    def type(self) -> str:
        kinds = {401: "authentication_error", 404: "not_found_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    @classmethod
    def bad(cls, message: str, param: str | None = None) -> RequestError:
        return cls(400, message, param)
