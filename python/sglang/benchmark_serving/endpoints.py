"""What is sent to each endpoint, and what its answers say."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any, Protocol

from sglang.benchmark_serving.datasets import Sample


@dataclass
class Result:
    """One request as the client saw it. Times are seconds of `time.perf_counter`."""

    start: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # of tokens: when, and how many by then
    end: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    verifications: int | None = None  # of speculation, where the answer says so
    text: str = ""
    error: str | None = None

    @property
    def latency(self) -> float:
        return self.end - self.start

    @property
    def ttft(self) -> float | None:
        """To the first token; None where the answer came whole."""
        return self.arrivals[0][0] - self.start if self.arrivals else None

    @property
    def tpot(self) -> float | None:
        """Time per token after the first."""
        if not self.arrivals or self.completion_tokens < 2:
            return None
        return (self.end - self.arrivals[0][0]) / (self.completion_tokens - 1)

    @property
    def inter_token_latencies(self) -> list[float]:
        """One for each token after the first arrival: k tokens that come together share their wait.

        Empty where the server does not say how many tokens have come.
        """
        if not self.arrivals or self.arrivals[-1][1] != self.completion_tokens:
            return []
        pairs = zip(self.arrivals, self.arrivals[1:])
        return [(b - a) / (m - n) for (a, n), (b, m) in pairs for _ in range(m - n)]


class Endpoint(Protocol):
    path: str
    takes_ids: bool

    def body(self, args: argparse.Namespace, sample: Sample, model: str) -> dict[str, Any]: ...

    def read(self, answer: dict[str, Any], result: Result) -> bool:
        """Takes over an event of a stream or a whole answer; whether text or tokens came with it."""
        ...


class Generate:
    """SGLang's own form."""

    path = "/generate"
    takes_ids = True

    def body(self, args: argparse.Namespace, sample: Sample, model: str) -> dict[str, Any]:
        sampling = {"temperature": args.temperature, "max_new_tokens": sample.max_tokens}
        body: dict[str, Any] = {
            "text" if isinstance(sample.prompt, str) else "input_ids": sample.prompt,
            "sampling_params": sampling | {"ignore_eos": not args.disable_ignore_eos},
            "stream": not args.disable_stream,
        }
        if args.return_logprob:
            body["return_logprob"] = True
            body["top_logprobs_num"] = args.top_logprobs_num
            body["logprob_start_len"] = args.logprob_start_len
        return body

    def read(self, answer: dict[str, Any], result: Result) -> bool:
        meta, before = answer["meta_info"], result.completion_tokens
        result.text, result.prompt_tokens = answer["text"], meta["prompt_tokens"]
        result.completion_tokens = meta["completion_tokens"]
        result.verifications = meta.get("spec_verify_ct", result.verifications)
        return result.completion_tokens > before


@dataclass(frozen=True)
class Completions:
    """OpenAI's forms. `extras`: SGLang and vLLM take `ignore_eos`, and count tokens with every event."""

    extras: bool
    path: str = "/v1/completions"
    takes_ids: bool = True

    def body(self, args: argparse.Namespace, sample: Sample, model: str) -> dict[str, Any]:
        body = self._prompt(sample) | {
            "model": model,
            "temperature": args.temperature,
            "stream": not args.disable_stream,
        }
        if not args.disable_stream:
            counts = {"continuous_usage_stats": True} if self.extras else {}
            body["stream_options"] = {"include_usage": True} | counts
        if self.extras:
            body["ignore_eos"] = not args.disable_ignore_eos
        if args.return_logprob:
            body |= self._logprobs(args.top_logprobs_num)
        return body

    def read(self, answer: dict[str, Any], result: Result) -> bool:
        text = "".join(self._text(choice) for choice in answer["choices"])
        result.text += text
        before = result.completion_tokens
        if usage := answer.get("usage"):
            result.prompt_tokens = usage["prompt_tokens"]
            result.completion_tokens = usage["completion_tokens"]
        return bool(text) or (bool(answer["choices"]) and result.completion_tokens > before)

    def _prompt(self, sample: Sample) -> dict[str, Any]:
        return {"prompt": sample.prompt, "max_tokens": sample.max_tokens}

    def _logprobs(self, top: int) -> dict[str, Any]:
        return {"logprobs": max(top, 1)}

    def _text(self, choice: dict[str, Any]) -> str:
        return choice["text"]


@dataclass(frozen=True)
class Chat(Completions):
    path: str = "/v1/chat/completions"
    takes_ids: bool = False

    def _prompt(self, sample: Sample) -> dict[str, Any]:
        messages = [{"role": "user", "content": sample.prompt}]
        return {"messages": messages, "max_completion_tokens": sample.max_tokens}

    def _logprobs(self, top: int) -> dict[str, Any]:
        return {"logprobs": True, "top_logprobs": top}

    def _text(self, choice: dict[str, Any]) -> str:
        return (choice.get("delta") or choice.get("message") or {}).get("content") or ""


@dataclass(frozen=True)
class Backend:
    endpoint: Endpoint
    sglang: bool  # has SGLang's other routes: /flush_cache, /get_server_info


BACKENDS: dict[str, Backend] = {
    "sglang": Backend(Generate(), sglang=True),
    "sglang-native": Backend(Generate(), sglang=True),
    "sglang-oai": Backend(Completions(extras=True), sglang=True),
    "sglang-oai-chat": Backend(Chat(extras=True), sglang=True),
    "vllm": Backend(Completions(extras=True), sglang=False),
    "vllm-chat": Backend(Chat(extras=True), sglang=False),
    "openai": Backend(Completions(extras=False), sglang=False),
    "openai-chat": Backend(Chat(extras=False), sglang=False),
}
