"""The training: six phases, each of a fixed number of steps."""

import logging
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .data import Crops
from .evaluate import bits_per_byte, generate
from .model import MoE, TinyNSA

logger = logging.getLogger(__name__)

BALANCE_RATE = 1e-3  # step of the experts' selection bias, DeepSeek-V3 report 4.2
DRAFT_STEPS = 4
TOPK_MARGIN = 2  # training selects so many times fewer keys than serving: what is harder makes it robust
MTP_WEIGHT = 0.3  # of the MTP layer's first step while the main model trains, as in the DeepSeek-V3 report
TEMPERATURE = 0.5  # of the text that the model writes
WRITTEN_WINDOWS = 256  # what it writes for the last phase
MEASUREMENTS = 5  # of held-out text in each phase of the main model
WARM_STEPS = 50  # steps over which a phase's learning rate rises


@dataclass(frozen=True)
class Phase:
    name: str
    mode: str  # of the attention
    steps: int
    length: int  # tokens per window
    batch: int
    lr: float
    end: float  # final learning rate / lr
    indexer_lr: float
    trains: str  # "all", "indexer" (of every layer) or "nextn"


PHASES = (
    Phase("dense", "dense", 1500, 4096, 16, 3e-3, 0.3, 0.0, "all"),
    Phase("warmup", "warmup", 150, 2048, 8, 0.0, 0.3, 4e-3, "indexer"),
    Phase("sparse", "sparse", 1800, 2048, 8, 1e-3, 0.3, 2e-3, "all"),
    Phase("sparse_long", "sparse", 350, 4096, 4, 3e-4, 0.02, 6e-4, "all"),
    Phase("mtp", "sparse", 450, 2048, 8, 1.5e-3, 0.5, 1e-3, "nextn"),
    Phase("on_policy", "sparse", 350, 2048, 8, 7.5e-4, 0.02, 5e-4, "nextn"),
)


def quick_phases() -> tuple[Phase, ...]:
    return tuple(replace(p, steps=p.steps // 10, length=p.length // 32, batch=4) for p in PHASES)


def scaled(phases: tuple[Phase, ...], factor: float) -> tuple[Phase, ...]:
    """The same phases with ``factor`` times as many steps, one at least."""
    return tuple(replace(p, steps=max(1, round(p.steps * factor))) for p in phases)


def schedule(phase: Phase, step: int) -> float:
    """Factor of the learning rates: a short rise, then a cosine over the phase's steps."""
    cosine = phase.end + (1 - phase.end) * 0.5 * (1 + math.cos(math.pi * step / phase.steps))
    return min(1.0, (step + 1) / WARM_STEPS) * cosine


class Trainer:
    """Runs the phases over one model and keeps what happened in ``history`` and ``steps``."""

    def __init__(
        self,
        model: TinyNSA,
        crops: Crops,
        held_out: Tensor,
        sizes: Tensor,
        phases: tuple[Phase, ...],
    ) -> None:
        self.model, self.crops, self.held_out, self.sizes = model, crops, held_out, sizes
        self.phases = phases
        self.device = held_out.device
        self.history: list[dict[str, float | str]] = []  # one point: phase, step, loss, further figures
        self.took: dict[str, dict[str, float]] = {}  # steps, tokens and seconds of each phase
        self.written: Tensor | None = None  # text that the model wrote, for the last phase

    def autocast(self) -> AbstractContextManager:
        if self.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()

    def groups(self, phase: Phase) -> list[dict[str, object]]:
        """The phase's parameters, grouped as the optimizer wants them; every other one is frozen."""
        groups: dict[str, list[torch.nn.Parameter]] = {"matrix": [], "vector": [], "indexer": []}
        for name, weight in self.model.named_parameters():
            indexer = ".indexer." in name
            mine = {"all": True, "indexer": indexer, "nextn": name.startswith("nextn.")}[phase.trains]
            weight.requires_grad_(mine)
            if mine:
                groups["indexer" if indexer else "matrix" if weight.dim() == 2 else "vector"].append(weight)
        return [
            {
                "params": weights,
                "weight_decay": 0.1 if kind == "matrix" else 0.0,
                "peak": phase.indexer_lr if kind == "indexer" else phase.lr,
            }
            for kind, weights in groups.items()
            if weights
        ]

    def run(self) -> None:
        before = 0
        for phase in self.phases:
            self.run_phase(phase, before)
            before += phase.steps

    def run_phase(self, phase: Phase, before: int) -> None:
        """Trains for the phase's steps; ``before`` is how many other phases took already."""
        groups = self.groups(phase)
        optimizer = torch.optim.AdamW(
            groups, lr=phase.lr, betas=(0.9, 0.95), fused=self.device.type == "cuda"
        )
        began = time.monotonic()
        bar = tqdm(range(phase.steps), desc=phase.name, unit="step", mininterval=2.0)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(phase, step)
            loss, figures = self.loss(phase, step)
            loss.backward()
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 10 == 0:
                point = {"loss": loss.item(), **{k: v.item() for k, v in figures.items()}}
                self.note(phase, before + step, point)
                bar.set_postfix({k: f"{v:.3f}" for k, v in point.items()}, refresh=False)
            if phase.trains == "all" and (step + 1) % max(1, phase.steps // MEASUREMENTS) == 0:
                self.note(phase, before + step, {"held_out": self.measure(phase)})
        seconds = time.monotonic() - began
        tokens = phase.steps * phase.batch * phase.length
        self.took[phase.name] = {"steps": phase.steps, "tokens": tokens, "seconds": round(seconds, 1)}
        logger.info("%s: %d steps, %.1f M tokens, %.0f s", phase.name, phase.steps, tokens / 1e6, seconds)

    def note(self, phase: Phase, step: int, figures: dict[str, float]) -> None:
        if not all(math.isfinite(value) for value in figures.values()):
            raise FloatingPointError(f"{phase.name}, step {step}: {figures}")
        self.history.append({"phase": phase.name, "step": step, **figures})

    def measure(self, phase: Phase) -> float:
        with torch.compiler.set_stance("force_eager"), self.autocast():
            return bits_per_byte(
                self.model, self.held_out, self.sizes, self.phases[0].length, phase.mode, windows=24
            )

    def loss(self, phase: Phase, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if phase.name == "warmup":  # too short to be worth compiling
            with torch.compiler.set_stance("force_eager"), self.autocast():
                return self.warmup_loss(self.crops.draw(phase.batch, phase.length + 1))
        if phase.trains == "all":
            return self.main_loss(self.crops.draw(phase.batch, phase.length + 1), phase.mode)
        rule = "step" if step % 3 else "committed"
        if phase.name == "on_policy" and step % 4:
            return self.nextn_loss(self.on_policy(phase), rule, skip=phase.length // 2 - 1)
        return self.nextn_loss(self.crops.draw(phase.batch, phase.length), rule)

    def warmup_loss(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Every indexer's distance from its layer's dense attention. # tokens [b, t + 1], int64"""
        hidden, main, _ = self.model(tokens[:, :-1], "warmup")
        _, nextn, _ = self.model.draft(hidden, tokens, 1, "step", mode="warmup")
        return main + nextn, {"index": main.detach(), "index_mtp": nextn.detach()}

    def main_loss(self, tokens: Tensor, mode: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Next token, the MTP layer's first step, the indexers where they run. # tokens [b, t + 1], int64"""
        with self.autocast():
            hidden, index, loads = self.model(tokens[:, :-1], mode)
            logits = self.model.lm_head(hidden)
            (after_next,), index_mtp, loads_mtp = self.model.draft(hidden, tokens, 1, "step", mode=mode)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        nats_mtp = F.cross_entropy(after_next[:, :-1].flatten(0, 1).float(), tokens[:, 2:].flatten())
        layers = [*self.model.layers, self.model.nextn.layer]
        balance([layer.mlp for layer in layers if isinstance(layer.mlp, MoE)], loads + loads_mtp)
        figures = {"nats": nats.detach(), "nats_mtp": nats_mtp.detach(), "index": index.detach()}
        return nats + MTP_WEIGHT * nats_mtp + index + index_mtp, figures

    def nextn_loss(self, tokens: Tensor, rule: str, skip: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """Distance of the drafts from the target's own predictions, over ``DRAFT_STEPS`` steps.

        Half cross entropy with the target's greedy choice, which is what gets accepted, half with its
        distribution. Rows below ``skip`` do not count. # tokens [b, t], int64
        """
        with self.autocast():
            with torch.no_grad():
                hidden, _, _ = self.model(tokens, "sparse")
                teacher = self.model.lm_head(hidden).float()
            drafts, index, loads = self.model.draft(hidden, tokens, DRAFT_STEPS, rule)
        soft, greedy = teacher.softmax(-1), teacher.argmax(-1)
        total, agree = index, []
        for k, logits in enumerate(drafts, start=1):
            mine = logits[:, skip : tokens.shape[1] - k].float().flatten(0, 1)
            theirs = greedy[:, skip + k :].flatten()
            hard_loss = F.cross_entropy(mine, theirs)
            soft_loss = F.cross_entropy(mine, soft[:, skip + k :].flatten(0, 1))
            total = total + (hard_loss + soft_loss) / (2 * DRAFT_STEPS)
            agree.append((mine.argmax(-1) == theirs).float().mean())
        balance([self.model.nextn.layer.mlp], [torch.stack(loads).mean(0)])
        return total, {"agree_1": agree[0], f"agree_{DRAFT_STEPS}": agree[-1], "index": index.detach()}

    def on_policy(self, phase: Phase) -> Tensor:
        """Windows whose second half the model wrote: what drafts meet in use.  # [batch, length], int64"""
        if self.written is None:
            many = WRITTEN_WINDOWS if self.device.type == "cuda" else phase.batch
            half = phase.length // 2
            with self.autocast(), torch.compiler.set_stance("force_eager"):
                prompts = self.crops.draw(many, half)
                self.written = generate(self.model, prompts, phase.length - half, TEMPERATURE)
        pick = torch.randint(len(self.written), (phase.batch,), generator=self.crops.generator)
        return self.written[pick.to(self.device)]


@torch.no_grad()
def balance(mixtures: list[MoE], loads: list[Tensor]) -> None:
    """Moves each expert's selection bias one step against its load."""
    for moe, load in zip(mixtures, loads, strict=True):
        moe.gate.e_score_correction_bias.add_(BALANCE_RATE * (load.mean() - load).sign())
