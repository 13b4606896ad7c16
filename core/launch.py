"""One recipe in several processes: ``accelerate launch --num_processes 2 -m core.launch MODEL RECIPE.json``.

Each process applies the recipe to a model of its own; in a training they share the work (``core.distill.processes``),
every other step is done by each alike. The first process makes the variant in the catalog; the others write nothing.
One process, without ``accelerate launch``, is ``slimscope compress``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.entries import opened, second_models
from core.errors import SlimscopeError
from core.loop import already_made, make_variant, register
from core.recipe import Recipe
from core.types import ModelRef, Variant, silent

if TYPE_CHECKING:
    from core.catalog.store import Catalog


def launched(catalog: Catalog, model: str, recipe: Recipe) -> dict[str, Any]:
    """Make the variant, in as many processes as there are; what the first one says of it, nothing from the others."""
    from core.distill.processes import Processes

    processes = Processes()
    with processes.first_goes_first():
        entry = register(catalog, model)
    known = processes.share(already_made(catalog, recipe.variant_id(entry.fingerprint)) is not None)
    if processes.first:
        return make_variant(catalog, model, recipe, progress=_say).summary()
    if not known:
        _take_part(catalog, model, entry, recipe)
    return {}


def _take_part(catalog: Catalog, model: str, entry: Variant, recipe: Recipe) -> None:
    """Apply the recipe's steps beside the first process."""
    from core.compress._pipeline import apply_steps
    from core.text.documents import load_documents

    loaded, text = opened(catalog, model), recipe.calibration
    documents = None if text is None else load_documents(text, split="calibration")
    others = second_models(catalog, model, entry, recipe)
    with loaded.lock:
        apply_steps(loaded, recipe, documents, silent, references=others, scratch=None)


def _say(done: float, total: float, message: str) -> None:
    sys.stderr.write(f"\r{done / (total or 1):6.1%} {message:<70.70}")


def main(arguments: list[str] | None = None) -> None:
    """Command line: a model and a recipe file."""
    from core.catalog.store import Catalog

    parser = argparse.ArgumentParser(prog="core.launch", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("recipe", type=Path)
    args = parser.parse_args(arguments)
    try:
        said = launched(Catalog(), ModelRef.parse(args.model).located, Recipe.read(args.recipe).located)
    except SlimscopeError as error:
        sys.exit(str(error))
    if said:
        sys.stdout.write(json.dumps(said, indent=2) + "\n")


if __name__ == "__main__":
    main()
