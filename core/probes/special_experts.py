"""Special experts: dead ones, super-experts, and the standing committee that serves every kind of text.

Legend: D domains, G groups of a domain's documents, R draws, L MoE layers, E experts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from core.evaluate._intervals import MIN_DOCUMENTS
from core.probes._domain_table import DATA, DomainTable, domain_choices
from core.probes._routed_text import SHORTEST, token_passages
from core.probes._routing_report import (
    CONSERVED,
    conservation_gap,
    count_choices,
    layer_by_expert,
    shown_note,
    shown_rows,
    text_notes,
    text_provenance,
)
from core.registry import Example, Settings, method
from core.routing.discover import moe_layers
from core.routing.super_experts import output_peaks, super_experts
from core.types import Cost, Metric, Progress, Prompt, Result, View, part_of

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel
    from core.probes._routed_text import Choices, Texts
    from core.probes._routing_report import Floats, Ints

DRAWS = 400
RANKED = 50


class SpecialExpertsSettings(Settings):
    """On what text, and how sure a member must be."""

    data: str = Field("domains", description=DATA)
    max_tokens: int = Field(8192, ge=256, le=65_536, description="Tokens read at most, all domains together")
    peak_tokens: int = Field(
        2048, ge=64, le=16_384, description="Tokens on which experts' single outputs are looked at; slower"
    )
    certainty: float = Field(
        0.95, ge=0.5, le=1.0, description="Share of resampled texts in which a committee member must be one"
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of the resampling")


def _cost(anatomy: Anatomy, n_tokens: int, settings: SpecialExpertsSettings) -> Cost:
    """Both readings; single outputs cost about twice a forward pass, and are held a passage at a time."""
    read = (settings.max_tokens + 2 * settings.peak_tokens) / max(1, n_tokens)
    layers = sum(block.is_moe for block in anatomy.blocks)
    return Cost(
        read,
        4 * SHORTEST * anatomy.experts_per_token * anatomy.d_model + 8 * DRAWS * layers * anatomy.n_experts,
    )


@method(
    "probe",
    title="Special experts",
    needs=["moe", "text"],
    paper="https://arxiv.org/abs/2507.23279",
    answers="Which expert does what?",
    examples=(
        Example("Whom not to prune", Prompt("(the texts are read; the prompt is not)")),
        Example(
            "Likely members of the committee, too",
            Prompt("(the texts are read; the prompt is not)"),
            {"certainty": 0.5},
        ),
    ),
    cost=_cost,
)
def special_experts(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: SpecialExpertsSettings
) -> Result:
    """Find the experts that stand out, and a list of those not to prune.

    Dead: no token of any domain chose it. Super (Su et al. 2025): the largest |value| it ever puts out, before the routing weight, is
    above the 99.5 % quantile of all experts, a tenth of the largest, and ten medians, in the first 75 % of the
    blocks; its outliers feed the attention sinks. Standing committee (after Wang et al. 2026, arXiv 2601.03425): its share of the routing weight
    is above the even share 1 / E in every domain. Certainty is the share of bootstrap draws of documents, within
    each domain, in which that holds; the committee's share of the routing weight, mean over domains, has their
    2.5 and 97.5 % quantiles. The protect list can be pasted into the recipe step prune_experts.
    """
    started = time.perf_counter()
    texts, choices = domain_choices(
        loaded, settings.data, part_of(progress, 0.0, 0.5), max_tokens=settings.max_tokens
    )
    load_LE = count_choices(choices).sum(0)
    committee = Committee.of(
        DomainTable.of(choices, texts, count="weight"), settings.certainty, settings.seed
    )
    progress(0.6, 1.0, "looking for super-experts")
    peaks = _peaks(loaded, texts, settings.peak_tokens)
    cells = expert_table(choices, load_LE, committee, peaks)
    ranked = cells.sort_values(["order", "lowest_domain"], ascending=[True, False], kind="stable")
    protected = protect_list(cells)
    return Result(
        frames={
            "ranked": ranked.drop(columns="order").head(RANKED).reset_index(drop=True),
            "main": shown_rows(cells, choices.layers, choices.n_experts),
            "committee": committee.frame(choices),
            "protect": pd.DataFrame(
                {"protect": [protected], "experts": [len(protected.split(",")) if protected else 0]}
            ),
        },
        views=_VIEWS,
        metrics=_metrics(cells, committee, choices),
        provenance=text_provenance(
            loaded,
            prompt,
            method="special_experts",
            settings=settings,
            started=started,
            texts=texts,
            choices=choices,
            exactness_gap=conservation_gap(load_LE, choices),
            exactness_check=CONSERVED,
        ),
        notes=(
            *text_notes(texts, choices),
            *_notes(peaks, protected, committee),
            *shown_note(choices.layers, choices.n_experts),
        ),
    )


@dataclass(frozen=True)
class Peaks:
    """Largest |value| each expert put out, and the super-experts found by it."""

    value_LE: Floats
    is_super_LE: NDArray[np.bool_]
    tokens: int


def _peaks(loaded: LoadedModel, texts: Texts, max_tokens: int) -> Peaks | None:
    """Look at single experts' outputs; None where the family does not let its experts' outputs be read one by one."""
    layers = moe_layers(loaded)
    if any(layer.shim for layer in layers):
        return None
    ids = [ids for _, ids in token_passages(loaded, texts, max_tokens, max_tokens // SHORTEST)]
    with loaded.lock:
        value_LE = output_peaks(loaded, layers, ids)
    found = super_experts(value_LE, layers, loaded.anatomy.n_layers)
    is_super_LE = np.zeros(value_LE.shape, dtype=bool)
    for place, layer in enumerate(layers):
        is_super_LE[place, list(found.get(layer.layer, ()))] = True
    return Peaks(value_LE, is_super_LE, sum(map(len, ids)))


@dataclass(frozen=True)
class Committee:
    """Experts that every domain uses more than evenly."""

    lowest_LE: Floats
    """Share of the routing weight in the domain that uses the expert least, in even shares."""
    certainty_LE: Floats
    member_LE: NDArray[np.bool_]
    mass_L: Floats
    mass_RL: Floats
    """The same members' share in each draw."""
    n_groups: int

    @classmethod
    def of(cls, table: DomainTable, certainty: float, seed: int) -> Committee:
        """Members, and what resampled documents say of them."""
        mass_DGLE = table.counts_DGLE
        n_domains, n_groups, n_layers, n_experts = mass_DGLE.shape
        generator = np.random.default_rng(seed)
        share_DLE = _shares(mass_DGLE.sum(1))
        lowest_RLE = np.full((DRAWS, n_layers, n_experts), np.inf, dtype=np.float32)
        total_RLE = np.zeros_like(lowest_RLE)
        for mass_GLE in mass_DGLE:
            drawn_RG = generator.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=DRAWS)
            share_RLE = _shares(
                np.tensordot(drawn_RG.astype(np.float32), mass_GLE.astype(np.float32), axes=1)
            )
            np.minimum(lowest_RLE, share_RLE, out=lowest_RLE)
            total_RLE += share_RLE
        certainty_LE = (lowest_RLE > 1 / n_experts).mean(0)
        lowest_LE = share_DLE.min(0)
        member_LE = (lowest_LE > 1 / n_experts) & (certainty_LE >= certainty)
        return cls(
            lowest_LE * n_experts,
            certainty_LE,
            member_LE,
            (share_DLE.mean(0) * member_LE).sum(-1),
            (total_RLE * member_LE).sum(-1) / n_domains,
            n_groups,
        )

    def frame(self, choices: Choices) -> pd.DataFrame:
        """One row per layer: members, their share of the routing weight with interval, and the even share."""
        low_L, high_L = np.quantile(self.mass_RL, [0.025, 0.975], axis=0)
        known = self.n_groups >= MIN_DOCUMENTS
        return pd.DataFrame(
            {
                "layer": choices.layers,
                "members": self.member_LE.sum(-1),
                "experts": [", ".join(f"E{e}" for e in np.flatnonzero(row)) for row in self.member_LE],
                "routing_weight_share": self.mass_L,
                "low": low_L if known else np.nan,
                "high": high_L if known else np.nan,
                "even_share": self.member_LE.sum(-1) / choices.n_experts,
            }
        )


def _shares(mass_XLE: NDArray[Any]) -> NDArray[Any]:
    shares_XLE: NDArray[Any] = mass_XLE / np.maximum(mass_XLE.sum(-1, keepdims=True), 1e-30)
    return shares_XLE


def expert_table(choices: Choices, load_LE: Ints, committee: Committee, peaks: Peaks | None) -> pd.DataFrame:
    """One row per layer and expert with everything that may make it special."""
    nothing_LE = np.full(load_LE.shape, np.nan)
    peak_LE = nothing_LE if peaks is None else peaks.value_LE
    super_LE = np.zeros(load_LE.shape, dtype=bool) if peaks is None else peaks.is_super_LE
    dead_LE = load_LE == 0
    kind = np.where(
        super_LE,
        np.where(committee.member_LE, "super, committee", "super"),
        np.where(committee.member_LE, "committee", ""),
    )
    kind = np.where(dead_LE, "dead", kind)
    frame = pd.DataFrame(
        {
            **layer_by_expert(choices.layers, choices.n_experts),
            "kind": kind.ravel(),
            "load_over_even": (
                load_LE * choices.n_experts / np.maximum(load_LE.sum(-1, keepdims=True), 1)
            ).ravel(),
            "lowest_domain": committee.lowest_LE.ravel(),
            "certainty": committee.certainty_LE.ravel(),
            "peak": peak_LE.ravel(),
            "peak_over_median": (peak_LE / np.median(peak_LE)).ravel(),
        }
    )
    frame.insert(0, "name", [f"L{a} E{b}" for a, b in zip(frame["layer"], frame["expert"], strict=True)])
    frame["order"] = frame["kind"].map({"super, committee": 0, "super": 0, "committee": 1, "dead": 2, "": 3})
    return frame


def protect_list(cells: pd.DataFrame) -> str:
    """Super-experts and committee as ``layer:expert``, the way prune_experts takes them."""
    kept = cells[cells["order"] < 2]
    return ", ".join(f"{layer}:{expert}" for layer, expert in zip(kept["layer"], kept["expert"], strict=True))


def _metrics(cells: pd.DataFrame, committee: Committee, choices: Choices) -> tuple[Metric, ...]:
    kinds = cells["kind"]
    low, high = np.quantile(committee.mass_RL.mean(1), [0.025, 0.975])
    known = committee.n_groups >= MIN_DOCUMENTS
    n = choices.n_tokens
    return (
        Metric("super_experts", float(kinds.str.contains("super").sum()), "experts"),
        Metric("committee_members", float(committee.member_LE.sum()), "experts", n=n),
        Metric(
            "committee_share",
            float(committee.mass_L.mean()),
            "share",
            n=n,
            low=float(low) if known else None,
            high=float(high) if known else None,
            interval=f"bootstrap over documents within domains, {DRAWS} draws" if known else "",
        ),
        Metric("dead_experts", float((kinds == "dead").sum()), "experts", "lower", n=n),
    )


def _notes(peaks: Peaks | None, protected: str, committee: Committee) -> tuple[str, ...]:
    notes = [
        f"Protect list for prune_experts: {protected}"
        if protected
        else "No expert stands out enough to be protected.",
        "Members are counted on the text that chose them: their share in other text is a little lower.",
    ]
    if peaks is None:
        notes.append(
            "This family's experts do not show single outputs, so super-experts were not looked for."
        )
    if committee.n_groups < MIN_DOCUMENTS:
        notes.append(f"Only {committee.n_groups} documents per domain: too few for an interval.")
    return tuple(notes)


_EXPERT = ("kind", "load_over_even", "lowest_domain", "certainty", "peak", "peak_over_median")
_VIEWS = (
    View(
        "table",
        x="name",
        color="certainty",
        text="kind",
        frame="ranked",
        title="Experts that stand out, then those nearest to it",
        tooltip=_EXPERT,
    ),
    View(
        "heatmap",
        x="expert",
        y="layer",
        color="lowest_domain",
        text="kind",
        title="Share in the domain that uses the expert least (above 1: a committee candidate)",
        unit="× even",
        midpoint=1.0,
        tooltip=_EXPERT,
    ),
    View(
        "heatmap",
        x="expert",
        y="layer",
        color="peak",
        text="kind",
        title="Largest value the expert puts out",
        log=True,
        tooltip=_EXPERT,
    ),
    View(
        "table",
        x="layer",
        color="routing_weight_share",
        frame="committee",
        title="Standing committee by layer",
        unit="share",
        tooltip=("members", "experts", "low", "high", "even_share"),
    ),
    View(
        "table",
        x="protect",
        frame="protect",
        title="Protect list: paste it into prune_experts",
        tooltip=("experts",),
    ),
)
