"""A classification head for a model that has none: the body stays, bit for bit, and what answers is drawn from a seed.

The result is what transformers itself calls a sequence classifier of that family, so that plain
``AutoModelForSequenceClassification`` loads it. Knows no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from core.errors import BadInput, CannotCompress
from core.lazy import torch, transformers
from core.models.classify import class_names
from core.models.loaded import LoadedModel


def give_class_head(loaded: LoadedModel, classes: Sequence[str], *, seed: int = 0) -> tuple[str, ...]:
    """Make ``loaded`` a classifier of these classes in place; returns them in the order of their numbers.

    A classifier that knows these classes, by name or number, keeps its head and its order. Anything else gets a new one:
    its body is taken over, what lies behind it (BERT's pooler too, where the checkpoint has none) is drawn from ``seed``. Raises
    ``BadInput`` for classes that make no task, ``CannotCompress`` where transformers has no such classifier.
    """
    names = tuple(str(name) for name in classes)
    if len(names) < 2 or len(set(names)) < len(names):
        raise BadInput(
            f"{len(set(names))} different classes among {len(names)} make no task; give at least two, each once"
        )
    if loaded.family == "classifier":
        known = class_names(loaded)
        for own in (known, tuple(map(str, range(len(known))))):
            if set(names) <= set(own):
                return own
    if loaded.tokenizer is None or loaded.family == "vision":
        raise CannotCompress(
            f"{loaded.ref} reads no text, so it cannot learn classes of texts; open a language model"
        )
    loaded.refuse_if_packed()
    with loaded.lock:
        loaded.become(_classifier(loaded, names, seed))
    return names


def _classifier(loaded: LoadedModel, names: tuple[str, ...], seed: int) -> Any:
    """The sequence classifier of the model's family around its body, which it shares, config and all."""
    body, config = loaded.model.base_model, loaded.model.config
    kinds = transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(config) not in kinds:
        raise CannotCompress(
            f"transformers has no sequence classifier of model type {config.model_type}; take another model"
        )
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type = "single_label_classification"
    config.get_text_config().pad_token_id = padding_of(loaded)
    # Without memory: only what lies outside the body is made.
    with torch.device("meta"):
        model: Any = kinds[type(config)](config)  # type: ignore[operator]
    prefix = model.base_model_prefix
    fresh = getattr(model, prefix)
    if type(fresh) is not type(body):
        raise CannotCompress(
            f"the classifier of {config.model_type} is built on {type(fresh).__name__}, not on {type(body).__name__}; "
            "take another model"
        )
    if getattr(body, "pooler", True) is None:
        body.pooler = fresh.pooler
    setattr(model, prefix, body)
    _draw(model, loaded, seed)
    return model


def _draw(model: Any, loaded: LoadedModel, seed: int) -> None:
    """Give every module that has no values yet the ones its family begins with, from ``seed``."""
    empty = [m for m in model.modules() if any(p.is_meta for p in m.parameters(recurse=False))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in empty:
            module.to_empty(device="cpu")
            model._init_weights(module)
            module.to(device=loaded.model.device, dtype=loaded.model.dtype)


def padding_of(loaded: LoadedModel) -> int:
    """The token that fills a batch of texts up, by which a causal classifier finds where a text ends."""
    tokenizer = loaded.tokenizer
    ids = (tokenizer and tokenizer.pad_token_id, tokenizer and tokenizer.eos_token_id, 0)
    return next(int(id_) for id_ in ids if id_ is not None)
