"""The training loop of ``demo:moe`` and of its dense twin: two processes, one cosine over a time budget, resumable.

The twin replays the progress the first run wrote down, so it sees the same tokens at the same learning rates.
Legend: L layers, E experts, K top-k, T tokens, B sequences, P positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .losses import load_balance, router_z, shares, within_pools
from .text import VOCABULARY, Streams, batch

SEED = 16
PEAK_LEARNING_RATE = 3e-3
FINAL_SHARE = 0.02
WARM_UP_STEPS = 100
WEIGHT_DECAY = 0.1
BALANCE, Z = 0.02, 1e-3
SHARE_DECAY = 0.95
"""The loads that the balance loss sees are a mean over about this run's last 20 batches."""
POOLED = 0.5
"""So many of the sequences may only use a pool of experts."""
POOLS = (2, 8)
SEQUENCES_PER_DOMAIN = 4
LENGTH, LATE_LENGTH, LATE = 256, 512, 0.85
"""The last 15 % of the time trains on half as many sequences of twice the length, and without pools."""
MARKS = (0.01, 0.1, 0.4)
"""Progress at which the held-out routing decisions are written down; the end is the fourth."""
SAVE_SECONDS = 120


@dataclass
class State:
    """What a run needs to go on after it was cut off, besides weights and optimizer."""

    elapsed: float = 0.0
    progress: list[float] = field(default_factory=list)
    """Share of the schedule done after each step."""
    losses: list[tuple[float, float]] = field(default_factory=list)
    """(language loss, mean load balance over layers) of each step."""
    marks: list[tuple[int, Tensor]] = field(default_factory=list)
    """(step, decisions uint8 [L, T, K]) on the held-out windows."""
    share_LE: Tensor | None = None


def new_model(*, dense: bool = False) -> Any:
    """OLMoE with 16 experts of 128, or its twin: one expert of 256, the same active parameters. Seeded."""
    torch.manual_seed(SEED)
    config = transformers.OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256 if dense else 128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_experts=1 if dense else 16,
        num_experts_per_tok=1 if dense else 2,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = transformers.OlmoeForCausalLM(config)
    ALL_EXPERTS_FUNCTIONS["demo_training"] = sorted_experts
    model.set_experts_implementation("demo_training")
    return model


def sorted_experts(self: Any, hidden_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Each expert once on a contiguous slice: a sixth faster on CPU than ``grouped_mm``, and the same sum."""
    order = chosen_TK.reshape(-1).argsort(stable=True)
    counts = torch.bincount(chosen_TK.reshape(-1), minlength=self.num_experts).tolist()
    tokens = order // chosen_TK.shape[1]
    done = []
    slices = hidden_TD.index_select(0, tokens).split(counts)
    for some, gate_up, down in zip(
        slices, self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True
    ):
        gate, up = F.linear(some, gate_up).chunk(2, -1)
        done.append(F.linear(F.silu(gate) * up, down))
    weighted = torch.cat(done) * weights_TK.reshape(-1).index_select(0, order)[:, None]
    return torch.zeros_like(hidden_TD).index_add(0, tokens, weighted)


class Routing:
    """Hooks on the routers of one model: hold the batch's logits and free choices, and keep pooled sequences in pools."""

    def __init__(self, model: Any) -> None:
        self.sizes_B: Tensor | None = None
        self.logits: list[Tensor] = []
        self.chosen: list[Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._decide)

    def start(self, sizes_B: Tensor | None) -> None:
        """Forget the last batch; ``sizes_B`` are the next one's pool sizes (None: nobody is pooled)."""
        self.sizes_B, self.logits, self.chosen = sizes_B, [], []

    def _decide(
        self, gate: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE, weights_TK, chosen_TK = output
        self.logits.append(logits_TE)
        self.chosen.append(
            chosen_TK
        )  # the free choice: balance within pools leaves experts that only pools use
        if self.sizes_B is not None:
            allowed_BPE = within_pools(logits_TE.view(len(self.sizes_B), -1, gate.num_experts), self.sizes_B)
            top = allowed_BPE.view_as(logits_TE).softmax(-1).topk(gate.top_k, dim=-1)
            weights_TK, chosen_TK = top.values / top.values.sum(-1, keepdim=True), top.indices
        return logits_TE, weights_TK, chosen_TK


def decisions(model: Any, windows_BP: Tensor) -> Tensor:
    """The experts chosen for each held-out token without any pool, uint8 [L, T, K]."""
    kept: list[Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda *call: kept.append(call[2][2].to(torch.uint8)))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        for rows in windows_BP.split(8):
            model.model(rows, use_cache=False)
    for hook in hooks:
        hook.remove()
    n_layers = len(model.model.layers)
    return torch.stack([torch.cat(kept[layer::n_layers]) for layer in range(n_layers)])


def rate(progress: float, step: int) -> float:
    """Learning rate: linear over the first steps, then a cosine over the time budget."""
    cosine = FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * progress)) / 2
    return PEAK_LEARNING_RATE * cosine * min(1.0, (step + 1) / WARM_UP_STEPS)


@dataclass
class Run:
    """One process's part of a training: ``world`` processes call ``step`` together and stay equal."""

    model: Any
    streams: Streams
    seconds: float | None
    """The time budget; None replays ``replay``."""
    replay: list[float] = field(default_factory=list)
    rank: int = 0
    world: int = 1
    add_up: Callable[[Tensor], object] = lambda flat: flat
    """Sums a tensor over the processes, in place."""
    state: State = field(default_factory=State)

    def __post_init__(self) -> None:
        self.moe = self.model.config.num_experts > 1
        self.routing = Routing(self.model)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        decayed = [p for name, p in self.model.named_parameters() if p.ndim > 1 and "embed" not in name]
        plain = [p for name, p in self.model.named_parameters() if p.ndim == 1 or "embed" in name]
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}],
            lr=0.0,
            betas=(0.9, 0.95),
            foreach=True,
        )
        self.n_experts = self.model.config.num_experts
        shape = (len(self.model.model.layers), self.n_experts)
        if self.state.share_LE is None:
            self.state.share_LE = torch.full(shape, self.model.config.num_experts_per_tok / self.n_experts)

    @property
    def progress(self) -> float:
        """Share of the schedule done."""
        return self.state.progress[-1] if self.state.progress else 0.0

    @property
    def finished(self) -> bool:
        """Whether the budget is spent, or everything replayed."""
        if self.seconds is None:
            return len(self.state.progress) >= len(self.replay)
        return self.progress >= 1

    def step(self) -> None:
        """One batch, one update; the same weights everywhere afterwards."""
        began, number = time.monotonic(), len(self.state.progress)
        late = self.progress >= LATE
        length, per_domain = (
            (LATE_LENGTH, SEQUENCES_PER_DOMAIN // 2) if late else (LENGTH, SEQUENCES_PER_DOMAIN)
        )
        ids_BP = batch(
            self.streams, per_domain=per_domain // self.world, length=length, seed=(SEED, number, self.rank)
        )
        loss, balance, share_LE = self._backward(ids_BP, number)
        said = torch.tensor([loss, balance, self.state.elapsed])
        flat = torch.cat([p.grad.reshape(-1) for p in self.parameters] + [share_LE.reshape(-1), said])
        self.add_up(flat)
        flat /= self.world
        self._spread(flat[: -share_LE.numel() - 3])
        fresh_LE = flat[-share_LE.numel() - 3 : -3].view_as(share_LE)
        self.state.share_LE = SHARE_DECAY * self.state.share_LE + (1 - SHARE_DECAY) * fresh_LE
        elapsed = float(flat[-1])  # the mean of the processes' clocks, so that all agree
        progress = self.replay[number] if self.seconds is None else min(1.0, elapsed / self.seconds)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(progress, number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.state.progress.append(progress)
        self.state.losses.append((float(flat[-3]), float(flat[-2])))
        self.state.elapsed += time.monotonic() - began

    def _backward(self, ids_BP: Tensor, number: int) -> tuple[float, float, Tensor]:
        pooled = self.moe and self.progress < LATE
        self.routing.start(self._pools(len(ids_BP), number) if pooled else None)
        hidden = self.model.model(ids_BP[:, :-1], use_cache=False).last_hidden_state
        logits = F.linear(hidden, self.model.lm_head.weight)
        loss = F.cross_entropy(logits.flatten(0, 1), ids_BP[:, 1:].flatten())
        probability_LE = torch.stack([logits_TE.softmax(-1).mean(0) for logits_TE in self.routing.logits])
        balance_L = load_balance(self.state.share_LE, probability_LE)
        if self.moe:
            z = torch.stack([router_z(logits_TE) for logits_TE in self.routing.logits]).sum()
            (loss + BALANCE * balance_L.sum() + Z * z).backward()
        else:
            loss.backward()
        share_LE = torch.stack([shares(chosen_TK, self.n_experts) for chosen_TK in self.routing.chosen])
        return float(loss.detach()), float(balance_L.detach().mean()), share_LE

    def _pools(self, n: int, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(SEED + 1_000_003 * number + self.rank)
        sizes_B = torch.randint(POOLS[0], POOLS[1] + 1, (n,), generator=generator)
        return torch.where(torch.rand(n, generator=generator) < POOLED, sizes_B, self.n_experts)

    def _spread(self, flat: Tensor) -> None:
        place = 0
        for parameter in self.parameters:
            parameter.grad.copy_(flat[place : place + parameter.numel()].view_as(parameter))
            place += parameter.numel()

    def save(self, path: Path) -> None:
        """Everything a later process needs to go on, replaced in one move."""
        found = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": self.state,
        }
        torch.save(found, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Go on from a file of ``save``."""
        found = torch.load(path, weights_only=False)
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.state = found["state"]


def train(run: Run, *, file: Path, windows_BP: Tensor) -> None:
    """Step until finished; the first process saves, speaks and writes down routing decisions at the marks."""
    saved = time.monotonic()
    while not run.finished:
        run.step()
        if run.rank:
            continue
        number = len(run.state.progress)
        if run.moe and len(run.state.marks) < len(MARKS) and run.progress >= MARKS[len(run.state.marks)]:
            run.state.marks.append((number, decisions(run.model, windows_BP)))
        if number % 25 == 0:
            recent = run.state.losses[-25:]
            loss, balance = (sum(values) / len(recent) for values in zip(*recent, strict=True))
            print(
                f"step {number:5d} {run.progress:6.1%} loss {loss:.3f} balance {balance:.3f} {run.state.elapsed:6.0f} s"
            )
        if time.monotonic() - saved > SAVE_SECONDS:
            run.save(file)
            saved = time.monotonic()
    if run.rank == 0:
        run.save(file)
