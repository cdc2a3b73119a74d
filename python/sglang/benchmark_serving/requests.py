"""Runs the requests against the server."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from sglang.benchmark_serving.datasets import Sample
from sglang.benchmark_serving.endpoints import BACKENDS, Endpoint, Result

READY_POLL_S = 0.5
WARMUP_TOKENS = 32


class Server:
    """The server under test: one session for all requests. An asynchronous context manager."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.backend = BACKENDS[args.backend]

    async def __aenter__(self) -> Server:
        self.session = aiohttp.ClientSession(
            self.args.base_url,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
            headers=self.args.headers,
            connector=aiohttp.TCPConnector(limit=0),
            read_bufsize=1 << 20,
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.session.close()

    async def wait_ready(self) -> None:
        """Until it answers. Raises aiohttp.ClientError after `--ready-check-timeout-sec`."""
        deadline = time.monotonic() + self.args.ready_check_timeout_sec
        while time.monotonic() < deadline:
            try:
                async with self.session.get("/health") as response:
                    if response.status < 500:  # a server without this route answers too
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(READY_POLL_S)
        if self.args.ready_check_timeout_sec > 0:
            seconds = f"{self.args.ready_check_timeout_sec:g} s (--ready-check-timeout-sec)"
            raise aiohttp.ClientError(f"not ready within {seconds}")

    async def get_json(self, path: str) -> Any:
        async with self.session.get(path) as response:
            response.raise_for_status()
            return await response.json()

    async def flush_cache(self) -> None:
        async with self.session.post("/flush_cache") as response:
            response.raise_for_status()

    async def model(self) -> str:
        """The name to ask for."""
        asked = self.args.served_model_name or self.args.model
        return asked or (await self.get_json("/v1/models"))["data"][0]["id"]

    async def tokenizer_name(self) -> str | None:
        """`--tokenizer`, or the folder of one that is known and on this machine."""
        if self.args.tokenizer is not None:
            return self.args.tokenizer
        candidates = [self.args.model]
        if self.backend.sglang:
            candidates.append((await self.get_json("/get_model_info"))["tokenizer_path"])
        return next((path for path in candidates if path and Path(path).is_dir()), None)

    async def info(self) -> dict[str, Any] | None:
        """What a server of SGLang's kind says of itself, under the route's newer name or its older one."""
        if not self.backend.sglang:
            return None
        try:
            return await self.get_json("/server_info")
        except aiohttp.ClientResponseError as error:
            if error.status != 404:
                raise
        return await self.get_json("/get_server_info")

    async def run(self, samples: list[Sample]) -> tuple[list[Result], float]:
        """Warms up, sends all requests, and returns them and the seconds that they took together."""
        args, endpoint, model = self.args, self.backend.endpoint, await self.model()
        bodies = [endpoint.body(args, sample, model) | args.extra_request_body for sample in samples]
        for sample in samples[: args.warmup_requests]:
            short = replace(sample, max_tokens=min(sample.max_tokens, WARMUP_TOKENS))
            body = endpoint.body(args, short, model) | args.extra_request_body
            warm = await self._request(endpoint, body)
            if warm.error:
                raise ValueError(f"the warm-up request failed: {warm.error}")
        if args.flush_cache:
            await self.flush_cache()
        return await self._all(endpoint, bodies)

    async def _all(self, endpoint: Endpoint, bodies: list[dict[str, Any]]) -> tuple[list[Result], float]:
        limit = asyncio.Semaphore(self.args.max_concurrency or len(bodies))
        rng = random.Random(self.args.seed)
        bar = tqdm(total=len(bodies), desc="requests", disable=self.args.disable_tqdm)

        async def one(body: dict[str, Any]) -> Result:
            async with limit:
                result = await self._request(endpoint, body)
            bar.update()
            return result

        start = time.perf_counter()
        tasks = []
        for body in bodies:
            tasks.append(asyncio.create_task(one(body)))
            if self.args.request_rate != float("inf"):
                await asyncio.sleep(rng.expovariate(self.args.request_rate))
        results = await asyncio.gather(*tasks)
        duration = time.perf_counter() - start
        bar.close()
        return results, duration

    async def _request(self, endpoint: Endpoint, body: dict[str, Any]) -> Result:
        """One answer. Errors are kept, not raised."""
        result = Result(time.perf_counter())
        try:
            async with self.session.post(endpoint.path, json=body) as response:
                if response.status != 200:
                    raise ValueError(f"HTTP {response.status}: {(await response.text())[:200]}")
                if body["stream"]:
                    await _read_stream(endpoint, response.content, result)
                else:
                    endpoint.read(await response.json(), result)
            if not (result.arrivals or result.completion_tokens):
                raise ValueError("the answer held no token")
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError, KeyError) as error:
            result.error = f"{type(error).__name__}: {error}"
        result.end = result.arrivals[-1][0] if result.arrivals else time.perf_counter()
        return result


async def _read_stream(endpoint: Endpoint, stream: AsyncIterator[bytes], result: Result) -> None:
    async for event in _events(stream):
        now = time.perf_counter()
        if "error" in event:
            error = event["error"]
            raise ValueError(str(error.get("message", error) if isinstance(error, dict) else error))
        if endpoint.read(event, result):
            # without counts an event is taken for a token; `completion_tokens` tells in the end
            tokens = result.completion_tokens or len(result.arrivals) + 1
            if not result.arrivals or tokens > result.arrivals[-1][1]:
                result.arrivals.append((now, tokens))


async def _events(stream: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each `data:` line, until `[DONE]`."""
    async for line in stream:
        text = line.strip()
        if text == b"data: [DONE]":
            return
        if text.startswith(b"data:"):
            yield json.loads(text[5:])
