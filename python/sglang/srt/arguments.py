"""Dataclass fields that are also flags of a command line: their table, their checks, their parser."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


def arg(
    default: Any,
    help: str,
    choices: Sequence[Any] | None = None,
    aliases: Sequence[str] = (),
    instead: str | None = None,
    group: str = "options",
) -> Any:
    """A field that is also a flag.

    `choices` are all the values there are, beside None. `aliases` are other spellings of the flag. `instead`
    says what to use for a value that is not among the choices.
    """
    metadata = {"help": help, "choices": choices, "aliases": aliases, "instead": instead, "group": group}
    return dataclasses.field(default=default, metadata=metadata)


def group(title: str) -> Callable[..., Any]:
    """`arg` for the fields that stand under this title in --help."""
    return functools.partial(arg, group=title)


def flag(name: str) -> str:
    """The command line's spelling of a field: max_total_tokens -> --max-total-tokens."""
    return "--" + name.replace("_", "-")


def values_that_cannot_be(args: Any) -> Iterator[str]:
    """What is wrong with each field of a dataclass of `arg`s on its own."""
    hints = typing.get_type_hints(type(args))
    for f in dataclasses.fields(args):
        value, choices, instead = getattr(args, f.name), f.metadata["choices"], f.metadata["instead"]
        kind = _plain_type(hints[f.name])
        if value is None and kind is not hints[f.name]:
            continue
        if not _is_a(value, kind):
            yield f"{flag(f.name)} must be {_article(kind)}, got {value!r}"
        elif choices is not None and value not in choices:
            if instead is not None:
                given = flag(f.name) if value is True else f"{flag(f.name)} {value}"
                yield f"{given} is not supported: {instead}"
            else:
                yield f"{flag(f.name)} must be one of {', '.join(map(str, choices))}, got {value!r}"


def unknown_names(args: type[Any], names: Sequence[str]) -> Iterator[str]:
    """Names that are no field of the dataclass, each with the ones that it may have been meant to be."""
    known = [f.name for f in dataclasses.fields(args)]
    for name in names:
        if name not in known:
            yield f"{name!r}" + did_you_mean(name, known)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.75)
    return f": did you mean {' or '.join(close)}?" if close else ""


class Parser(argparse.ArgumentParser):
    """The command line of a dataclass of `arg`s, its flags grouped, with a suggestion for a misspelt one."""

    def __init__(self, prog: str, args: type[Any]) -> None:
        required = [f.name for f in dataclasses.fields(args) if f.default is dataclasses.MISSING]
        usage = " ".join([prog, *(f"{flag(name)} {name.upper()}" for name in required), "[flags]"])
        super().__init__(prog, usage, allow_abbrev=False)
        self._required_names = required
        add_arguments(self, args)

    def parse(self, argv: Sequence[str] | None, make: Callable[..., T]) -> T:
        """What `make` gives for the arguments. Ends the process with a usage message where they are wrong."""
        namespace, rest = self.parse_known_args(argv)
        for word in rest:
            self._refuse(word)
        for name in self._required_names:
            if getattr(namespace, name) is None:
                self.error(f"{flag(name)} is required")
        try:
            return make(**vars(namespace))
        except ValueError as error:
            self.error(str(error))

    def _refuse(self, word: str) -> NoReturn:
        if not word.startswith("--"):
            self.error(f"unexpected argument {word!r}")
        name = word.partition("=")[0]
        known = [option for action in self._actions for option in action.option_strings]
        self.error(f"unknown flag {name}" + (did_you_mean(name, known) or ": --help lists those there are"))


def add_arguments(parser: argparse.ArgumentParser, args: type[Any]) -> None:
    """A flag for each field, under the title of its group; those of a base class come last."""
    hints = typing.get_type_hints(args)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for f in sorted(dataclasses.fields(args), key=lambda f: f.name not in args.__annotations__):
        kind, choices = _plain_type(hints[f.name]), f.metadata["choices"]
        title, help = f.metadata["group"], f.metadata["help"]
        if choices is not None and all(choice is False for choice in choices):
            title, help = "not supported, and what to do instead", f"{help}: {f.metadata['instead']}"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        options: dict[str, Any] = {"help": help.replace("%", "%%"), "dest": f.name}
        if kind is bool:
            options |= {"action": "store_true", "default": f.default}
        else:
            # The choices are checked with everything else, so that all messages are of one kind.
            options |= {"type": kind, "metavar": _one_of(choices) if choices else None}
            if f.default not in (None, dataclasses.MISSING):
                options |= {"default": f.default, "help": options["help"] + f" (default: {f.default})"}
        groups[title].add_argument(flag(f.name), *f.metadata["aliases"], **options)


def _one_of(choices: Sequence[Any]) -> str:
    return "{" + ",".join(map(str, choices)) + "}"


def _plain_type(hint: Any) -> type:
    """int | None -> int."""
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None))
    return hint


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _article(kind: type) -> str:
    return f"{'an' if kind is int else 'a'} {kind.__name__}"
