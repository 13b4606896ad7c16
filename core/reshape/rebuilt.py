"""The same architecture in other sizes: transformers builds it from an edited config, and what is kept is filled in.

Building it anew is what makes a cut model reload: layer indices, attention windows, rotary tables and shapes are
those that plain ``from_pretrained`` will make of the config, and a tensor that does not fit is found here. The model
that was opened stays as it is until ``LoadedModel.become``. What to keep is decided elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from core.errors import CannotCompress
from core.lazy import torch
from core.models.anatomy_verify import TOLERANCE
from core.models.loaded import LoadedModel
from core.models.quiet import quiet
from core.saving import fresh_load
from core.saving.proof import _probe_inputs

if TYPE_CHECKING:
    from torch import Tensor

Kept = Callable[[str, int, int, int], "Tensor"]
"""From a tensor's name, an axis, its length and the length wanted to the indices that stay there, ascending."""
NAMED_BY_PLACE = ("layer_idx", "layer_id", "training")
"""Numbers on modules that say where a layer is, not what it does."""


def edited_config(loaded: LoadedModel, values: Mapping[str, Any]) -> Any:
    """A copy of the config with other values, as a reload reads it; raises ``CannotCompress`` where it is refused."""
    from huggingface_hub.errors import StrictDataclassError

    config = copy.deepcopy(loaded.model.config)
    for name, value in values.items():
        setattr(config.get_text_config(), name, value)
    try:
        return type(config).from_dict(config.to_dict())
    except (ValueError, TypeError, StrictDataclassError) as error:
        said = str(error).strip().splitlines()[-1].strip()
        raise CannotCompress(
            f"transformers refuses {type(config).__name__} with {_listed(values)}: {said}; choose another size"
        ) from None


def built(loaded: LoadedModel, config: Any) -> Any:
    """The model that transformers makes of ``config``, of the same class, weights not set; costs no memory until filled.

    Raises ``CannotCompress`` where the class refuses the config.
    """
    from transformers.initialization import no_init_weights

    old = loaded.model
    options: dict[str, Any] = {"attn_implementation": old.config._attn_implementation}
    if loaded.anatomy.n_experts:
        options["experts_implementation"] = old.config._experts_implementation
    if getattr(old, "pooler", True) is None:
        options["add_pooling_layer"] = False
    try:
        with torch.inference_mode(False), quiet(), no_init_weights():
            return type(old)._from_config(config, dtype=old.dtype, **options)
    except (ValueError, RuntimeError, TypeError) as error:
        said = str(error).strip().splitlines()[0]
        raise CannotCompress(f"{type(old).__name__} cannot be built in this size: {said}") from None


def stored(loaded: LoadedModel) -> dict[str, Tensor]:
    """Every tensor of the state dict by name, tied ones once."""
    tied = set(loaded.model.all_tied_weights_keys)
    return {name: tensor for name, tensor in loaded.model.state_dict().items() if name not in tied}


def sliced(loaded: LoadedModel, model: Any, kept: Kept) -> dict[str, Tensor]:
    """The tensors of ``loaded`` cut to the shapes ``model`` has: ``kept`` says what stays where an axis is shorter.

    Raises ``CannotCompress`` naming the tensor whose shape this architecture would not shorten so.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    cut = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in stored(loaded).items():
            new = wanted.get(name)
            if new is None or len(new) != tensor.ndim:
                raise CannotCompress(f"{type(model).__name__} of that size has no place for {name}")
            for axis, (before, after) in enumerate(zip(tensor.shape, new, strict=True)):
                if before != after:
                    index = kept(name, axis, before, after)
                    assert len(index) == after, f"{name}: {len(index)} of {before} kept, {after} wanted"
                    tensor = tensor.index_select(axis, index.to(tensor.device))
            cut[name] = tensor
    return cut


def filled(loaded: LoadedModel, model: Any, tensors: Mapping[str, Tensor]) -> Any:
    """``model`` with exactly these tensors (shared, not copied), on the device of ``loaded``, ties kept.

    Raises ``CannotCompress`` naming the tensor that has no place or is missing.
    """
    what = f"{type(model).__name__} of that size"
    with torch.inference_mode(False):
        try:
            report = model.load_state_dict(dict(tensors), strict=False, assign=True)
        except RuntimeError as error:
            raise CannotCompress(f"{what}: {str(error).splitlines()[-1].strip()}") from None
        model.tie_weights()
        missing = sorted(set(report.missing_keys) - set(model.all_tied_weights_keys))
        if report.unexpected_keys or missing:
            wrong = (
                f"has no place for {report.unexpected_keys[0]}"
                if report.unexpected_keys
                else f"needs {missing[0]}"
            )
            raise CannotCompress(f"{what} {wrong}; this cut would not reload")
        model.to(loaded.device).eval().requires_grad_(False)
    model.generation_config = getattr(loaded.model, "generation_config", None)
    return model


def plain_facts(module: Any) -> dict[str, Any]:
    """Numbers, words and switches that the modules inside ``module`` hold, by path; not their place."""
    return {
        f"{path}.{name}": value
        for path, inside in module.named_modules()
        for name, value in vars(inside).items()
        if isinstance(value, (int, float, str)) and not name.startswith("_") and name not in NAMED_BY_PLACE
    }


def probe_output(loaded: LoadedModel, model: Any) -> Tensor:
    """What a model of the kind of ``loaded`` gives on fixed inputs; raises ``CannotCompress`` where it does not run."""
    inputs = {name: value.to(loaded.device) for name, value in _probe_inputs(loaded).items()}
    try:
        output: Tensor = fresh_load.output_of(model, inputs)
    except (RuntimeError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise CannotCompress(
            f"{type(model).__name__} does not run in this size: {said}; choose another cut"
        ) from None
    return output


def refuse_gap(loaded: LoadedModel, expected: Tensor, got: Tensor) -> float:
    """Largest relative difference of any position's output; raises ``CannotCompress`` where it is no rounding."""
    one, other = expected.float(), got.float()
    gap = float(((other - one).norm(dim=-1) / one.norm(dim=-1)).max().nan_to_num(nan=float("inf")))
    if not gap <= TOLERANCE[loaded.dtype]:
        raise CannotCompress(
            f"{loaded.anatomy.architecture} cut this way would differ by {gap:.2g} from itself with the same parts "
            "switched off, so something in it depends on what was cut; this model is unchanged"
        )
    return gap


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={value}" for name, value in values.items() if not isinstance(value, (list, tuple))
    )
