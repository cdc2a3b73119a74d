"""The second process: how it is started, watched and ended, so that neither side outlives the other."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import resource_tracker
from types import FrameType

from sglang.srt.environ import envs
from sglang.srt.logging_config import configure_logging
from sglang.srt.server_args import PortArgs, ServerArgs

logger = logging.getLogger(__name__)

# From the parent. Not SIGUSR1 and SIGUSR2: LLVM takes these where Triton compiles a kernel.
END_SIGNAL = signal.SIGRTMIN + 1
STACK_SIGNAL = signal.SIGRTMIN + 2  # writes where each thread stands to stderr
START_METHOD = "spawn"  # CUDA does not survive a fork
STOP_TIMEOUT = 10.0  # seconds before a process that was asked to end is killed
ASK_AGAIN = 2.0  # seconds


class SchedulerProcess:
    """The scheduler, in a process started from this one."""

    def __init__(self, server_args: ServerArgs, port_args: PortArgs) -> None:
        self._process = multiprocessing.get_context(START_METHOD).Process(
            target=_scheduler_main, args=(server_args, port_args), name="sglang-scheduler"
        )

    def start(self) -> None:
        # Ctrl-C and a service manager's SIGTERM reach every process of a group; this one is ended by its
        # parent, in order. A blocked signal stays blocked in the child from its first instruction on, and
        # one that comes now waits for the parent.
        resource_tracker.ensure_running()  # starting it would unblock them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.is_alive()

    async def wait(self) -> int | None:
        """Until the process ends. Returns its exit code, or minus the signal that killed it."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._process.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._process.sentinel)
        self._process.join()
        return self._process.exitcode

    def stop(self) -> None:
        """Ends the process, gently first. One that is late says where it stands, and is killed."""
        if self._process.pid is None:
            return
        deadline = time.monotonic() + STOP_TIMEOUT
        while self.is_alive() and (left := deadline - time.monotonic()) > 0:
            self._send(END_SIGNAL)  # again, since a library may have caught what the first one raised
            self._process.join(min(left, ASK_AGAIN))
        if self.is_alive():
            logger.warning("the scheduler (pid %d) did not end in %.0f s: killing it", self.pid, STOP_TIMEOUT)
            self._send(STACK_SIGNAL)
            self._process.join(0.5)
            self._process.kill()
        self._process.join()

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)


def _scheduler_main(server_args: ServerArgs, port_args: PortArgs) -> None:
    signal.signal(END_SIGNAL, _end)
    faulthandler.register(STACK_SIGNAL)  # answers also while the interpreter waits for a library
    try:
        _load_and_run(server_args, port_args)
    finally:  # asked once more, it would only be torn out of its clean-up
        signal.signal(END_SIGNAL, signal.SIG_IGN)


def _load_and_run(server_args: ServerArgs, port_args: PortArgs) -> None:
    configure_logging(server_args.log_level, "scheduler")
    threading.Thread(target=_end_with_parent, args=(port_args,), name="parent-watch", daemon=True).start()
    envs.validate()
    from sglang.srt.managers.scheduler_runner import run_scheduler_process  # imports torch: seconds

    if server_args.device == "cpu":
        _leave_a_core()
    run_scheduler_process(server_args, port_args)


def _leave_a_core() -> None:
    """One core is the HTTP process's: threads that wait for a core they share slow every operation down."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - 1)))
    reason = "" if torch.cuda.is_available() else f": torch {torch.__version__} finds no GPU"
    logger.info("the model runs on %d of %d cores%s", torch.get_num_threads(), cores, reason)


def _end(number: int, frame: FrameType | None) -> None:
    """Unwinds, so that what the libraries hold (semaphores, temporary files) is given back."""
    raise SystemExit(0)


def _end_with_parent(port_args: PortArgs) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a spawned process"
    parent.join()
    logger.error("the HTTP process (pid %d) is gone: ending", parent.pid)
    port_args.remove()
    os._exit(1)
