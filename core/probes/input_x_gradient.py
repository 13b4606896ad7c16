"""Input × gradient: the first-order guess of what each token's embedding adds to the answer.

Legend: P positions, D d_model.

One forward and one backward pass: cheap, and only as good as the answer is straight around the prompt.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from core.lazy import torch
from core.models.gradients import require_gradients
from core.probes._input_game import InputSettings, build_game
from core.probes._input_gradient import Points, per_player
from core.probes._input_report import input_result
from core.registry import Example, method
from core.types import Cost, Progress, Prompt, Result

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel

NUDGE = 1e-3
"""Half the width of the central difference that checks the gradient, as a share of the embeddings."""


class InputXGradientSettings(InputSettings):
    """Nothing beyond the shared settings."""


@method(
    "probe",
    title="Input × gradient",
    needs=["decoder", "text"],
    paper="https://arxiv.org/abs/1312.6034",
    answers="Why this token?",
    examples=(
        Example(
            "A quick look at Paris",
            Prompt("The capital of France is"),
            {"target": " Paris", "distractor": " London"},
        ),
    ),
    cost=lambda anatomy, n_tokens, settings: Cost(
        forwards=9.0 + (3 + settings.quality_orders) * n_tokens, extra_bytes=512 << 20
    ),
)
def input_x_gradient(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: InputXGradientSettings
) -> Result:
    """Multiply each token's embedding with the gradient of the answer there.

    Score of token i: x_i · ∂f/∂x_i, summed over d_model. Σ scores is the slope of f when all embeddings grow together,
    which a central difference measures without any gradient: the exactness gap is how far the two are apart. The
    scores do not add up to the answer. The quality check says whether this ranking can be trusted here.
    """
    started = time.perf_counter()
    with loaded.lock:
        require_gradients(loaded)
        with torch.no_grad():
            game = build_game(loaded, prompt, settings)
            points = Points(game, 0)
            x_PD = points.stream(game.embeddings())
            lower, upper = points.value(torch.stack([x_PD * (1 - NUDGE), x_PD * (1 + NUDGE)])).tolist()
        _, gradient_1PD = points.value_and_gradient(x_PD[None])
        score_P = (x_PD.double() * gradient_1PD[0].double()).sum(-1).cpu().numpy()
        slope = (upper - lower) / (2 * NUDGE)
        with torch.inference_mode():
            return input_result(
                loaded,
                prompt,
                game,
                settings,
                method="input_x_gradient",
                scores_N=per_player(game, score_P),
                started=started,
                progress=progress,
                exactness_gap=abs(float(score_P.sum()) - slope),
                exactness_check="|Σ scores − slope of f along the embeddings, by a central difference|",
                notes=("A first-order guess: scores do not add up to the answer.",),
            )
