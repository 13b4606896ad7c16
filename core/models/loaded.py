"""A model in memory with everything a method needs to work on it; the only mutable thing in the engine.

It lives in one process. It does not know how it was opened (``open.py``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.errors import CannotCompress
from core.models.anatomy import Anatomy
from core.models.anatomy_find import find_anatomy
from core.models.anatomy_verify import verify_anatomy
from core.models.learned import Learned
from core.models.quiet import quiet
from core.numerics.activations import ActivationScheme, round_input
from core.registry import Need
from core.types import Family, ModelRef

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.library import LibraryForm
    from core.numerics.packed import PackedExperts, PackedTensor

Pooling = Literal["mean", "cls"]


@dataclass(eq=False)
class LoadedModel:
    """A Hugging Face model in eval mode with its tokenizer or processor, anatomy, fingerprint and lock.

    Hold ``lock`` for as long as hooks are registered or weights are read: one model, one user at a time.
    """

    ref: ModelRef
    folder: Path
    """Where its files are: config.json, safetensors, tokenizer."""
    model: Any
    tokenizer: Any | None
    processor: Any | None
    anatomy: Anatomy
    fingerprint: str
    """Content hash of the weights and config that were opened, whatever the dtype they are held in; a compression
    changes the weights, not this: it names what the result was made from."""
    pooling: Pooling = "mean"
    """How an encoder's token vectors become one sentence vector."""
    notes: tuple[str, ...] = ()
    """Plain sentences a reader must know about these weights."""
    checks: Mapping[str, float] = field(default_factory=dict)
    """Identity of the anatomy → its largest relative difference, from ``verify_anatomy`` at load."""
    packed: dict[str, PackedTensor | PackedExperts] = field(default_factory=dict)
    """Module path → packed weight; empty unless a compress step put it there."""
    activations: dict[str, ActivationScheme] = field(default_factory=dict)
    """Linear layer → what its inputs are rounded to before they are multiplied; see ``round_inputs``."""
    library: LibraryForm | None = None
    """The model as a quantizing step of another library left it, which is what is saved then; the weights here are the
    dense ones that it stands for."""
    learned: tuple[Learned, ...] = ()
    """What was learned from in trainings here, its own and those of what it was made from."""
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def family(self) -> Family:
        """``decoder``, ``encoder``, ``vision`` or ``classifier`` (of texts)."""
        return self.anatomy.family

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters and buffers in memory; tied tensors once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())

    @property
    def dtype(self) -> str:
        """The dtype of its parameters (of the first, where a checkpoint mixes them), e.g. ``float32``."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        """The device the weights are on, e.g. ``cpu``."""
        return str(self.model.device)

    @property
    def runs_batches(self) -> bool:
        """Whether it answers several texts at once: a causal classifier finds where a text ends by its padding token."""
        causal_classifier = self.family == "classifier" and self.anatomy.causal
        return not causal_classifier or self.model.config.get_text_config().pad_token_id is not None

    @property
    def offers(self) -> frozenset[Need]:
        """What this model can give to a method."""
        found: set[Need] = {self.family}
        if self.tokenizer is not None:
            found.add("text")
        found.add("moe" if self.anatomy.n_experts else "dense")
        if self.anatomy.has_heads:
            found.add("heads")
        if self.device.startswith("cuda"):
            found.add("cuda")
        return frozenset(found)

    def missing_needs(self, needs: Iterable[Need]) -> tuple[Need, ...]:
        """The needs of a method that this model cannot meet, sorted; calibration text is the caller's matter."""
        return tuple(sorted(set(needs) - self.offers - {"calibration"}))

    def supports(self, needs: Iterable[Need]) -> bool:
        """Whether a method with these needs applies to this model."""
        return not self.missing_needs(needs)

    def round_inputs(self, module: str, scheme: ActivationScheme) -> None:
        """Round what a linear layer reads from now on (W8A8): every forward pass does it, this one's user and all.

        A layer's scheme is given once: a second one would round what is rounded.
        """
        assert module not in self.activations, f"{module}: its inputs are rounded already"

        def rounded(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (round_input(inputs[0], scheme), *inputs[1:])

        self.model.get_submodule(module).register_forward_pre_hook(rounded)
        self.activations[module] = scheme

    def become(self, model: Any) -> None:
        """Replace the model, or take it up anew after its structure or config was edited in place.

        The anatomy is found again and proved. Tokenizer, folder, notes, lock and ``fingerprint`` stay: like a weight
        that is rounded, another structure is made *from* what was opened. The device of the model given is kept.
        Raises ``AnatomyMismatch`` or ``CannotOpen`` with this object unchanged, and ``CannotCompress`` after a
        quantizing step, whose packed weights belong to the old modules.
        """
        self.refuse_if_packed()
        model.eval().requires_grad_(False)
        with quiet():
            anatomy = find_anatomy(model)
            checks = verify_anatomy(model, anatomy)
        self.model, self.anatomy, self.checks = model, anatomy, checks

    def refuse_if_packed(self) -> None:
        """Raise ``CannotCompress`` when an earlier step quantized this model: its structure is then fixed."""
        if self.activations and not self.packed:
            raise CannotCompress(
                "this variant rounds what its linear layers read (W8A8), which only its packed weights can go on doing; "
                "start from its base, and put the step that rounds inputs last"
            )
        if self.packed:
            raise CannotCompress(
                "an earlier step quantized this model, and its codes belong to modules that would be replaced; put the "
                "steps that change the structure first, quantize last"
            )
