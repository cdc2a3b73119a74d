"""What runs instead of a scheduler in its process, and does not end when it is asked to."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import time
from pathlib import Path

from sglang.srt.entrypoints import scheduler_process


def catches_what_ends_it(ready: Path, _: None) -> None:
    """As a library may."""
    ready.touch()
    with contextlib.suppress(SystemExit):
        time.sleep(60)
    time.sleep(60)


def does_not_end(ready: Path, _: None) -> None:
    signal.signal(scheduler_process.END_SIGNAL, signal.SIG_IGN)
    ready.touch()
    time.sleep(60)


def has_compiled(ready: Path, _: None) -> None:
    """LLVM puts handlers of its own, past Python's, in the place of those of these signals."""
    take = ctypes.CDLL(None).signal
    take.argtypes = [ctypes.c_int, ctypes.c_void_p]
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        take(number, IGNORE)
    ready.touch()
    time.sleep(60)


def run_after_triton(ready: Path, _: None) -> None:
    scheduler_process._load_and_run = has_compiled
    REAL_MAIN(ready, _)


def run_catching(ready: Path, _: None) -> None:
    scheduler_process._load_and_run = catches_what_ends_it
    REAL_MAIN(ready, _)


def run_deaf(ready: Path, _: None) -> None:
    scheduler_process._load_and_run = does_not_end
    REAL_MAIN(ready, _)


IGNORE = 1  # SIG_IGN of C
REAL_MAIN = scheduler_process._scheduler_main  # which the test replaces in its own process
