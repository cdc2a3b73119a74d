"""The routes of the server, and what is said where something is wrong."""

from __future__ import annotations

import hmac
import logging
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

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
from sglang.srt.entrypoints.token_protocol import DetokenizeRequest, ScoringRequest, TokenizeRequest
from sglang.srt.environ import envs
from sglang.srt.errors import RequestError
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.model_card import example_prompts
from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)


def build_app(args: ServerArgs, manager: TokenizerManager) -> FastAPI:
    """The application over a manager whose scheduler is ready."""
    # A redirect would lead to whatever host the client named.
    app = FastAPI(title="sglang", openapi_url=None, redirect_slashes=False)
    app.state.args, app.state.manager = args, manager
    app.state.example_prompts = example_prompts(args.model_path)
    app.state.bodies = BodyReader(manager.in_thread)
    app.include_router(open_routes)
    app.include_router(page_routes())
    app.include_router(guarded_routes, dependencies=[Depends(_check_api_key)])
    app.add_middleware(  # SGLang's policy
        CORSMiddleware, allow_origins=["*"], allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
    )
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
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
    if scheme.lower() != "bearer" or not right:
        raise RequestError(401, "the API key is missing or wrong", code="invalid_api_key")


async def _parse(kind: type[B], request: Request) -> B:
    return await request.app.state.bodies.read(kind, request)


# -- routes ---------------------------------------------------------------------------------------------

open_routes = APIRouter()  # for probes and Prometheus: no key needed
guarded_routes = APIRouter()


@open_routes.get("/health")
async def health(request: Request) -> Response:
    request.app.state.manager.check_health()
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
