"""One whole forward pass with one patch, the slow and obvious way: what a replay is spot-checked against.

Nothing is reused from a recorded run: every layer and position is computed anew, with one hook in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from core.intervene import intervene
from core.probes._kernel import Kernel, attention_by

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel
    from core.probes._replay import Patch


def hooked_logits(loaded: LoadedModel, inputs: Mapping[str, Tensor], patch: Patch | None) -> Tensor:
    """Logits [vocab] at the last position of one prompt, with the patch written; None runs the plain model.

    Hold ``loaded.lock``. Patches of the stream after the last layer are not for this.
    """
    with ExitStack() as stack:
        if patch is not None and patch.node in ("residual", "attention_out", "mlp_out"):
            block = loaded.anatomy.blocks[patch.layer]
            path = {
                "residual": block.path,
                "attention_out": block.attention_write,
                "mlp_out": block.mlp_write,
            }[patch.node]
            change = _writer(patch)
            stack.enter_context(intervene(loaded.model, [path], change, inputs=patch.node == "residual"))
        elif patch is not None:
            stack.enter_context(attention_by(loaded, _stand_in(patch)))
        logits: Tensor = loaded.model(**inputs, use_cache=False, logits_to_keep=1).logits
    return logits[0, -1]


def _writer(patch: Patch) -> Any:
    def change(path: str, state: Tensor) -> Tensor:
        new = state.clone()
        new.view(-1, new.shape[-1])[patch.start : patch.stop] = patch.value
        return new

    return change


def _stand_in(patch: Patch) -> Any:
    def attend(
        layer: int, kernel: Kernel, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, arguments: Any
    ) -> Tensor:
        here = layer == patch.layer
        states = {"q": q, "k": k, "v": v}
        if here and patch.node != "z":
            states[patch.node] = states[patch.node].clone()
            states[patch.node][0, patch.head, patch.start : patch.stop] = patch.value
        z, _ = kernel(module, *states.values(), mask, **arguments)
        if here and patch.node == "z":
            z = z.clone()
            z[0, patch.start : patch.stop, patch.head] = patch.value
        return z

    return attend
