"""Models and their entries in a catalog: opened, entered as bases, looked up, reopened as they were entered.

What ``core.loop`` and ``core.bench`` stand on. Nothing is compressed, measured or compared here.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import CannotOpen
from core.models.task import Task, task_of
from core.recipe import Recipe
from core.types import Dtype, ModelRef, Progress, Variant, silent

if TYPE_CHECKING:
    from core.catalog.store import Catalog
    from core.models.learned import Learned
    from core.models.loaded import LoadedModel


def opened(
    catalog: Catalog, model: str, *, dtype: Dtype = "float32", progress: Progress = silent
) -> LoadedModel:
    """Open what the user typed; ``variant:ID`` is looked up in the catalog. Raises ``CannotOpen``, ``BadInput``."""
    from core.models.open import open_model

    ref = ModelRef.parse(model, dtype=dtype)
    return open_model(ref, variant_folder=catalog.variant_folder, progress=progress)


def entry_of(catalog: Catalog, loaded: LoadedModel) -> Variant:
    """The catalog's entry of an opened model, made if it is a base that was not there."""
    if loaded.ref.kind == "variant":
        return catalog.variant(loaded.ref.source.removeprefix("variant:"))
    return enter_base(catalog, loaded)


def enter_base(catalog: Catalog, loaded: LoadedModel) -> Variant:
    """The catalog's entry of a model that is no variant, made if it was not there."""
    from core.models.sizes import model_card

    ref, card = loaded.ref, model_card(loaded)
    on_disk = ref.kind in ("folder", "gguf")
    return catalog.add_base(
        ref.located,
        name=Path(ref.source).name if on_disk else str(ref),
        fingerprint=card.fingerprint,
        architecture=loaded.anatomy.architecture,
        family=card.family,
        parameters=card.parameters,
        nbytes=card.file_bytes,
        bits_per_weight=card.file_bytes * 8 / card.parameters,
        format="safetensors",
    )


def reopened(catalog: Catalog, variant: Variant, progress: Progress) -> LoadedModel:
    """Reopen what was entered, in the dtype its files declare: quality is that of the arithmetic whose speed is measured."""
    loaded = opened(catalog, variant.source, dtype="stored", progress=progress)
    refuse_changed(variant, loaded.fingerprint)
    return loaded


def folder_of(catalog: Catalog, variant: Variant, *, progress: Progress = silent) -> Path:
    """The files of what was entered, as they were entered; raises ``CannotOpen`` where they are gone or changed."""
    from core.models.checkpoint import fingerprint
    from core.models.open import local_folder

    folder = local_folder(
        ModelRef.parse(variant.source), variant_folder=catalog.variant_folder, progress=progress
    )
    refuse_changed(variant, fingerprint(folder))
    return folder


def base_folder_of(catalog: Catalog, variant: Variant) -> Path | None:
    """The files of a variant's base; None for a base itself, and where the base is gone or changed."""
    if variant.id == variant.base_id:
        return None
    with suppress(CannotOpen):
        return folder_of(catalog, catalog.variant(variant.base_id))
    return None


def refuse_changed(variant: Variant, fingerprint: str) -> None:
    """A number belongs to the files that were entered; a base's may have changed where the user has them."""
    if fingerprint != variant.fingerprint:
        raise CannotOpen(
            f"{variant.source} is not the model that was entered as {variant.id}: its files changed since; "
            "open it again to enter it as a base of its own"
        )


def learned_by(catalog: Catalog, variant: Variant) -> tuple[Learned, ...]:
    """What a variant's files say it learned from; a base that the user has elsewhere was not trained here."""
    from core.models.learned import read_learned

    return read_learned(catalog.variant_folder(variant.id)) if variant.artifact else ()


def second_models(catalog: Catalog, model: str, parent: Variant, recipe: Recipe) -> dict[int, LoadedModel]:
    """The second model of each step that looks at one, by the step's number; each model is opened once."""
    from core.compress._references import references_of

    places = {"base": catalog.variant(parent.base_id).source, "start": model}
    wanted = {index: places.get(which, which) for index, which in references_of(recipe).items()}
    found = {source: opened(catalog, source) for source in dict.fromkeys(wanted.values())}
    return {index: found[source] for index, source in wanted.items()}


def base_of(
    id_: str, parent: Variant, task: Task, loaded: LoadedModel, teachers: Iterable[tuple[str, LoadedModel]]
) -> str:
    """The base that a new variant is held against: its parent's, while it answers the same question.

    A model that was given another task (``task`` is what it had) has nothing in common with its parent's numbers: it is
    held against its teacher's base if that has the task, and is otherwise a base of its own.
    """
    now = task_of(loaded)
    if now == task:
        return parent.base_id
    return next((base for base, teacher in teachers if task_of(teacher) == now), id_)
