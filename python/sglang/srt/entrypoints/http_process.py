"""The HTTP process: its start, what ends it, and how."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from sglang.srt.entrypoints.connection import ACCEPTED_AT_ONCE, BoundedProtocol, max_connections
from sglang.srt.entrypoints.http_server import build_app
from sglang.srt.entrypoints.scheduler_process import SchedulerProcess
from sglang.srt.environ import envs
from sglang.srt.errors import RequestError
from sglang.srt.garbage_collection import freeze_gc
from sglang.srt.logging_config import configure_logging
from sglang.srt.managers.io_struct import SchedulerReady
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.metrics import ServerMetrics
from sglang.srt.server_args import PortArgs, ServerArgs
from sglang.srt.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

GRACE = 5  # seconds for answers that are ready when the server ends
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StartError(Exception):
    """The server cannot start; the message says why."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM while the server loads. Unwinds, so that no process and no file stays behind."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    _on_signals(signal.SIG_IGN)  # a second one changes nothing
    raise Interrupted(signal.Signals(number).name)


def _on_signals(handler: Any) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def launch_server(args: ServerArgs) -> int:
    """Runs the server until a signal ends it. Returns the exit code of the process."""
    configure_logging(args.log_level, "http")
    _on_signals(_interrupt)
    scheduler = None
    try:
        envs.validate()
        listener = listen(args)
        ports = PortArgs.init_new()
        scheduler = SchedulerProcess(args, ports)
        scheduler.start()
        logger.info("loading %s on %s (scheduler: pid %d)", args.model_path, args.device, scheduler.pid)
        tokenizer = _load_tokenizer(args)
        return asyncio.run(_serve(args, ports, scheduler, listener, tokenizer))
    except (StartError, ValueError) as error:
        logger.error("the server cannot start: %s", error)
        return 1
    except Interrupted as error:
        logger.info("%s while starting: ending", error)
        return 0
    finally:
        _on_signals(signal.SIG_IGN)
        if scheduler is not None:
            scheduler.stop()


def listen(args: ServerArgs) -> socket.socket:
    """Takes the port before anything is loaded; who connects now waits until the server is ready."""
    host = args.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # the protocol by name: asyncio turns Nagle's algorithm off only where it is, and an answer's second
    # segment would wait 40 ms for the client's delayed acknowledgement
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, args.port))
        listener.listen()  # bound alone, two servers could have it
    except OSError as error:
        listener.close()
        raise StartError(f"cannot listen on --host {args.host} --port {args.port}: {error}") from error
    return listener


def _load_tokenizer(args: ServerArgs) -> Any:
    path = args.tokenizer_path
    try:
        return load_tokenizer(path)
    except Exception as error:  # the library raises all kinds where a file is wrong
        from sglang.srt.model_config import ModelConfig  # imports torch

        try:
            ModelConfig.from_path(args.model_path)  # names the file and the key where that is what is wrong
        except (ValueError, OSError) as better:
            raise StartError(str(better)) from error
        raise StartError(f"--tokenizer-path {path}: no tokenizer could be loaded: {error}") from error


class _Server(uvicorn.Server):
    """Signals are handled by `_watched`, during start and after."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    args: ServerArgs, ports: PortArgs, scheduler: SchedulerProcess, listener: socket.socket, tokenizer: Any
) -> int:
    manager = TokenizerManager(ports, tokenizer, ServerMetrics(args.served_model_name))
    BoundedProtocol.limit = max_connections()
    config = uvicorn.Config(
        build_app(args, manager),
        http=BoundedProtocol,
        ws="none",
        backlog=ACCEPTED_AT_ONCE,
        log_config=None,
        access_log=args.log_level == "debug",
        timeout_graceful_shutdown=GRACE,
        lifespan="off",
    )
    server = _Server(config)
    async with _watched(args, manager, scheduler, server) as ended:
        try:
            limits = await _wait_ready(manager, scheduler)
        except RequestError as error:
            if ended.is_set():
                return 0
            raise StartError(error.message) from error
        freeze_gc()
        logger.info(
            "the server is ready on http://%s:%d (context %d, cache %d tokens)",
            f"[{args.host.strip('[]')}]" if ":" in args.host else args.host,
            listener.getsockname()[1],
            limits.context_length,
            limits.max_total_num_tokens,
        )
        await server.serve(sockets=[listener])
        return 0 if ended.is_set() else 1


async def _wait_ready(manager: TokenizerManager, scheduler: SchedulerProcess) -> SchedulerReady:
    start, ready = time.monotonic(), asyncio.ensure_future(manager.wait_ready())
    while not (await asyncio.wait({ready}, timeout=10.0))[0]:
        logger.info("waiting for the scheduler (pid %d): %.0f s", scheduler.pid, time.monotonic() - start)
    return ready.result()


@contextlib.asynccontextmanager
async def _watched(
    args: ServerArgs, manager: TokenizerManager, scheduler: SchedulerProcess, server: uvicorn.Server
) -> AsyncIterator[asyncio.Event]:
    """Ends the server with the first of: a signal, the scheduler's end, an error in the receive loop.

    Yields the event that is set where it was a signal.
    """
    asked = asyncio.Event()

    def end(reason: str) -> None:
        manager.fail(reason)
        server.should_exit = True

    async def end_when_asked() -> None:
        """What runs may finish for a while; nothing new is begun."""
        await asked.wait()
        logger.info("ending: %d sequences run", manager.num_running)
        await manager.drain("the server is shutting down", args.drain_timeout)
        end("the server is shutting down")

    async def watch_scheduler() -> None:
        code = await scheduler.wait()
        await asyncio.sleep(0.2)  # its last message may say why
        if asked.is_set():
            end("the server is shutting down")
            return
        end(f"the scheduler process ended (exit code {code})")
        if manager.limits is not None:  # else the server cannot start, which is told once
            logger.error("%s: ending", manager.failure)

    async def receive() -> None:
        try:
            await manager.receive_loop()
        except Exception as error:
            logger.exception("the receive loop failed: ending")
            end(f"internal error: {error}")

    _on_signals(functools.partial(_ask, asyncio.get_running_loop(), asked.set))
    tasks = [asyncio.ensure_future(work) for work in (receive(), watch_scheduler(), end_when_asked())]
    try:
        yield asked
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        manager.close()


def _ask(
    loop: asyncio.AbstractEventLoop, ask: Callable[[], None], number: int, frame: FrameType | None
) -> None:
    """The handler of the signals. Stays in place, so that one that comes late changes nothing."""
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(ask)
