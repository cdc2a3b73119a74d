"""Where mini-sglang is hooked: its classes are wrapped when `install()` is called, before an engine is
made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..nsa.kernels import load_kernels
from .fields import ReplayBuffers
from .fused_replay import FusedReplay
from .in_graph import NOTHING, InGraphReplay
from .settings import VARIABLE, Mode
from .trial import differing

_INSTALLED = "_sglang_nsa_mode"  # on GraphRunner, once it is wrapped
_REPLAY = "_sglang_nsa_replay"  # on a graph runner: its InGraphReplay
Method = Callable[..., Any]


class UnsupportedError(Exception):
    """What this mini-sglang has that is not known here; the reason."""


def install(mode: Mode | None = None) -> Mode:
    """Hooks mini-sglang in this process, as MINISGL_USE_FUSED_COPY says or as `mode` does. Twice is once.

    Raises ValueError where the variable's value is none, ImportError where mini-sglang or the kernels do
    not load.
    """
    import torch

    mode = Mode.from_environment() if mode is None else mode
    if mode is Mode.OFF:
        return mode
    from minisgl.engine.graph import GraphRunner

    installed = getattr(GraphRunner, _INSTALLED, None)
    if installed is not None:
        if installed is not mode:
            raise ValueError(f"{VARIABLE}: {installed.value} is installed already, {mode.value} came later")
        return mode
    load_kernels("cuda" if torch.version.cuda is not None else "cpu")  # now, not while graphs are captured
    if mode is Mode.FUSED:
        _wrap(GraphRunner, "_capture_graphs", _fuse_after_capture)
    else:
        from minisgl.scheduler.scheduler import Scheduler

        _wrap(GraphRunner, "_capture_graphs", _generate_in_capture)
        _wrap(Scheduler, "__init__", _share_token_pool)
        _wrap(Scheduler, "_prepare_batch", _prepare_batch)
        _wrap(Scheduler, "_schedule_next_batch", _schedule_next_batch)
    setattr(GraphRunner, _INSTALLED, mode)
    return mode


def _wrap(owner: type, name: str, hook: Method) -> None:
    """`hook` gets the method and its arguments."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return hook(original, self, *args, **kwargs)

    setattr(owner, name, method)


def find_buffers(runner: Any) -> ReplayBuffers:
    """The static inputs of a runner whose buffers are allocated. Raises UnsupportedError."""
    from minisgl.attention.base import HybridBackend
    from minisgl.attention.fa import FlashAttentionBackend

    backend = runner.attn_backend
    decode = backend.decode_backend if isinstance(backend, HybridBackend) else backend
    attention = decode if type(decode) is FlashAttentionBackend else None
    buffers = ReplayBuffers(runner, attention)
    unknown = buffers.unknown()
    if unknown:
        raise UnsupportedError(f"not known here: {', '.join(unknown)}")
    return buffers


def _leave_alone(reason: object) -> None:
    _logger().warning(f"{VARIABLE} is set, but mini-sglang's own copies stay: {reason}")


def _say(mode: Mode, buffers: ReplayBuffers) -> None:
    what = ", ".join(field.name for field in buffers.fields)
    _logger().info(f"{VARIABLE}={mode.value} brings up to date: {what}")


@functools.cache
def _logger() -> Any:
    from minisgl.utils import init_logger

    return init_logger(__name__)


def _fuse_after_capture(original: Method, runner: Any, *args: Any, **kwargs: Any) -> None:
    original(runner, *args, **kwargs)
    if runner.max_graph_bs == 0:
        return
    try:
        buffers = find_buffers(runner)
        replay = FusedReplay(buffers)
        different = differing(buffers, replay)
        if different:
            raise UnsupportedError(f"a probe batch left something else in {', '.join(different)}")
    except (UnsupportedError, AttributeError) as reason:
        _leave_alone(reason)
        return
    replay.install()
    _say(Mode.FUSED, buffers)


def _generate_in_capture(
    original: Method, runner: Any, max_seq_len: int, vocab_size: int, model: Any
) -> None:
    """The model is captured behind the nodes that generate its inputs."""
    generating = GeneratingModel(model, runner)
    original(runner, max_seq_len, vocab_size, generating)
    if generating.replay is not None:
        generating.replay.install()
        setattr(runner, _REPLAY, generating.replay)
        _say(Mode.IN_GRAPH, generating.replay.buffers)


class GeneratingModel:
    """What the runner captures. It allocates its buffers in the method that captures, so they are looked
    for at the first call."""

    def __init__(self, model: Any, runner: Any) -> None:
        self._model, self._runner = model, runner
        self._looked = False
        self.replay: InGraphReplay | None = None

    def forward(self) -> Any:
        from minisgl.core import get_global_ctx

        context = get_global_ctx()
        if not self._looked:
            self._looked = True
            try:
                buffers = find_buffers(self._runner)
                self.replay = InGraphReplay(buffers, context.page_table, context.page_size)
            except (UnsupportedError, AttributeError, TypeError) as reason:
                _leave_alone(reason)
        if self.replay is not None:
            self.replay.generate(context.batch.size)
        return self._model.forward()


def in_graph_replay(runner: Any) -> InGraphReplay | None:
    return vars(runner).get(_REPLAY)


def _share_token_pool(original: Method, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """The captured graphs read the token pool, so theirs was made first; nothing is in either yet."""
    original(scheduler, *args, **kwargs)
    replay = in_graph_replay(scheduler.engine.graph_runner)
    if replay is not None:
        scheduler.table_manager.token_pool = scheduler.token_pool = replay.token_pool


def _prepare_batch(original: Method, scheduler: Any, batch: Any) -> Any:
    """mini-sglang's preparation of a decode batch that a graph serves, without what the graph generates."""
    from minisgl.scheduler.scheduler import ForwardInput

    engine = scheduler.engine
    replay = in_graph_replay(engine.graph_runner)
    if replay is None or not engine.graph_runner.can_use_cuda_graph(batch):
        return original(scheduler, batch)
    engine.graph_runner.pad_batch(batch)
    scheduler.cache_manager.allocate_paged(batch.reqs)
    if replay.buffers.attention is None:
        engine.attn_backend.prepare_metadata(batch)
    write_tuple = replay.pack(batch)
    return ForwardInput(batch, engine.sampler.prepare(batch), input_tuple=NOTHING, write_tuple=write_tuple)


def _schedule_next_batch(original: Method, scheduler: Any) -> Any:
    replay = in_graph_replay(scheduler.engine.graph_runner)
    if replay is not None:
        replay.wait_until_read()
    return original(scheduler)
