"""The metadata of one multi-step wrapper's N draft backends: how it is laid out and brought up to date."""

from __future__ import annotations

import logging
from typing import Any

import torch

from .conditions import holds_whole_pages, require_supported
from .counters import Counters
from .derived import Stage
from .family import Installed, UnsupportedError
from .fields import STATE, page_table_bytes
from .generation import Generation
from .measure import Alternation
from .own_path import Shadow, narrowed
from .settings import Settings
from .trial import run_trial
from .verification import Verifier

logger = logging.getLogger(__name__)

VERIFIED_REPORT = 500  # replays between two log lines of verification


class DraftMetadata:
    """Decided at `init_cuda_graph_state`, planned at every capture, run at every replay."""

    def __init__(
        self,
        installed: Installed,
        settings: Settings,
        wrapper: Any,
        server_args: Any,
        counters: Counters,
        allocator: Any = None,
    ) -> None:
        """`allocator` gives out the slots in the backends' token table, as far as that is known."""
        self.installed, self.settings, self.counters = installed, settings, counters
        self.wrapper, self.server_args, self.allocator = wrapper, server_args, allocator
        self.backends: list[Any] = wrapper.attn_backends
        self.layout: str | None = None  # shared | replicate | in_graph; None: SGLang is left alone
        self.reason: str | None = None  # why SGLang is left alone, or refreshes the metadata itself
        self.whole_pages = False  # of slots, in the backends' token table
        self._first_alone: Any = None  # with one set for all: the wrapper with its first backend alone
        self._plans: dict[int, Generation | None] = {}  # by captured batch size; None: SGLang's own refresh
        self._launches: dict[int, Stage] = {}  # what a replay launches
        self._unproven: set[int] = set()  # sizes whose static inputs no replay has been compared with yet
        self._captured: Any = None  # the batch whose graph is being captured
        self._recorded: set[int] = set()  # in_graph: sizes whose captured graph has the plan in it
        self._pending: int | None = None  # in_graph: the size that the verifier has yet to check
        self._verifier: Verifier | None = None
        self._captured_schedules: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._alternation = Alternation(settings.alternate) if settings.alternate else None

    # ---- before the graphs are captured

    def init_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Decides, then allocates: with backends that share, one set of page tables instead of N."""
        self._plans, self._launches, self._unproven, self._recorded = {}, {}, set(), set()
        self._pending, self._verifier, self._first_alone = None, None, None
        try:
            self._decide()
        except UnsupportedError as error:
            self._leave_alone(str(error))
        except Exception as error:  # of SGLang's own code, run in a way that it does not expect
            self._leave_alone(f"{type(error).__name__}: {error}")
        if self.layout is None or self.layout == "replicate":
            self.installed.init_state(self.wrapper, max_bs, max_num_tokens)
        else:
            self._init_shared(max_bs, max_num_tokens)
        if self.layout is not None:
            if self.settings.verify:
                by_step = self.form.fields.by_step
                shadow = Shadow(self.installed, self.wrapper, range(len(self.backends)) if by_step else [0])
                shadow.init_state(max_bs, max_num_tokens)
                self._verifier = Verifier(shadow, self.form)
            self._report()

    def _decide(self) -> None:
        require_supported(self.installed, self.wrapper, self.server_args)
        self.form = self.installed.form(self.backends[0])
        self.whole_pages = holds_whole_pages(self.allocator, self.form.page_size)
        result = run_trial(self.installed, self.wrapper)
        if self.form.fields.by_step and result.generator is not None:
            raise UnsupportedError(result.generator)  # no work of SGLang's would be saved
        self.layout, self.reason = self.settings.layout, result.generator
        if self.reason is not None and self.layout == "in_graph":
            self.layout = "shared"

    def _leave_alone(self, reason: str) -> None:
        self.layout, self.reason = None, reason
        self.counters.left_alone(reason)
        if self.settings.strict:
            raise SystemExit(f"sglang-nsa-plugin (strict): {reason}")
        logger.warning("sglang-nsa-plugin leaves the draft metadata to SGLang: %s", reason)

    def _init_shared(self, max_bs: int, max_num_tokens: int) -> None:
        first, fields = self.backends[0], self.form.fields
        alone = narrowed(self.wrapper, [first])
        self._first_alone = None if fields.by_step else alone
        self.installed.init_state(alone, max_bs, max_num_tokens)
        shared = [name for name in fields.set_by_init - fields.own_by_init if hasattr(first, name)]
        for backend in self.backends[1:]:
            for name in shared:
                setattr(backend, name, getattr(first, name))
            if fields.own_state:
                state = getattr(first, STATE)
                setattr(backend, STATE, state | {name: state[name].clone() for name in fields.own_state})
            grow = getattr(backend, "_ensure_multi_ctas_kv_counter_capacity", None)
            if grow is not None:  # a counter of each backend, which must not grow during capture
                grow(max(max_bs, max_num_tokens))

    def _report(self) -> None:
        held = page_table_bytes(self.backends[0], self.form.fields)
        saved = 0 if self.layout == "replicate" else held * (len(self.backends) - 1)
        self.counters.started(self.layout, len(self.backends), saved)
        logger.info(
            "sglang-nsa-plugin: %d draft backends, layout %s, page tables %.1f MiB (%.1f MiB saved), "
            "slots %s, %s%s",
            len(self.backends),
            self.layout,
            held / 2**20,
            saved / 2**20,
            "in whole pages" if self.whole_pages else "anywhere",
            "one launch" if self.reason is None else f"refreshed by SGLang's own path once ({self.reason})",
            ", verified at every replay" if self.settings.verify else "",
        )

    # ---- capture

    def capture(self, batch: Any) -> None:
        """Plans the batch's size; `batch` holds the runner's static buffers."""
        if self.layout is None:
            self.installed.capture(self.wrapper, batch)
            return
        bs = batch.batch_size
        self.installed.capture(self._first_alone or self.wrapper, batch)
        if self._first_alone is not None:
            for backend in self.backends[1:]:
                self.installed.alias(self.backends[0], backend)
        self._captured = batch
        if self._alternation is not None:
            self._keep_schedules(bs)
        self._plan(bs, batch)
        if self._verifier is not None:
            self._verifier.shadow.capture(batch)

    def _keep_schedules(self, bs: int) -> None:
        """SGLang's path leaves schedules of some backends as they were captured, which fits any lengths; what
        the plugin's turn leaves there fits its last lengths alone, and can hang the reader of others."""
        sets = {id(m): m for m in (b.decode_cuda_graph_metadata[bs] for b in self.backends)}
        for metadata in sets.values():
            schedule = getattr(metadata, "paged_mqa_schedule_metadata", None)
            if schedule is not None:
                self._captured_schedules.append((schedule, schedule.clone()))

    def _plan(self, bs: int, batch: Any) -> None:
        before = self._plans.get(bs)
        if self.reason is not None:
            self._plans[bs] = None
            return
        if before is not None and before.seq_lens.data_ptr() != batch.seq_lens.data_ptr():
            # Two runners with buffers of their own: only the batch says which one replays.
            self._refresh_by_sglang(bs, "its graph was captured twice, over different buffers")
            return
        backends = self.backends if self._first_alone is None else self.backends[:1]
        sets = [backend.decode_cuda_graph_metadata[bs] for backend in backends]
        try:
            plan = Generation(self.installed, self.form, backends, sets, batch, self.whole_pages)
            self._launches[bs] = _nothing if self.layout == "in_graph" else plan.as_graph()
            self._plans[bs] = plan
            self._unproven.add(bs)
        except (ImportError, RuntimeError, UnsupportedError) as error:
            self._refresh_by_sglang(bs, str(error))

    def _refresh_by_sglang(self, bs: int, reason: str) -> None:
        self._plans[bs] = None
        if self.settings.strict:
            raise SystemExit(f"sglang-nsa-plugin (strict): batch size {bs}: {reason}")
        logger.warning("sglang-nsa-plugin: SGLang refreshes batch size %d itself: %s", bs, reason)

    def run_in_graph(self, batch: Any) -> None:
        """Where the captured draft function begins."""
        if self.layout != "in_graph" or batch is not self._captured:
            return
        bs = batch.batch_size
        plan = self._plans[bs]
        if plan is not None:
            plan.run()
            if not plan.on_gpu or torch.cuda.is_current_stream_capturing():
                self._recorded.add(bs)

    # ---- replay: the hot path

    def replay(self, batch: Any, bs: int) -> None:
        """Before a replay of the draft graph of `bs` (padded) requests."""
        alternation = self._alternation
        if alternation is None:
            self._replay(batch, bs)
            return
        own = alternation.begin(bs)
        if own and alternation.switched:
            for target, captured in self._captured_schedules:
                target.copy_(captured)
        self.installed.replay(self.wrapper, batch, bs) if own else self._replay(batch, bs)
        alternation.end(bs, own)

    def _replay(self, batch: Any, bs: int) -> None:
        if self.layout is None:
            self.installed.replay(self.wrapper, batch, bs)
            return
        plan = self._plans.get(bs)
        if bs in self._unproven:
            plan = self._prove(plan, batch, bs)
        verifier = self._verifier
        if verifier is not None:
            self._verify_before(verifier, batch, bs)
        if plan is None:
            self._own_refresh(batch, bs)
        else:
            self._launches[bs]()
            self.counters.generated += 1
            for backend in self.backends:
                backend.forward_metadata = backend.decode_cuda_graph_metadata[bs]
        if verifier is not None and self._pending is None:
            self._check(verifier, bs)
        self.counters.tick()

    def _own_refresh(self, batch: Any, bs: int) -> None:
        self.counters.own_refreshes += 1
        if self._first_alone is None:
            self.installed.replay(self.wrapper, batch, bs)
            return
        self.installed.refresh(self._first_alone, batch, bs)
        for backend in self.backends[1:]:
            backend.forward_metadata = self.backends[0].forward_metadata

    def _prove(self, plan: Generation, batch: Any, bs: int) -> Generation | None:
        """At a size's first replay: does the runner's buffer hold what the batch says?"""
        self._unproven.discard(bs)
        if plan.reads(batch):
            logger.info("sglang-nsa-plugin: batch size %d: first replay, inputs as planned", bs)
            if self._launches[bs] is _nothing and bs not in self._recorded:
                self._launch_outside(plan, bs)
            return plan
        if self.layout == "in_graph":
            raise RuntimeError(
                f"sglang-nsa-plugin: batch size {bs}: the graph's buffers do not hold the batch"
            )
        self._refresh_by_sglang(bs, "the runner's buffers do not hold the batch")
        return None

    def _launch_outside(self, plan: Generation, bs: int) -> None:
        """The draft worker's captured function begins where no hook is: its graph reads what lies there."""
        reason = f"batch size {bs}: the captured graph does not write its metadata"
        if self.settings.strict:
            raise SystemExit(f"sglang-nsa-plugin (strict): {reason}")
        logger.warning("sglang-nsa-plugin: %s; it is written before each replay", reason)
        self._launches[bs] = plan.as_graph()

    def _check(self, verifier: Verifier, bs: int, apart_from: torch.Tensor | None = None) -> None:
        verifier.check(self.backends, bs, apart_from)
        self.counters.verified += 1
        if self.counters.verified % VERIFIED_REPORT == 0:
            logger.info("sglang-nsa-plugin: %d replays verified without a difference", self.counters.verified)

    def _verify_before(self, verifier: Verifier, batch: Any, bs: int) -> None:
        if self._pending is not None:  # that graph has been replayed since
            self._check(verifier, self._pending, self._plans[self._pending].seq_lens)
            self._pending = None
        verifier.compute(batch, bs)
        if self._plans.get(bs) is not None and self._launches[bs] is _nothing:
            self._pending = bs


def _nothing() -> None:
    """in_graph: the graph itself brings its metadata up to date."""
