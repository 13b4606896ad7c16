"""Activation patching: copy one state of one run into another and see how much of the answer comes along.

Every cell is exact: the model is run again from the patch on (``_replay.py``), not approximated. It does not say
how an effect travels (path patching) nor name what a state means.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from core.lazy import torch
from core.probes._patch_grid import PatchSettings, open_grid, replay_cost
from core.probes._patch_report import (
    FACTUAL_RECALL,
    INDIRECT_OBJECT,
    grid_notes,
    grid_views,
    headline,
    ranked,
)
from core.probes._provenance import provenance
from core.registry import Example, method
from core.types import Progress, Prompt, Result

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel


class ActivationPatchingSettings(PatchSettings):
    """What is patched, between which prompts, and what is measured."""


@method(
    "probe",
    title="Activation patching",
    needs=["decoder", "text", "heads"],
    paper="https://arxiv.org/abs/2211.00593",
    answers="Where is the fact?",
    cost=replay_cost,
    examples=(
        INDIRECT_OBJECT,
        Example(
            "Indirect object: which heads move the name?",
            INDIRECT_OBJECT.prompt,
            {**INDIRECT_OBJECT.settings, "node": "head"},
        ),
        Example(
            "Greater than: a war that began in 1780",
            Prompt("The war lasted from 1780 to 17"),
            {"corrupted": "The war lasted from 1710 to 17", "target": "8", "distractor": "1"},
        ),
        FACTUAL_RECALL,
        Example(
            "Gender: the boy lost …",
            Prompt("The boy lost"),
            {"corrupted": "The girl lost", "target": " his", "distractor": " her"},
        ),
        Example(
            "Agreement: the keys on the table …",
            Prompt("The keys on the table"),
            {"corrupted": "The key on the table", "target": " are", "distractor": " is"},
        ),
    ),
)
def activation_patching(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: ActivationPatchingSettings
) -> Result:
    """Copy one state at a time between two prompts, and measure how much of the answer it carries.

    The clean prompt has the right answer, the corrupted one has as many tokens and another answer. Denoising copies
    a clean state into the corrupted run: recovered = (m_patched − m_corrupted) / (m_clean − m_corrupted), 1 where that
    state alone brings the whole answer back. Noising copies a corrupted state into the clean run; its effect is
    1 − recovered, what that state alone destroys. A negative effect pushes the other way; effects do not add up. Values are
    exact: only what a patch can reach, later layers at its own and later positions, is computed again.
    """
    started = time.perf_counter()
    with loaded.lock, torch.inference_mode():
        grid = open_grid(loaded, prompt, settings)
        values = grid.exact(grid.cells, progress=progress)
        effects = grid.effect(values)
        best = int(np.abs(effects).argmax())
        identity = grid.identity_gap()
        hooked = grid.hooked_gap(grid.cells[best], float(values[best]))
    frame = grid.frame(grid.cells, effects, values)
    metric = grid.metric
    return Result(
        frames={"main": frame, "ranked": ranked(frame)},
        views=grid_views(grid),
        metrics=headline(metric, effects),
        provenance=provenance(
            loaded,
            prompt,
            method="activation_patching",
            settings=settings,
            started=started,
            conditions={
                "tokens": grid.pair.n_tokens,
                "measured": metric.label,
                "identity_gap": identity,
                "hooked_forward_gap": hooked,
            },
            exactness_gap=max(identity, hooked),
            exactness_check=f"largest of |change of {metric.unit} when a run's own states are patched into it| and "
            "|strongest cell − one whole forward with a hook there|",
        ),
        notes=grid_notes(grid),
    )
