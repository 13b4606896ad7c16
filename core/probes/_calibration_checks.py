"""What a calibration text gives cause to look at, in sentences; and its headline numbers. Reads no model."""

from __future__ import annotations

import pandas as pd

from core.probes._calibration_text import CalibrationText
from core.probes._input_rank import FULL, UNREAD
from core.types import Metric

REPEATED = 0.05
"""A text with more of its tokens in runs that were met before says less than its length promises."""
BROKEN = 0.02
"""More of the tokens than this in pieces of characters, or unknown: the tokenizer was not made for this text."""
ONE_KIND = 0.9
WANTED = 256
"""Tokens that an expert should be chosen for, to be judged by them."""


def checks(
    text: CalibrationText, ranks: pd.DataFrame, experts: pd.DataFrame | None, *, samples: int, near: float
) -> pd.DataFrame:
    """What was looked at, what was found, and whether it asks for another look; those that do come first."""
    n_windows, share = len(text.windows_BP), float(text.repeated_B.mean())
    cut, padded = text.padding_if_alone()
    exact = sum(alike == 1 for _, alike in text.twins.values())
    kinds = text.kinds()
    main_kind = kinds.iloc[0]
    rows = [
        _check(
            "Windows", f"{n_windows} of {samples} windows of {text.windows_BP.shape[1]} tokens",
            n_windows >= samples,
            f"{text.n_left:,} of {text.n_tokens:,} tokens are in no window. Nothing is padded.",
        ),
        _check(
            "Effective tokens", f"{text.effective:,} of {text.n_used:,}", share <= REPEATED,
            f"{share:.1%} of tokens are in runs of eight that were met before.",
        ),
        _check(
            "Repeated documents", f"{len(text.twins)} of {len(text.tokens)}, {exact} of them exact", not text.twins,
            f"Word runs in common: {near:.0%} or more.",
        ),
        _check(
            "One document per window", f"{cut:.0%} cut off, {padded:.0%} padding", True,
            "What a reader that does not join documents would lose; the steps here join them.",
        ),
        _check(
            "Kinds of text", ", ".join(f"{row.kind} {row.share:.0%}" for row in kinds.head(4).itertuples()),
            float(main_kind["share"]) <= ONE_KIND,
            f"{main_kind['share']:.0%} is {main_kind['kind']}: what other text needs is judged by none of it."
            if float(main_kind["share"]) > ONE_KIND else "Several kinds are there.",
        ),
        _check(
            "Characters", f"{text.broken:.2%} of tokens are pieces of characters or unknown", text.broken <= BROKEN,
            f"Letters: {', '.join(f'{name.capitalize()} {n / max(1, text.letters.total()):.0%}' for name, n in text.letters.most_common(3))}.",
        ),
    ]  # fmt: skip
    if len(ranks):
        rows.append(_rank_check(ranks))
    if experts is not None:
        rows.append(_expert_check(experts))
    found = pd.DataFrame(rows)
    return found.sort_values("verdict", key=lambda v: v != "look", kind="stable", ignore_index=True)


def _check(name: str, found: str, fine: bool, meaning: str) -> dict[str, str]:
    return {"check": name, "found": found, "verdict": "fine" if fine else "look", "meaning": meaning}


def _expert_check(experts: pd.DataFrame) -> dict[str, str]:
    never, thin = (int((experts["verdict"] == verdict).sum()) for verdict in ("never reached", "too few"))
    return _check(
        "Experts",
        f"{never} of {len(experts)} never reached, {thin} by fewer than {WANTED} tokens",
        never == 0,
        "The probe calibration_coverage says how many more tokens each needs.",
    )


def _rank_check(ranks: pd.DataFrame) -> dict[str, str]:
    judged = ranks[ranks["verdict"] != UNREAD]
    poor = judged[judged["verdict"] != FULL]
    unread = len(ranks) - len(judged)
    rest = f", {unread} wider than the tokens read" if unread else ""
    meaning = "H has an inverse without damping."
    if len(poor):
        worst = poor.assign(share=poor["rank"] / poor["columns"]).nsmallest(1, "share").iloc[0]
        meaning = (
            f"Layer {worst['layer']}, {worst['input']}: {worst['tokens']:,} tokens fill {worst['rank']:,} of "
            f"{worst['columns']:,} directions; the rest is left to damping."
        )
    return _check(
        "Rank of inputs", f"{len(judged) - len(poor)} of {len(judged)} full{rest}", poor.empty, meaning
    )


def metrics(text: CalibrationText, ranks: pd.DataFrame) -> tuple[Metric, ...]:
    n = text.n_used
    found = [
        Metric("effective_tokens", text.effective, "tokens", "higher", n=n),
        Metric("windows", len(text.windows_BP), "", "higher"),
        Metric("repeated_share", float(text.repeated_B.mean()), "share", "lower", n=n),
        Metric("broken_share", text.broken, "share", "lower", n=n),
    ]
    if len(ranks):
        least = float((ranks["rank"] / ranks["columns"]).astype(float).min())
        found.append(Metric("least_rank_share", least, "share", "higher", n=int(ranks["tokens"].max())))
    return tuple(found)
