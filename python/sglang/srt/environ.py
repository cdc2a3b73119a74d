"""Every environment variable that the runtime reads: one registry of typed flags.

`envs.validate()` parses all of them at start; after that a flag is a cached value, so reading one costs
nothing. Nothing else in the package reads the environment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_BOOL_WORDS = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}


def parse_bool(text: str) -> bool:
    value = _BOOL_WORDS.get(text.strip().lower())
    if value is None:
        raise ValueError(f"expected one of {', '.join(_BOOL_WORDS)}")
    return value


class EnvFlag(Generic[T]):
    """A variable, its default and how its text is parsed. An empty variable counts as unset."""

    def __init__(self, name: str, default: T, parse: Callable[[str], T], help: str) -> None:
        self.name, self.default, self.parse, self.help = name, default, parse, help
        self._value: T | None = None

    def get(self) -> T:
        """The value, parsed at the first call. Raises ValueError naming the variable and its text."""
        if self._value is None:
            self._value = self._read()
        return self._value

    def _read(self) -> T:
        text = os.environ.get(self.name, "")
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise ValueError(f"environment variable {self.name}={text!r} does not parse: {error}") from error

    @contextmanager
    def override(self, value: T) -> Iterator[None]:
        """Another value for this process and its children, for a while."""
        before_text, before_value = os.environ.get(self.name), self._value
        os.environ[self.name] = str(int(value) if isinstance(value, bool) else value)
        self._value = value
        try:
            yield
        finally:
            self._value = before_value
            if before_text is None:
                os.environ.pop(self.name, None)
            else:
                os.environ[self.name] = before_text


class Envs:
    """The registry. A new flag is one more line here."""

    SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA = EnvFlag(
        "SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA",
        False,
        parse_bool,
        "compute the metadata of a draft step group once instead of once per draft backend",
    )
    SGLANG_NSA_VERIFY_METADATA = EnvFlag(
        "SGLANG_NSA_VERIFY_METADATA",
        False,
        parse_bool,
        "compare the metadata of every replay with the torch reference, and raise where it differs",
    )

    def flags(self) -> list[EnvFlag[Any]]:
        return [flag for flag in vars(type(self)).values() if isinstance(flag, EnvFlag)]

    def validate(self) -> dict[str, Any]:
        """Parses every flag; returns name -> value. Raises ValueError on the first that does not parse."""
        return {flag.name: flag.get() for flag in self.flags()}


envs = Envs()
