"""Steering: push the residual stream along a direction, or keep it out, and read what the model then says.

Legend: R rows (ways to steer, the first is none), D d_model, V vocabulary. All rows run in one batch of equal prompts,
so that nothing is padded. A change of the output shows that the model can be pushed along a direction; it does not
show that the model uses it by itself: compare with the random direction of equal length.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import pandas as pd
from pydantic import Field

from core.errors import BadInput, SlimscopeError
from core.lazy import torch
from core.probes._directions import Direction, feature_direction, mean_difference, split_prompts
from core.probes._provenance import provenance
from core.probes._read_texts import Position
from core.probes._steered import (
    Continuations,
    Ways,
    add_vectors,
    continue_greedily,
    remove_directions,
)
from core.probes._steering_report import VIEWS, changed_tokens, most_moved, ways_table
from core.probes._tokens import Encoded, encode
from core.registry import Example, Settings, method
from core.types import Cost, Metric, Progress, Prompt, Result, part_of

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

_BAD = (
    "The film was terrible|Her voice was ugly|The day was horrible|"
    "His answer was awful|The meal was disgusting|The journey was miserable"
)
_GOOD = (
    "The film was wonderful|Her voice was beautiful|The day was amazing|"
    "His answer was excellent|The meal was delicious|The journey was delightful"
)
_FRENCH = "Bonjour, je suis|Le chat est dans|Nous avons une|Il fait beau et"
_ENGLISH = "Hello, I am|The cat is in|We have a|It is nice and"


class SteeringSettings(Settings):
    """The direction, how it is used, and how far to continue the prompt."""

    positives: str = Field(_BAD, description="Prompts to steer towards, separated by | or new lines")
    negatives: str = Field(_GOOD, description="Prompts to steer away from, separated by | or new lines")
    direction: str = Field(
        "",
        description="Instead of the two lists: sae:ARTIFACT:FEATURE, a feature of a trained sparse autoencoder",
    )
    mode: Literal["add", "ablate"] = Field(
        "add",
        description="add: strength × direction after one layer; ablate: take the direction out at every layer",
    )
    strength: float = Field(
        1.0,
        ge=-100,
        le=100,
        description="Times the difference of the means (or a feature's usual size) that is added",
    )
    layer: int = Field(
        -1, ge=-1, le=1024, description="Layer after which the direction is read and added; -1 is the middle"
    )
    position: Position = Field("last", description="Which residual of the listed prompts is read")
    max_new_tokens: int = Field(30, ge=1, le=256, description="Tokens by which the prompt is continued")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of the random direction to compare with")


def _cost(anatomy: Anatomy, n_tokens: int, settings: SteeringSettings) -> Cost:
    """Prompts of about ten tokens; then each row's prompt and new tokens, once steered and once scored."""
    n_prompts = len(split_prompts(settings.positives)) + len(split_prompts(settings.negatives))
    rows = 6 if settings.mode == "add" else 3
    tokens = 10 * n_prompts + rows * 2 * (n_tokens + settings.max_new_tokens)
    kept = 4 * rows * (n_tokens + settings.max_new_tokens)
    cache = 2 * kept * anatomy.n_layers * anatomy.n_kv_heads * anatomy.head_dim
    return Cost(tokens / max(1, n_tokens), cache + 4 * 3 * rows * anatomy.vocab_size)


@method(
    "probe",
    title="Steering",
    needs=["decoder", "text"],
    paper="https://arxiv.org/abs/2308.10248",
    answers="What does this layer know?",
    examples=(
        Example(
            "Turn a good meal bad",
            Prompt("I went to the new restaurant last night, and the food was"),
            {"layer": 20, "strength": 1.0},
        ),
        Example(
            "Go on in French",
            Prompt("I went to the new restaurant last night, and the food was"),
            {
                "positives": _FRENCH,
                "negatives": _ENGLISH,
                "layer": 15,
                "strength": 1.0,
                "position": "mean",
            },
        ),
        Example(
            "A bad evening, its mood taken out of every layer",
            Prompt("The food was cold, the waiter was rude, and the whole evening was"),
            {"layer": 20, "mode": "ablate"},
        ),
    ),
    cost=_cost,
)
def steering(loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: SteeringSettings) -> Result:
    """Steer the model along a direction and read, side by side, how it goes on.

    The direction v is the mean residual of the positive prompts minus that of the negative ones after one layer, or a
    sparse autoencoder's feature. ``add`` puts strength · v on every position after that layer; ``ablate`` takes
    x − r̂ r̂ᵀ x of everything that is written to the residual stream, r̂ = v / ‖v‖. KL is KL(unsteered ‖ steered) of the
    next token, in nats. The continuation's surprisal is what it costs the unsteered model, nats per token: a
    steered text that has fallen apart is expensive. A random direction of equal length shows what mere size does.
    """
    started = time.perf_counter()
    encoded = encode(loaded, prompt)
    _check(loaded, encoded, settings)
    direction = _direction(loaded, settings, part_of(progress, 0.0, 0.3))
    ways = _ways(direction, settings)
    with loaded.lock, torch.inference_mode():
        said, gap = _run(loaded, encoded, ways, direction, settings, part_of(progress, 0.3, 0.9))
        progress(0.9, 1.0, "reading the continuations without steering")
        main = ways_table(loaded, encoded, ways, said)
    tokens = changed_tokens(loaded, said.logits_RV[0], said.logits_RV[ways.chosen])
    frames = {"main": main, "tokens": tokens, "promoted": most_moved(loaded, said.logits_RV, ways.chosen)}
    if direction.prompts is not None and len(direction.prompts):
        frames["prompts"] = direction.prompts
    return Result(
        frames=frames,
        views=tuple(view for view in VIEWS if view.frame in frames),
        metrics=_metrics(main, ways, direction),
        provenance=provenance(
            loaded,
            prompt,
            method="steering",
            settings=settings,
            started=started,
            conditions={
                "tokens": encoded.n_tokens,
                "layer": direction.layer,
                "direction": direction.what,
                "direction_norm": float(direction.vector_D.norm()),
            },
            exactness_gap=gap,
            exactness_check="largest |logit of the unsteered row in the batch − the model's own|"
            if settings.mode == "add"
            else "largest |r̂ · x| / ‖x‖ of the last residual, direction removed",
        ),
        notes=_notes(direction, settings),
    )


def _check(loaded: LoadedModel, encoded: Encoded, settings: SteeringSettings) -> None:
    anatomy = loaded.anatomy
    if settings.layer > anatomy.n_layers:
        raise BadInput(f"layer {settings.layer} does not exist: {loaded.ref} has 0 to {anatomy.n_layers}")
    room = anatomy.context_length - encoded.n_tokens
    if settings.max_new_tokens > room:
        raise BadInput(
            f"{settings.max_new_tokens} new tokens do not fit: the prompt leaves {room} of this model's "
            f"{anatomy.context_length} positions; lower max_new_tokens or shorten the prompt"
        )
    if settings.mode == "ablate" and anatomy.norm_place == "post":
        raise BadInput(
            f"{loaded.ref} norms its residual stream after each addition, which brings a removed direction back; "
            "use mode add"
        )


def _direction(loaded: LoadedModel, settings: SteeringSettings, progress: Progress) -> Direction:
    if settings.direction.strip():
        return feature_direction(loaded, settings.direction.strip())
    return mean_difference(
        loaded,
        settings.positives,
        settings.negatives,
        layer=loaded.anatomy.n_layers // 2 if settings.layer < 0 else settings.layer,
        position=settings.position,
        progress=progress,
    )


def _ways(direction: Direction, settings: SteeringSettings) -> Ways:
    """No steering, the direction at several strengths, and a random direction of equal length."""
    vector_D = direction.vector_D
    generator = torch.Generator().manual_seed(settings.seed)
    random_D = torch.randn(vector_D.shape, generator=generator).to(vector_D.device)
    if settings.mode == "ablate":
        units = torch.stack([torch.zeros_like(vector_D), direction.unit_D, random_D / random_D.norm()])
        what = ("unsteered", "direction removed", "random direction removed")
        return Ways(what, (0.0, 1.0, 1.0), units, 1)
    random_D *= vector_D.norm() / random_D.norm()
    s = settings.strength
    strengths = (0.0, s / 2, s, 2 * s, -s)
    rows = [strength * vector_D for strength in strengths] + [s * random_D]
    names = (
        "unsteered",
        *(f"strength {strength:+g}" for strength in strengths[1:]),
        f"random direction {s:+g}",
    )
    return Ways(names, (*strengths, s), torch.stack(rows), 2)


def _run(
    loaded: LoadedModel,
    encoded: Encoded,
    ways: Ways,
    direction: Direction,
    settings: SteeringSettings,
    progress: Progress,
) -> tuple[Continuations, float]:
    """All rows' continuations, and how far this run misses its identity."""
    n = len(ways.names)
    if settings.mode == "add":
        steered = add_vectors(loaded, ways.vectors_RD, layer=direction.layer)
    else:
        steered = remove_directions(loaded, ways.vectors_RD)
    with steered:
        said = continue_greedily(
            loaded, encoded, n, max_new_tokens=settings.max_new_tokens, progress=progress
        )
    if not torch.isfinite(said.logits_RV).all():
        raise SlimscopeError(
            f"at strength {settings.strength:g} the logits are not finite; lower strength, or open the model in float32"
        )
    if settings.mode == "add":
        alone_V = loaded.model(**encoded.inputs, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        return said, float((said.logits_RV[0] - alone_V).abs().max())
    last_RPD = said.final_RPD[1:].float()
    along_RP = (last_RPD * ways.vectors_RD[1:, None]).sum(-1).abs() / last_RPD.norm(dim=-1)
    return said, float(along_RP.max())


def _metrics(main: pd.DataFrame, ways: Ways, direction: Direction) -> tuple[Metric, ...]:
    found = [
        Metric("kl", float(main["kl_nats"].iloc[ways.chosen]), "nats"),
        Metric("kl_random_direction", float(main["kl_nats"].iloc[-1]), "nats"),
        Metric("surprisal_steered", float(main["surprisal_nats"].iloc[ways.chosen]), "nats/token", "lower"),
        Metric("surprisal_unsteered", float(main["surprisal_nats"].iloc[0]), "nats/token", "lower"),
    ]
    if direction.prompts is not None and len(direction.prompts):
        right = direction.prompts["is_right"]
        found.append(Metric("prompts_separated", float(right.mean()), "share", "higher", n=len(right)))
    return tuple(found)


def _notes(direction: Direction, settings: SteeringSettings) -> tuple[str, ...]:
    norm = float(direction.vector_D.norm())
    found = [f"Direction: {direction.what}, after {direction.layer} blocks, norm {norm:.3g}."]
    if direction.prompts is not None and len(direction.prompts):
        found.append(
            "A prompt is separated when it lies on its own side of the means of the other prompts (each left out in turn)."
        )
    if settings.mode == "ablate":
        found.append("Strength is not used: the whole direction is removed, at every layer and position.")
    return tuple(found)
