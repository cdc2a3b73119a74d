"""What a client is told when its request cannot be served."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """An error with an HTTP status, reported in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

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
