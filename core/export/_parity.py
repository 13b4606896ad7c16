"""How far an exported model is from the one it was made from: the same inputs, at two lengths, in the runtime that
will run it.

Legend: ``B`` batch, ``P`` position, ``V`` vocabulary (or hidden size, for an encoder).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from core.errors import CannotExport
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.models.patch_grid import image_size
from core.types import Metric

if TYPE_CHECKING:
    from torch import Tensor

Inputs = Mapping[str, "Tensor"]
Runtime = Callable[[Mapping[str, NDArray[Any]]], NDArray[Any]]
"""An exported model: arrays by name in, its logits (or last hidden states) out."""
LENGTHS = (17, 64)
"""Tokens per row; neither is what a model was traced with."""
EXACT = 1e-5
"""Largest difference of an unquantized export, as a share of the largest output: float32 sums in another order."""
BROKEN = 0.9
"""Root mean square difference, as a share of the output's, at which an export is refused as another model."""
TEXT = (
    "A class definition is an executable statement. It first evaluates the inheritance list, if present, and each item "
    "in the list should evaluate to a class object. The class's suite is then executed in a new frame, using a newly "
    "created local namespace and the original global namespace. In 1815 the town had 3,402 people and two mills."
)
"""Real words, so that a language model's predictions are sure of some tokens and unsure of others."""


def probe_inputs(loaded: LoadedModel) -> list[dict[str, Tensor]]:
    """Two inputs of different length: two rows of tokens [2, P], or one and then two pictures."""
    if loaded.family == "vision":
        return [{"pixel_values": _pictures(loaded, n)} for n in (1, 2)]
    return [_tokens(loaded, min(length, loaded.anatomy.context_length)) for length in LENGTHS]


def trace_inputs(loaded: LoadedModel) -> dict[str, Tensor]:
    """What a model is traced with: of a length that no check uses."""
    return {"pixel_values": _pictures(loaded, 2)} if loaded.family == "vision" else _tokens(loaded, 24)


def output_of(model: Any, inputs: Inputs) -> NDArray[np.float32]:
    """Logits, or for a model without a head its last hidden states, as float32."""
    with torch.inference_mode():
        output = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
    found = output["logits"] if "logits" in output else output["last_hidden_state"]
    array: NDArray[np.float32] = found.float().cpu().numpy()
    return array


@dataclass(frozen=True)
class Parity:
    """An export against its model."""

    frame: pd.DataFrame
    """One row per input: tokens, n (positions), max_difference, largest_output, relative_rms, top1_agreement, kl."""

    @property
    def max_difference(self) -> float:
        """Largest |export - model| over all outputs."""
        return float(self.frame["max_difference"].max())

    @property
    def share_of_largest(self) -> float:
        """The same as a share of the largest output."""
        return float((self.frame["max_difference"] / self.frame["largest_output"]).max())

    def metrics(self) -> tuple[Metric, ...]:
        """The worse of the two lengths, each."""
        rows, n = self.frame, int(self.frame["n"].sum())
        found = [
            Metric("max_output_difference", self.max_difference, "", "lower", n),
            Metric("relative_rms_difference", float(rows["relative_rms"].max()), "", "lower", n),
        ]
        if rows["kl"].notna().all():
            found += [
                Metric("top1_agreement", float(np.average(rows["top1_agreement"], weights=rows["n"])), "", "higher", n),
                Metric("parity_kl", float(np.average(rows["kl"], weights=rows["n"])), "nat/token", "lower", n),
            ]  # fmt: skip
        return tuple(found)

    def refuse_if_broken(self, what: str, *, exact: bool) -> None:
        """Raise ``CannotExport`` where the export is another model: beyond rounding if ``exact``, else beyond sense."""
        worst = float(self.frame["relative_rms"].max())
        if exact and self.share_of_largest > EXACT:
            raise CannotExport(
                f"{what} misses the model's outputs by up to {self.max_difference:.3g}, "
                f"{self.share_of_largest:.1e} of the largest; {EXACT:.0e} is rounding. Nothing was kept; export another format"
            )
        if not worst < BROKEN:
            raise CannotExport(
                f"{what} differs from the model by {worst:.0%} of its outputs (root mean square), so it is another model. "
                "Nothing was kept; export with more bits"
            )


def as_runtime(model: Any) -> Runtime:
    """A torch model as what an export is compared through."""
    return lambda given: output_of(model, {name: torch.from_numpy(array) for name, array in given.items()})


def compare(loaded: LoadedModel, runtime: Runtime) -> Parity:
    """Run the model and its export on the same inputs of two lengths."""
    # Only logits are a distribution, of which a KL means something.
    names_tokens = loaded.anatomy.unembedding is not None or loaded.family == "classifier"
    rows = []
    for given in probe_inputs(loaded):
        expected = output_of(loaded.model, given)
        found = np.asarray(
            runtime({name: tensor.numpy() for name, tensor in given.items()}), dtype=np.float32
        )
        if found.shape != expected.shape:
            raise CannotExport(
                f"the exported model gives outputs of shape {found.shape} where the model gives {expected.shape}; "
                "nothing was kept. Export another format"
            )
        rows.append(_row(expected, found, names_tokens=names_tokens))
    return Parity(pd.DataFrame(rows))


def _row(expected: NDArray[np.float32], found: NDArray[np.float32], *, names_tokens: bool) -> dict[str, Any]:
    gap = found - expected
    agreement = kl = None
    if names_tokens:
        agreement = float((expected.argmax(-1) == found.argmax(-1)).mean())
        kl = float(_kl(expected, found))
    return {
        "tokens": expected.shape[1] if expected.ndim == 3 else None,
        "n": int(np.prod(expected.shape[:-1])),
        "max_difference": float(np.abs(gap).max()),
        "largest_output": float(np.abs(expected).max()),
        "relative_rms": float(np.linalg.norm(gap) / np.linalg.norm(expected)),
        "top1_agreement": agreement,
        "kl": kl,
    }


def _kl(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Mean KL(model ‖ export) in nats, summed in float64."""
    p = torch.from_numpy(expected).double().log_softmax(-1)
    q = torch.from_numpy(found).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def _tokens(loaded: LoadedModel, length: int) -> dict[str, Tensor]:
    """Two rows: the text's first tokens, and the same from the middle on; repeated where it is too short."""
    vocab = loaded.anatomy.vocab_size
    ids = [(i * 7919 + 13) % vocab for i in range(2 * length)]
    if loaded.tokenizer is not None:
        read = [i for i in loaded.tokenizer(TEXT)["input_ids"] if i < vocab]
        ids = [read[i % len(read)] for i in range(2 * length)]
    rows = torch.tensor(ids).reshape(2, length)
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def _pictures(loaded: LoadedModel, n: int) -> Tensor:
    config = loaded.model.config
    shape = (n, config.num_channels, *image_size(config))
    return torch.arange(float(torch.Size(shape).numel())).sin().reshape(shape)
