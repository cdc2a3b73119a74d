"""What a server is started with: one frozen dataclass, from which the command line is generated."""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import shutil
import tempfile
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang.srt.environ import envs

NSA_BACKENDS = ("auto", "torch", "triton", "flashinfer", "flashmla_kv", "flashmla_sparse")
METADATA_LAYOUTS = ("replicate", "shared", "in_graph")
METADATA_COPIES = ("auto", "fused", "foreach", "streams", "cat", "triton", "torch")
DEFAULT_SPECULATIVE_NUM_STEPS = 4


def arg(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A field that is also a flag of the command line."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """Arguments of a server, with SGLang's names. Construction fills what is derived and checks the rest.

    Raises ValueError on a value out of range and on a combination that is impossible; the message names
    the flags as they are written on the command line.
    """

    model_path: str = arg(dataclasses.MISSING, "directory of a checkpoint in Hugging Face format")
    served_model_name: str | None = arg(None, "name of the model over HTTP (default: the model path)")
    host: str = arg("127.0.0.1", "address to listen on")
    port: int = arg(30000, "port to listen on")
    api_key: str | None = arg(None, "requests must carry it as 'Authorization: Bearer KEY'")
    log_level: str = arg("info", "level of the log", ("debug", "info", "warning", "error"))
    device: str | None = arg(None, "where the model runs (default: cuda if there is one)", ("cpu", "cuda"))
    dtype: str = arg(
        "auto", "auto: the checkpoint's on cuda, float32 on the CPU", ("auto", "float32", "bfloat16")
    )
    load_format: str = arg("auto", "dummy: random weights, no files of weights needed", ("auto", "dummy"))
    random_seed: int = arg(0, "seeds the requests that bring no seed, and dummy weights")
    context_length: int | None = arg(None, "longest sequence (default: the model's)")
    page_size: int = arg(64, "tokens in a page of the key-value cache; a power of two up to 256")
    max_total_tokens: int | None = arg(None, "tokens that the cache holds (default: from free memory)")
    mem_fraction_static: float = arg(0.8, "share of the device's memory for weights and cache (cuda)")
    max_running_requests: int = arg(64, "requests that run at the same time; more wait")
    chunked_prefill_size: int = arg(2048, "longest piece of a prompt in one step; -1: whole prompts")
    disable_radix_cache: bool = arg(False, "do not reuse the cache of common prefixes")
    attention_backend: str = arg("nsa", "attention backend", ("nsa",))
    nsa_prefill_backend: str = arg("auto", "implementation of sparse attention in prefill", NSA_BACKENDS)
    nsa_decode_backend: str = arg("auto", "implementation of sparse attention in decode", NSA_BACKENDS)
    sampling_backend: str = arg("auto", "implementation of sampling", ("auto", "torch", "flashinfer"))
    disable_cuda_graph: bool = arg(False, "run decode steps without captured graphs")
    cuda_graph_max_bs: int | None = arg(None, "largest captured batch (default: max_running_requests)")
    speculative_algorithm: str | None = arg(
        None, "draft with the model's MTP (NextN) layer; the two names mean the same", ("NEXTN", "EAGLE")
    )
    speculative_num_steps: int | None = arg(
        None, f"draft steps before each verification (default: {DEFAULT_SPECULATIVE_NUM_STEPS})"
    )
    speculative_eagle_topk: int = arg(1, "branches of a draft; only 1 is supported")
    speculative_num_draft_tokens: int | None = arg(None, "tokens verified at once: steps + 1")
    nsa_metadata_layout: str = arg(
        "replicate", "where the draft backends' metadata lies when it is computed once", METADATA_LAYOUTS
    )
    nsa_metadata_copy: str = arg("auto", "how layout replicate copies into the backends", METADATA_COPIES)
    nsa_draft_seqlens: str = arg(
        "step",
        "lengths seen by draft step i: step = committed + i + 1; committed = the same for every step",
        ("committed", "step"),
    )

    def __post_init__(self) -> None:
        self._check_choices()
        self._derive()
        for bad, message in self._checks():
            if bad:
                raise ValueError(message)

    def _check_choices(self) -> None:
        for f in dataclasses.fields(self):
            choices, value = f.metadata["choices"], getattr(self, f.name)
            if choices and value is not None and value not in choices:
                raise ValueError(f"{flag(f.name)} must be one of {', '.join(choices)}, got {value!r}")

    def _derive(self) -> None:
        derived: dict[str, Any] = {}
        if self.device is None:
            derived["device"] = "cuda" if _cuda_is_available() else "cpu"
        if self.served_model_name is None:
            derived["served_model_name"] = self.model_path
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
        yield at_least("context_length", 1)
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
        yield from self._device_checks()
        yield from self._speculation_checks()
        yield from self._metadata_checks()

    def _device_checks(self) -> Iterator[tuple[bool, str]]:
        needs_cuda = {
            "nsa_prefill_backend": ("triton", "flashinfer", "flashmla_kv", "flashmla_sparse"),
            "nsa_decode_backend": ("triton", "flashinfer", "flashmla_kv", "flashmla_sparse"),
            "sampling_backend": ("flashinfer",),
            "nsa_metadata_copy": ("triton", "streams"),
        }
        for name, values in needs_cuda.items():
            value = getattr(self, name)
            yield (
                self.device == "cpu" and value in values,
                f"{flag(name)} {value} needs --device cuda, not --device cpu",
            )

    def _speculation_checks(self) -> Iterator[tuple[bool, str]]:
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
        yield steps < 1, f"--speculative-num-steps must be at least 1, got {steps}"
        yield (
            draft != steps + 1,
            f"--speculative-num-draft-tokens {draft} must be --speculative-num-steps {steps} + 1, "
            "since --speculative-eagle-topk is 1",
        )

    def _metadata_checks(self) -> Iterator[tuple[bool, str]]:
        precompute = envs.SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA
        layout, copy = self.nsa_metadata_layout, self.nsa_metadata_copy
        for name, value, default in (
            ("nsa_metadata_layout", layout, "replicate"),
            ("nsa_metadata_copy", copy, "auto"),
        ):
            yield (
                value != default and not precompute.get(),
                f"{flag(name)} {value} needs the environment variable {precompute.name}=1",
            )
            yield (
                value != default and self.speculative_algorithm is None,
                f"{flag(name)} {value} needs --speculative-algorithm",
            )
        yield (
            layout != "replicate" and copy != "auto",
            f"--nsa-metadata-copy {copy} has nothing to copy with --nsa-metadata-layout {layout}",
        )
        yield (
            layout == "in_graph" and self.disable_cuda_graph,
            "--nsa-metadata-layout in_graph cannot be used with --disable-cuda-graph",
        )

    @classmethod
    def from_cli(cls, argv: Sequence[str] | None = None) -> ServerArgs:
        """From the command line. Ends the process with a usage message where the arguments are wrong."""
        parser = argparse.ArgumentParser("sglang.launch_server", allow_abbrev=False)
        cls.add_cli_args(parser)
        namespace = parser.parse_args(argv)
        try:
            return cls.from_namespace(namespace)
        except ValueError as error:
            parser.error(str(error))

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser) -> None:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            required = f.default is dataclasses.MISSING
            options: dict[str, Any] = {"help": f.metadata["help"], "dest": f.name}
            kind = _plain_type(hints[f.name])
            if kind is bool:
                options["action"] = "store_true"
            else:
                options |= {"type": kind, "choices": f.metadata["choices"]}
                options |= {"required": True} if required else {"default": f.default}
                if f.default not in (None, dataclasses.MISSING):
                    options["help"] += f" (default: {f.default})"
            parser.add_argument(flag(f.name), **options)

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> ServerArgs:
        return cls(**{f.name: getattr(namespace, f.name) for f in dataclasses.fields(cls)})

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


def flag(name: str) -> str:
    """The command line's spelling of a field: max_total_tokens -> --max-total-tokens."""
    return "--" + name.replace("_", "-")


def _plain_type(hint: Any) -> type:
    """int | None -> int."""
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None))
    return hint


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
