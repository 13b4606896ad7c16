"""A text classifier's answer: one logit per class, for texts or pairs of texts, batched by length.

Refuses models that name no classes, and answers that are no numbers. Legend: N texts, B of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from core.errors import BadInput, CannotMeasure
from core.lazy import torch
from core.models.loaded import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 32


def class_names(loaded: LoadedModel) -> tuple[str, ...]:
    """The classes by their number; raises ``CannotMeasure`` for a model that is no text classifier of one class each."""
    config = loaded.model.config
    if loaded.family != "classifier":
        raise CannotMeasure(
            f"{loaded.ref} is a {loaded.family} and names no classes of texts; open a text classifier, or train one by "
            "fine_tune on labelled rows"
        )
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        raise CannotMeasure(
            f"{loaded.ref} gives a text {config.num_labels} number(s) to be read as "
            f"{config.problem_type or 'regression'}, not one class of several; open a classifier of single labels"
        )
    names = {int(number): str(name) for number, name in config.id2label.items()}
    return tuple(names[number] for number in range(config.num_labels))


def token_ids(
    loaded: LoadedModel, texts: Sequence[str], seconds: Sequence[str] | None, *, max_tokens: int
) -> tuple[list[dict[str, list[int]]], int]:
    """Each text as its tokenizer gives it (ids, types where the model has them), and how many lost their end.

    Texts are cut at ``max_tokens`` or the model's context, special tokens counted.
    """
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise CannotMeasure(
            f"{loaded.ref} has no tokenizer, so it reads no text; put its files beside config.json"
        )
    limit = min(max_tokens, loaded.anatomy.context_length)
    both = [list(texts)] if seconds is None else [list(texts), list(seconds)]
    options: dict[str, Any] = {"return_attention_mask": False, "verbose": False}
    if seconds is not None:
        options["return_token_type_ids"] = loaded.anatomy.token_type_embedding is not None
    whole = tokenizer(*both, **options)["input_ids"]
    cut = sum(len(ids) > limit for ids in whole)
    found = (
        tokenizer(*both, truncation=True, max_length=limit, **options) if cut else tokenizer(*both, **options)
    )
    names = [name for name in ("input_ids", "token_type_ids") if name in found]
    return [{name: list(found[name][n]) for name in names} for n in range(len(texts))], cut


def class_logits(loaded: LoadedModel, encoded: Sequence[dict[str, list[int]]]) -> Tensor:
    """Class logits [N, C] of encoded texts in float32 or wider, on the CPU, in their order.

    Texts of similar length run together; a causal classifier without a padding token answers one by one. Raises
    ``CannotMeasure`` for logits that are not finite.
    """
    order = sorted(range(len(encoded)), key=lambda n: len(encoded[n]["input_ids"]))
    size = BATCH if loaded.runs_batches else 1
    rows: dict[int, Tensor] = {}
    with loaded.lock, torch.inference_mode():
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            logits_BC = loaded.model(**_batch(loaded, [encoded[n] for n in chosen])).logits
            rows.update(zip(chosen, _at_least_float32(logits_BC).cpu(), strict=True))
    logits_NC = torch.stack([rows[n] for n in range(len(encoded))])
    if not torch.isfinite(logits_NC).all():
        bad = int((~torch.isfinite(logits_NC).all(-1)).int().argmax())
        raise CannotMeasure(
            f"{loaded.ref} gives class logits that are not finite (NaN or infinity) for text {bad + 1} of "
            f"{len(logits_NC)}; open it in float32, or check its weights"
        )
    return logits_NC


def _batch(loaded: LoadedModel, some: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Padded behind, with the token by which a causal classifier finds a text's end."""
    longest = max(len(one["input_ids"]) for one in some)
    fill = {"input_ids": _padding(loaded), "token_type_ids": 0}
    tensors = {
        name: torch.tensor([one[name] + [fill[name]] * (longest - len(one[name])) for one in some])
        for name in some[0]
    }
    lengths_B1 = torch.tensor([[len(one["input_ids"])] for one in some])
    if loaded.runs_batches:  # else one text, of which every token counts
        tensors["attention_mask"] = (torch.arange(longest) < lengths_B1).long()
    return {name: tensor.to(loaded.model.device) for name, tensor in tensors.items()}


def _padding(loaded: LoadedModel) -> int:
    ids = (
        loaded.model.config.get_text_config().pad_token_id,
        loaded.tokenizer and loaded.tokenizer.pad_token_id,
        0,
    )
    return next(int(id_) for id_ in ids if id_ is not None)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def same_classes(first: LoadedModel, second: LoadedModel) -> tuple[str, ...]:
    """The classes that both models name under the same numbers; raises ``BadInput`` where they differ."""
    names, others = class_names(first), class_names(second)
    if names != others:
        raise BadInput(
            f"{first.ref} and {second.ref} do not name the same classes ({_few(names)} and {_few(others)}); choose two "
            "classifiers of the same labels"
        )
    return names


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
