"""Which kinds of text an expert is for: load by domain, and how much the domain tells of the expert.

Legend: D domains, G groups of a domain's documents, U = D · G units, L MoE layers, E experts, R permutations.

A domain is a label of documents. Documents of one domain resemble each other for many reasons, so the control shuffles
the labels of whole groups of documents, never of tokens.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from core.probes._clustered import GROUPS
from core.probes._domain_table import DATA, DomainTable, domain_choices
from core.probes._routing_report import (
    CONSERVED,
    Counted,
    chosen_place,
    conservation_gap,
    counted_by,
    melted,
    shown_layers,
    shown_note,
    text_notes,
    text_provenance,
)
from core.registry import Example, Settings, method
from core.routing import statistics
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel
    from core.probes._routed_text import Choices

RANKED = 50


class ExpertDomainsSettings(Settings):
    """Whose domains, on how much text, against how many shuffles."""

    data: str = Field("domains", description=DATA)
    max_tokens: int = Field(8192, ge=256, le=65_536, description="Tokens read at most, all domains together")
    choice: Literal["first", "all"] = Field(
        "first", description="Count each token's first-choice expert, or all k experts it was given"
    )
    layer: int = Field(
        -1,
        ge=-1,
        le=1024,
        description="Layer (block index) shown by domain; -1: the one that tells domains best",
    )
    permutations: int = Field(
        199,
        ge=19,
        le=1999,
        description="Shuffles of the domain labels; the smallest p-value is 1 / (this + 1)",
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of the shuffles")


def _cost(anatomy: Anatomy, n_tokens: int, settings: ExpertDomainsSettings) -> Cost:
    layers = sum(block.is_moe for block in anatomy.blocks)
    return Cost(settings.max_tokens / max(1, n_tokens), 64 * layers * anatomy.n_experts * 20 * GROUPS)


@method(
    "probe",
    title="Experts by domain",
    needs=["moe", "text"],
    paper="https://arxiv.org/abs/2409.02060",
    answers="Which expert does what?",
    examples=(
        Example("Eight kinds of text", Prompt("(the texts are read; the prompt is not)")),
        Example(
            "All k experts of a token, not the first alone",
            Prompt("(the texts are read; the prompt is not)"),
            {"choice": "all"},
        ),
    ),
    cost=_cost,
)
def expert_domains(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: ExpertDomainsSettings
) -> Result:
    """Ask whether experts are for kinds of text: load by domain, and what the domain tells of the expert.

    Specialisation of expert e for domain D is N(e, D) / N(D), the share of the domain's tokens that it gets, over what
    an even spread would give it, k / E (Muennighoff et al. 2024; 1 / E for first choices): 1 is indifferent. Normalised mutual
    information of domain and expert is 0 where the one tells nothing of the other and 1 where it tells all. Its control
    shuffles the labels of groups of documents: nmi_shuffled is the mean, p_value the share of shuffles that tell as
    much, (1 + those) / (1 + shuffles). Jensen–Shannon divergence compares the loads of two domains, in bits:
    0 equal, 1 disjoint. Experts of standard mixtures are known to be for kinds of token more than for topics.
    """
    started = time.perf_counter()
    texts, choices = domain_choices(loaded, settings.data, progress, max_tokens=settings.max_tokens)
    table = DomainTable.of(choices, texts, count=settings.choice)
    layers = layer_table(table, permutations=settings.permutations, seed=settings.seed)
    best = int((layers["nmi"] - layers["nmi_shuffled"]).to_numpy().argmax())
    place = chosen_place(settings.layer, choices.layers, best)
    domains = domain_map(table)
    return Result(
        frames={
            "layers": layers,
            "ranked": domains.sort_values("low", ascending=False, ignore_index=True).head(RANKED),
            "main": _strongest(domains, choices),
            "domains": domains[domains["layer"] == choices.layers[place]].reset_index(drop=True),
            "divergence": _divergence(table, place),
            "information": melted(
                layers, ["layer"], {"nmi": "domain labels", "nmi_shuffled": "shuffled labels"}, "information"
            ),
        },
        views=_views(choices.layers[place]),
        metrics=_metrics(table, layers, place, choices),
        provenance=text_provenance(
            loaded,
            prompt,
            method="expert_domains",
            settings=settings,
            started=started,
            texts=texts,
            choices=choices,
            exactness_gap=conservation_gap(
                counted_by(choices.experts_LTK, choices.document_T * 0, 1, choices.n_experts)[0], choices
            ),
            exactness_check=CONSERVED,
            conditions={"domains": list(table.domains)},
        ),
        notes=(
            *text_notes(texts, choices),
            f"Domains: {', '.join(table.domains)}.",
            f"Each p-value is of one layer; of {len(layers)} layers, some may be below 0.05 by luck.",
            *shown_note(choices.layers, choices.n_experts),
        ),
    )


def layer_table(table: DomainTable, *, permutations: int, seed: int) -> pd.DataFrame:
    """One row per layer: normalised mutual information with interval, its control, and how far domains' loads differ."""
    shuffled_RL, p_L = table.shuffled(permutations=permutations, seed=seed)
    load_LDE = table.counts_DGLE.sum(1).swapaxes(0, 1)
    pair_LDD = statistics.jensen_shannon(load_LDE[:, :, None], load_LDE[:, None])
    n = len(table.domains)
    return pd.DataFrame(
        {
            "layer": table.layers,
            **table.information().columns("nmi", high=1.0),
            "nmi_shuffled": shuffled_RL.mean(0),
            "p_value": p_L,
            "mean_divergence": pair_LDD.sum((1, 2)) / (n * (n - 1)),
        }
    )


def domain_map(table: DomainTable) -> pd.DataFrame:
    """One row per layer, domain and expert: how many times an even share of the domain's tokens it gets."""
    n_domains, _, n_layers, n_experts = table.counts_DGLE.shape
    due_DGL1 = table.counts_DGLE.sum(-1, keepdims=True)
    counts_GDLE, due_GDL1 = table.counts_DGLE.swapaxes(0, 1), due_DGL1.swapaxes(0, 1)
    share = Counted.share(counts_GDLE, due_GDL1)
    frame = pd.DataFrame(
        {
            "domain": np.repeat(np.array(table.domains, dtype=object), n_layers * n_experts),
            "layer": np.tile(np.repeat(table.layers, n_experts), n_domains),
            "expert": np.tile(np.arange(n_experts), n_domains * n_layers),
            **(share * n_experts).columns("specialisation"),
            "share": share.value.ravel(),
            "tokens": table.counts_DGLE.sum(1).ravel(),
        }
    )
    return frame.rename(columns={"specialisation_low": "low", "specialisation_high": "high"})


def _strongest(domains: pd.DataFrame, choices: Choices) -> pd.DataFrame:
    """For each shown layer and expert the domain it is most for."""
    kept = domains[domains["layer"].isin(shown_layers(choices.layers, choices.n_experts))]
    best = kept.loc[kept.groupby(["layer", "expert"])["specialisation"].idxmax()]
    return best.reset_index(drop=True)


def _divergence(table: DomainTable, place: int) -> pd.DataFrame:
    """Jensen–Shannon divergence of every two domains' loads in one layer."""
    load_DE = table.counts_DGLE[:, :, place].sum(1)
    pair_DD = statistics.jensen_shannon(load_DE[:, None], load_DE[None])
    names = np.array(table.domains, dtype=object)
    return pd.DataFrame(
        {
            "domain": np.repeat(names, len(names)),
            "other": np.tile(names, len(names)),
            "divergence": pair_DD.ravel(),
        }
    )


def _metrics(table: DomainTable, layers: pd.DataFrame, place: int, choices: Choices) -> tuple[Metric, ...]:
    row = layers.iloc[place]
    return (
        table.information()[place].metric("information_at_layer", "NMI", choices, "jackknife"),
        Metric("shuffled_at_layer", float(row["nmi_shuffled"]), "NMI", n=choices.n_tokens),
        Metric("p_value", float(row["p_value"]), "", n=choices.n_documents),
        Metric("layer", float(row["layer"]), "layer"),
    )


def _views(layer: int) -> tuple[View, ...]:
    tooltip = ("low", "high", "share", "tokens")
    return (
        View(
            "heatmap",
            x="expert",
            y="layer",
            color="specialisation",
            text="domain",
            title="The domain each expert is most for (1 is indifferent)",
            unit="× even",
            midpoint=1.0,
            tooltip=tooltip,
        ),
        View(
            "heatmap",
            x="expert",
            y="domain",
            color="specialisation",
            frame="domains",
            title=f"Layer {layer}: share of each domain's tokens, in even shares",
            unit="× even",
            midpoint=1.0,
            tooltip=tooltip,
        ),
        View(
            "heatmap",
            x="other",
            y="domain",
            color="divergence",
            frame="divergence",
            title=f"Layer {layer}: Jensen–Shannon divergence of two domains' loads",
            unit="bits",
        ),
        View(
            "table",
            x="layer",
            color="nmi",
            frame="layers",
            title="What the domain tells of the expert, by layer",
            tooltip=("nmi_low", "nmi_high", "nmi_shuffled", "p_value", "mean_divergence"),
        ),
        View(
            "table",
            x="expert",
            y="layer",
            color="specialisation",
            text="domain",
            frame="ranked",
            title="Most specialised experts, by the lower end of the interval",
            tooltip=tooltip,
        ),
        View(
            "line",
            x="layer",
            y="information",
            color="series",
            frame="information",
            title="Normalised mutual information of domain and first-choice expert",
        ),
    )
