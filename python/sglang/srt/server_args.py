"""What a server is started with: one frozen dataclass, from which the command line is generated."""

from __future__ import annotations

import atexit
import dataclasses
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang.srt.arguments import Parser, flag, group, values_that_cannot_be
from sglang.srt.environ import envs
from sglang.srt.sglang_args import SGLangArgs

NSA_BACKENDS = ("auto", "torch", "triton", "flashinfer", "flashmla_kv", "flashmla_sparse")
METADATA_LAYOUTS = ("replicate", "shared", "in_graph", "indirect")
METADATA_COPIES = ("auto", "fused", "direct", "torch")
DEFAULT_SPECULATIVE_NUM_STEPS = 4
CHUNKED_PREFILL_SIZE = {"cpu": 2048, "cuda": 8192}  # fewer rows leave a GPU idle between passes
MAX_SPECULATIVE_NUM_STEPS = 64  # each has its backend, its metadata and its part of the captured graph


served = group("what is served, and where")
runs = group("how the model runs")
memory = group("memory and batching")
attention = group("attention, sampling and graphs")
speculation = group("speculation")
metadata = group("metadata of the drafts")


@dataclass(frozen=True, kw_only=True)
class ServerArgs(SGLangArgs):
    """Arguments of a server, with SGLang's names. Construction fills what is derived and checks the rest.

    Raises ValueError on a value out of range and on a combination that is impossible; the message names
    the flags as they are written on the command line.
    """

    model_path: str = served(
        dataclasses.MISSING, "directory of a checkpoint in Hugging Face format", aliases=("--model",)
    )
    tokenizer_path: str | None = served(None, "directory of the tokenizer (default: the model path)")
    served_model_name: str | None = served(None, "name of the model over HTTP (default: the model path)")
    host: str = served("127.0.0.1", "address to listen on")
    port: int = served(30000, "port to listen on")
    api_key: str | None = served(None, "requests must carry it as 'Authorization: Bearer KEY'")
    drain_timeout: float = served(10.0, "seconds that running requests may take to finish after a SIGTERM")
    log_level: str = served("info", "level of the log", ("debug", "info", "warning", "error"))
    device: str | None = runs(None, "where the model runs (default: cuda if there is one)", ("cpu", "cuda"))
    dtype: str = runs(
        "auto", "auto: the checkpoint's on cuda, float32 on the CPU", ("auto", "float32", "bfloat16")
    )
    load_format: str = runs(
        "auto",
        "auto and safetensors mean the same; dummy: random weights, no files of weights needed",
        ("auto", "safetensors", "dummy"),
    )
    random_seed: int = runs(0, "seeds the requests that bring no seed, and dummy weights")
    skip_server_warmup: bool = runs(False, "cuda: kernels are compiled when a prompt first needs them")
    context_length: int | None = memory(None, "longest sequence (default: the model's)")
    page_size: int = memory(64, "tokens in a page of the key-value cache; a power of two up to 256")
    max_total_tokens: int | None = memory(None, "tokens that the cache holds (default: from free memory)")
    mem_fraction_static: float = memory(0.8, "share of the device's memory for weights and cache (cuda)")
    max_running_requests: int = memory(64, "requests that run at the same time; more wait")
    chunked_prefill_size: int | None = memory(
        None, "longest piece of a prompt in one step; -1: whole prompts (default: cpu 2048, cuda 8192)"
    )
    prefill_burst: float = memory(
        2.0,
        "seconds for which prompts that come together may hold up requests that decode; after that decoding "
        "keeps four fifths of its speed, however many prompts wait; -1: no limit",
    )
    enable_mixed_chunk: bool = memory(False, "no burst: the same as --prefill-burst 0")
    disable_overlap_schedule: bool = memory(
        False, "read the tokens of each decode step before the next is launched (as always on a CPU)"
    )
    disable_radix_cache: bool = memory(False, "do not reuse the cache of common prefixes")
    attention_backend: str = attention(
        "nsa",
        "attention backend; the two names mean the same",
        ("nsa", "dsa"),
        instead="models with sparse attention have one backend, nsa, in the implementations that "
        "--nsa-prefill-backend and --nsa-decode-backend name",
    )
    nsa_prefill_backend: str = attention(
        "auto",
        "implementation of sparse attention in prefill",
        NSA_BACKENDS,
        aliases=("--dsa-prefill-backend",),
    )
    nsa_decode_backend: str = attention(
        "auto",
        "implementation of sparse attention in decode",
        NSA_BACKENDS,
        aliases=("--dsa-decode-backend",),
    )
    kv_cache_dtype: str = attention(
        "auto",
        "auto: the model's, or fp8_e4m3 where flashmla_kv reads the cache; fp8_e4m3 chooses flashmla_kv",
        ("auto", "bf16", "bfloat16", "fp8_e4m3"),
    )
    sampling_backend: str = attention("auto", "implementation of sampling", ("auto", "torch", "flashinfer"))
    disable_cuda_graph: bool = attention(False, "run decode steps without captured graphs")
    cuda_graph_max_bs: int | None = attention(None, "largest captured batch (default: max_running_requests)")
    speculative_algorithm: str | None = speculation(
        None,
        "draft with the model's MTP (NextN) layer; the two names mean the same",
        ("NEXTN", "EAGLE"),
        aliases=("--speculative-algo",),
        instead="drafts come from the model's MTP layer, which is --speculative-algorithm NEXTN or EAGLE",
    )
    speculative_draft_model_path: str | None = speculation(
        None, "the model's own path: the layer that drafts is in it", aliases=("--speculative-draft-model",)
    )
    speculative_num_steps: int | None = speculation(
        None, f"draft steps before each verification (default: {DEFAULT_SPECULATIVE_NUM_STEPS})"
    )
    speculative_eagle_topk: int = speculation(1, "branches of a draft; only 1 is supported")
    speculative_num_draft_tokens: int | None = speculation(None, "tokens verified at once: steps + 1")
    nsa_metadata_layout: str = metadata(
        "replicate", "where the draft backends' metadata lies when it is computed once", METADATA_LAYOUTS
    )
    nsa_metadata_copy: str = metadata(
        "auto", "how layout replicate copies into the backends", METADATA_COPIES
    )
    nsa_draft_seqlens: str = metadata(
        "step",
        "lengths seen by draft step i: step = committed + i + 1; committed = the same for every step",
        ("committed", "step"),
    )

    def __post_init__(self) -> None:
        for message in values_that_cannot_be(self):
            raise ValueError(message)
        self._derive()
        for bad, message in self._checks():
            if bad:
                raise ValueError(message)

    def _derive(self) -> None:
        derived: dict[str, Any] = {}
        if self.device is None:
            derived["device"] = "cuda" if _cuda_is_available() else "cpu"
        if self.served_model_name is None:
            derived["served_model_name"] = self.model_path
        if self.tokenizer_path is None:
            derived["tokenizer_path"] = self.model_path
        if self.load_format == "safetensors":
            derived["load_format"] = "auto"
        if self.kv_cache_dtype == "fp8_e4m3":
            for name in ("nsa_prefill_backend", "nsa_decode_backend"):
                if getattr(self, name) == "auto":
                    derived[name] = "flashmla_kv"
        if self.chunked_prefill_size is None:
            on_cuda = derived.get("device", self.device) == "cuda"
            derived["chunked_prefill_size"] = CHUNKED_PREFILL_SIZE["cuda" if on_cuda else "cpu"]
        if self.cuda_graph_max_bs is None:
            derived["cuda_graph_max_bs"] = self.max_running_requests
        if self.speculative_algorithm is not None:
            steps = self.speculative_num_steps
            if steps is None:
                steps = derived["speculative_num_steps"] = DEFAULT_SPECULATIVE_NUM_STEPS
            if self.speculative_num_draft_tokens is None:
                derived["speculative_num_draft_tokens"] = steps + 1
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # the class is frozen for everybody else

    def _checks(self) -> Iterator[tuple[bool, str]]:
        """(is wrong, message), in the order in which they are reported."""

        def at_least(name: str, low: int) -> tuple[bool, str]:
            value = getattr(self, name)
            return value is not None and value < low, f"{flag(name)} must be at least {low}, got {value}"

        yield not self.model_path, "--model-path must not be empty"
        yield not 0 <= self.port <= 65535, f"--port must be in [0, 65535], got {self.port}"
        yield self.api_key == "", "--api-key must not be empty"
        yield at_least("random_seed", 0)
        yield at_least("drain_timeout", 0)
        yield at_least("context_length", 2)
        page = self.page_size
        yield (
            page not in [1 << i for i in range(9)],
            f"--page-size must be a power of two in [1, 256], got {page}",
        )
        total = self.max_total_tokens
        yield (
            total is not None and total < page,
            f"--max-total-tokens {total} does not hold one page of --page-size {page}",
        )
        share = self.mem_fraction_static
        yield not 0 < share < 1, f"--mem-fraction-static must be in (0, 1), got {share}"
        yield at_least("max_running_requests", 1)
        yield at_least("cuda_graph_max_bs", 1)
        chunk = self.chunked_prefill_size
        yield chunk != -1 and chunk < 1, f"--chunked-prefill-size must be -1 (off) or at least 1, got {chunk}"
        burst = self.prefill_burst
        yield (
            burst != -1 and not 0 <= burst < math.inf,
            f"--prefill-burst must be -1 (no limit) or a number of seconds from 0, got {burst}",
        )
        yield from self._device_checks()
        yield from self._speculation_checks()
        yield from self._metadata_checks()

    def _device_checks(self) -> Iterator[tuple[bool, str]]:
        needs_cuda = {
            "kv_cache_dtype": ("fp8_e4m3",),
            "nsa_prefill_backend": ("triton", "flashinfer", "flashmla_kv", "flashmla_sparse"),
            "nsa_decode_backend": ("triton", "flashinfer", "flashmla_kv", "flashmla_sparse"),
            "sampling_backend": ("flashinfer",),
        }
        for name, values in needs_cuda.items():
            value = getattr(self, name)
            yield (
                self.device == "cpu" and value in values,
                f"{flag(name)} {value} needs --device cuda, not --device cpu",
            )

        kind = self.kv_cache_dtype
        for name in ("nsa_prefill_backend", "nsa_decode_backend"):
            value = getattr(self, name)
            yield (
                kind != "auto" and (kind == "fp8_e4m3") != (value == "flashmla_kv"),
                f"--kv-cache-dtype {kind} does not go with {flag(name)} {value}: "
                "flashmla_kv, and it alone, reads a cache in fp8_e4m3",
            )

    def _speculation_checks(self) -> Iterator[tuple[bool, str]]:
        draft_model = self.speculative_draft_model_path
        yield (
            draft_model not in (None, self.model_path),
            f"--speculative-draft-model-path {draft_model} must be --model-path {self.model_path}: "
            "the layer that drafts is in the model's checkpoint",
        )
        steps, draft = self.speculative_num_steps, self.speculative_num_draft_tokens
        for name, value in (("speculative_num_steps", steps), ("speculative_num_draft_tokens", draft)):
            yield (
                self.speculative_algorithm is None and value is not None,
                f"{flag(name)} {value} needs --speculative-algorithm",
            )
        topk = self.speculative_eagle_topk
        yield topk != 1, f"--speculative-eagle-topk {topk} is not supported: only 1 is"
        if steps is None:
            return
        most = MAX_SPECULATIVE_NUM_STEPS
        yield not 1 <= steps <= most, f"--speculative-num-steps must be in [1, {most}], got {steps}"
        yield (
            draft != steps + 1,
            f"--speculative-num-draft-tokens {draft} must be --speculative-num-steps {steps} + 1, "
            "since --speculative-eagle-topk is 1",
        )

    def _metadata_checks(self) -> Iterator[tuple[bool, str]]:
        precompute = envs.SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA
        layout, copy = self.nsa_metadata_layout, self.nsa_metadata_copy
        in_graph = layout in ("in_graph", "indirect")  # serve a graph without drafts as well
        for name, value, default in (
            ("nsa_metadata_layout", layout, "replicate"),
            ("nsa_metadata_copy", copy, "auto"),
        ):
            yield (
                value != default and not precompute.get(),
                f"{flag(name)} {value} needs the environment variable {precompute.name}=1",
            )
            yield (
                value != default and self.speculative_algorithm is None and not in_graph,
                f"{flag(name)} {value} needs --speculative-algorithm",
            )
        yield (
            layout != "replicate" and copy != "auto",
            f"--nsa-metadata-copy {copy} has nothing to copy with --nsa-metadata-layout {layout}",
        )
        yield (
            in_graph and self.disable_cuda_graph,
            f"--nsa-metadata-layout {layout} cannot be used with --disable-cuda-graph",
        )

    @classmethod
    def from_cli(cls, argv: Sequence[str] | None = None) -> ServerArgs:
        """From the command line. Ends the process with a usage message where the arguments are wrong."""
        return Parser("sglang.launch_server", cls).parse(argv, cls)

    @property
    def prefill_burst_limit(self) -> float:
        """Seconds; infinity: no limit."""
        if self.enable_mixed_chunk:
            return 0.0
        return float("inf") if self.prefill_burst == -1 else self.prefill_burst

    def to_dict(self) -> dict[str, Any]:
        """All arguments by name, with the secret ones masked."""
        values = dataclasses.asdict(self)
        if self.api_key is not None:
            values["api_key"] = "***"
        return values

    @property
    def model_names(self) -> tuple[str, ...]:
        """What the model is called over HTTP: the name it is served under, its path, its folder's name."""
        names = (
            self.served_model_name or self.model_path,
            self.model_path,
            Path(self.model_path).resolve().name,
        )
        return tuple(dict.fromkeys(names))

    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


def _cuda_is_available() -> bool:
    import torch  # slow to import, and needed only here

    return torch.cuda.is_available()


@dataclass(frozen=True)
class PortArgs:
    """ZeroMQ addresses of the two processes. The tokenizer process binds both, the scheduler connects."""

    scheduler_input_ipc_name: str  # tokenizer process PUSH -> scheduler PULL
    tokenizer_ipc_name: str  # scheduler PUSH -> tokenizer process PULL

    @classmethod
    def init_new(cls) -> PortArgs:
        """Fresh addresses in a directory of their own, which is removed when this process ends."""
        directory = Path(tempfile.mkdtemp(prefix="sglang-"))
        ports = cls(f"ipc://{directory}/scheduler", f"ipc://{directory}/tokenizer")
        atexit.register(ports.remove)
        return ports

    def remove(self) -> None:
        """Removes the directory of the sockets."""
        directory = Path(self.tokenizer_ipc_name.removeprefix("ipc://")).parent
        shutil.rmtree(directory, ignore_errors=True)
