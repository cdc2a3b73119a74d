"""The HTTP process: routes, errors, and the life of the server."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from transformers import AutoTokenizer

import sglang
from sglang.srt.entrypoints import token_serving
from sglang.srt.entrypoints.body_reader import BodyReader
from sglang.srt.entrypoints.generate_protocol import AbortRequest, GenerateReqInput
from sglang.srt.entrypoints.generate_serving import serve_generate
from sglang.srt.entrypoints.health import generate_one_token
from sglang.srt.entrypoints.openai_protocol import ChatCompletionRequest, CompletionRequest
from sglang.srt.entrypoints.openai_serving import ChatServing, CompletionServing
from sglang.srt.entrypoints.page.routes import page_routes
from sglang.srt.entrypoints.request_body import B
from sglang.srt.entrypoints.scheduler_process import SchedulerProcess
from sglang.srt.entrypoints.token_protocol import DetokenizeRequest, ScoringRequest, TokenizeRequest
from sglang.srt.environ import envs
from sglang.srt.errors import RequestError
from sglang.srt.logging_config import configure_logging
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.metrics import ServerMetrics
from sglang.srt.model_card import example_prompts
from sglang.srt.server_args import PortArgs, ServerArgs

logger = logging.getLogger(__name__)

GRACE = 5  # seconds for open connections when the server ends


def build_app(args: ServerArgs, manager: TokenizerManager) -> FastAPI:
    """The application over a manager whose scheduler is ready."""
    app = FastAPI(title="sglang", openapi_url=None)
    app.state.args, app.state.manager = args, manager
    app.state.example_prompts = example_prompts(args.model_path)
    app.state.bodies = BodyReader(manager.in_thread)
    app.include_router(open_routes)
    app.include_router(page_routes())
    app.include_router(guarded_routes, dependencies=[Depends(_check_api_key)])
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    return app


# -- errors and bodies ----------------------------------------------------------------------------------


async def _on_request_error(_: Request, error: RequestError) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(error.body(), error.status, headers)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    """Routing: no such path, no such method."""
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(RequestError(error.status_code, message).body(), error.status_code, error.headers)


async def _on_bug(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse(RequestError(500, "internal error").body(), 500)


async def _check_api_key(request: Request) -> None:
    key = request.app.state.args.api_key
    if key is None:
        return
    given = request.headers.get("authorization", "")
    if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {key}".encode()):
        raise RequestError(401, "the API key is missing or wrong", code="invalid_api_key")


async def _parse(kind: type[B], request: Request) -> B:
    return await request.app.state.bodies.read(kind, request)


# -- routes ---------------------------------------------------------------------------------------------

open_routes = APIRouter()  # for probes and Prometheus: no key needed
guarded_routes = APIRouter()


@open_routes.get("/health")
async def health(request: Request) -> Response:
    failure = request.app.state.manager.failure
    if failure is not None:
        raise failure
    return Response(status_code=200)


@open_routes.get("/health_generate")
async def health_generate(request: Request) -> Response:
    """200 when a token was generated."""
    await generate_one_token(request.app.state.manager)
    return Response(status_code=200)


@open_routes.get("/metrics")
async def metrics(request: Request) -> Response:
    manager: TokenizerManager = request.app.state.manager
    text = manager.metrics.render(await manager.internal_state())
    return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)


@guarded_routes.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_model_card(request)]}


@guarded_routes.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    if name not in request.app.state.args.model_names:
        raise RequestError(404, f"model {name!r} does not exist", "model", "model_not_found")
    return _model_card(request)


def _model_card(request: Request) -> dict[str, Any]:
    args, manager = request.app.state.args, request.app.state.manager
    return {
        "id": args.served_model_name,
        "object": "model",
        "created": int(manager.started),
        "owned_by": "sglang",
        "root": args.model_path,
        "max_model_len": manager.context_length,
    }


@guarded_routes.get("/model_info")
@guarded_routes.get("/get_model_info")
async def model_info(request: Request) -> dict[str, Any]:
    args = request.app.state.args
    return {
        "model_path": args.model_path,
        "tokenizer_path": args.tokenizer_path,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": args.weight_version,
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "example_prompts": request.app.state.example_prompts,
    }


@guarded_routes.get("/server_info")
@guarded_routes.get("/get_server_info")
async def server_info(request: Request) -> dict[str, Any]:
    """Arguments, limits, environment flags, and the scheduler's state."""
    args, manager = request.app.state.args, request.app.state.manager
    return args.to_dict() | {
        "version": sglang.__version__,
        "environment": envs.validate(),
        "max_total_num_tokens": manager.limits.max_total_num_tokens,
        "max_req_input_len": manager.limits.max_req_input_len,
        "context_length": manager.context_length,
        "internal_states": [await manager.internal_state()],
    }


@guarded_routes.api_route("/flush_cache", methods=["GET", "POST"])
async def flush_cache(request: Request) -> Response:
    result = await request.app.state.manager.flush_cache()
    if not result.success:
        raise RequestError.bad(result.message or "the cache was not flushed: requests are running")
    return PlainTextResponse(result.message or "Cache flushed.")


@guarded_routes.post("/abort_request")
async def abort_request(request: Request) -> dict[str, int]:
    body = await _parse(AbortRequest, request)
    if not (body.rid or body.abort_all):
        raise RequestError.bad("give either rid or abort_all", "rid")
    return {"aborted": await request.app.state.manager.abort(None if body.abort_all else body.rid)}


@guarded_routes.post("/generate")
async def generate(request: Request) -> Response:
    body = await _parse(GenerateReqInput, request)
    return await serve_generate(request.app.state.manager, body, request)


@guarded_routes.post("/v1/completions")
async def completions(request: Request) -> Response:
    body = await _parse(CompletionRequest, request)
    state = request.app.state
    return await CompletionServing(state.manager, state.args.model_names, body).serve(request)


@guarded_routes.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    body = await _parse(ChatCompletionRequest, request)
    state = request.app.state
    return await ChatServing(state.manager, state.args.model_names, body).serve(request)


@guarded_routes.post("/tokenize")
@guarded_routes.post("/v1/tokenize")
async def tokenize(request: Request) -> dict[str, Any]:
    body = await _parse(TokenizeRequest, request)
    return await token_serving.tokenize(request.app.state.manager, body)


@guarded_routes.post("/detokenize")
@guarded_routes.post("/v1/detokenize")
async def detokenize(request: Request) -> dict[str, Any]:
    body = await _parse(DetokenizeRequest, request)
    return await token_serving.detokenize(request.app.state.manager, body)


@guarded_routes.post("/v1/score")
async def score(request: Request) -> Response:
    body = await _parse(ScoringRequest, request)
    state = request.app.state
    return await token_serving.score(state.manager, body, state.args.served_model_name, request)


# -- life -----------------------------------------------------------------------------------------------


class StartError(Exception):
    """The server cannot start; the message says why."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM while the server loads. Unwinds, so that no process and no file stays behind."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(signal.Signals(number).name)


def launch_server(args: ServerArgs) -> int:
    """Runs the server until a signal ends it. Returns the exit code of the process."""
    configure_logging(args.log_level, "http")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    scheduler = None
    try:
        envs.validate()
        listener = bind(args)
        ports = PortArgs.init_new()
        scheduler = SchedulerProcess(args, ports)
        scheduler.start()
        logger.info("loading %s on %s (scheduler: pid %d)", args.model_path, args.device, scheduler.pid)
        tokenizer, vocab_size = _load_tokenizer(args.model_path, args.tokenizer_path)
        return asyncio.run(_serve(args, ports, scheduler, listener, tokenizer, vocab_size))
    except (StartError, ValueError) as error:
        logger.error("the server cannot start: %s", error)
        return 1
    except Interrupted as error:
        logger.info("%s while starting: ending", error)
        return 0
    finally:
        if scheduler is not None:
            scheduler.stop()


def bind(args: ServerArgs) -> socket.socket:
    """Takes the port before anything is loaded."""
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    # the protocol by name: asyncio turns Nagle's algorithm off only where it is, and an answer's second
    # segment would wait 40 ms for the client's delayed acknowledgement
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((args.host, args.port))
    except OSError as error:
        listener.close()
        raise StartError(f"cannot listen on --host {args.host} --port {args.port}: {error}") from error
    return listener


def _load_tokenizer(model_path: str, tokenizer_path: str) -> tuple[Any, int]:
    """The tokenizer, and the model's vocabulary size, which may be larger than the tokenizer's."""
    try:
        config = json.loads((Path(model_path) / "config.json").read_text())
        return AutoTokenizer.from_pretrained(tokenizer_path, local_files_only=True), config["vocab_size"]
    except (OSError, KeyError, ValueError) as error:
        raise StartError(
            f"--model-path {model_path}, --tokenizer-path {tokenizer_path}: no tokenizer or config could be "
            f"loaded: {error}"
        ) from error


class _Server(uvicorn.Server):
    """Signals are handled by `_serve`, during start and after."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    args: ServerArgs,
    ports: PortArgs,
    scheduler: SchedulerProcess,
    listener: socket.socket,
    tokenizer: Any,
    vocab_size: int,
) -> int:
    metrics = ServerMetrics(args.served_model_name)
    manager = TokenizerManager(ports, tokenizer, vocab_size, metrics)
    config = uvicorn.Config(
        build_app(args, manager),
        log_config=None,
        access_log=args.log_level == "debug",
        timeout_graceful_shutdown=GRACE,
        lifespan="off",
    )
    server = _Server(config)
    async with _watched(manager, scheduler, server) as ended:
        try:
            limits = await _wait_ready(manager, scheduler)
        except RequestError as error:
            if ended.is_set():
                return 0
            raise StartError(error.message) from error
        logger.info(
            "the server is ready on http://%s:%d (context %d, cache %d tokens)",
            args.host,
            listener.getsockname()[1],
            limits.context_length,
            limits.max_total_num_tokens,
        )
        await server.serve(sockets=[listener])
        return 0 if ended.is_set() else 1


async def _wait_ready(manager: TokenizerManager, scheduler: SchedulerProcess) -> Any:
    start, ready = time.monotonic(), asyncio.ensure_future(manager.wait_ready())
    while not (await asyncio.wait({ready}, timeout=10.0))[0]:
        logger.info("waiting for the scheduler (pid %d): %.0f s", scheduler.pid, time.monotonic() - start)
    return ready.result()


@contextlib.asynccontextmanager
async def _watched(
    manager: TokenizerManager, scheduler: SchedulerProcess, server: uvicorn.Server
) -> AsyncIterator[asyncio.Event]:
    """Ends the server with the first of: a signal, the scheduler's end, an error in the receive loop.

    Yields the event that is set where it was a signal.
    """
    asked = asyncio.Event()

    def end(reason: str) -> None:
        manager.fail(reason)
        server.should_exit = True

    def on_signal() -> None:
        if asked.is_set():
            server.force_exit = True
        logger.info("ending")
        asked.set()
        end("the server is shutting down")

    async def watch_scheduler() -> None:
        code = await scheduler.wait()
        await asyncio.sleep(0.2)  # its last message may say why
        if not asked.is_set():
            end(f"the scheduler process ended (exit code {code})")
            logger.error("%s: ending", manager.failure)

    async def receive() -> None:
        try:
            await manager.receive_loop()
        except Exception as error:
            logger.exception("the receive loop failed: ending")
            end(f"internal error: {error}")

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    tasks = [asyncio.ensure_future(receive()), asyncio.ensure_future(watch_scheduler())]
    try:
        yield asked
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        manager.close()
