"""What ``slimscope distil`` and ``slimscope data`` do; the rest of the commands is in ``core.commands``."""

from __future__ import annotations

import argparse
from typing import Any

from core.commands import pairs
from core.located import located_source
from core.output import terminal_progress


def distil_command(args: argparse.Namespace) -> Any:
    """Make a student of a model and train it on what its teacher says."""
    from core.catalog.store import Catalog
    from core.entries import opened
    from core.loop import make_variant
    from core.registry import get
    from core.student_recipes import Shape, distilled, parsed_step, template_of

    catalog, progress = Catalog(), terminal_progress()
    n_layers = opened(catalog, args.model, progress=progress).anatomy.n_layers
    given = pairs(args.set)
    given |= {name: value for name in ("data", "teacher") if (value := getattr(args, name)) is not None}
    method = "distil"
    if args.template is not None:
        template = template_of(args.template)
        method = template.steps(n_layers)[-1][0]
    parsed = get("compress", method).parse_text(given)
    training = {name: value for name, value in parsed.model_dump(mode="json").items() if name in given}
    if args.template is not None:
        recipe = template.recipe(n_layers, training)
    else:
        steps = tuple(parsed_step(text) for text in args.step)
        shape = Shape(args.layers, args.criterion, args.width, args.bits, args.student, steps)
        recipe = distilled(shape, n_layers, training)
    recipe = recipe.calibrated_on(args.calibration)
    if args.dry_run:
        return recipe.model_dump(mode="json")
    return make_variant(catalog, args.model, recipe, progress=progress).summary()


def data_command(args: argparse.Namespace) -> Any:
    """Say what a source of training rows holds, and what training on it would refuse."""
    import pandas as pd

    from core.catalog.store import Catalog
    from core.corpus.preview import preview
    from core.entries import opened
    from core.text.documents import load_documents

    tokenizer = None
    if args.model is not None:
        tokenizer = opened(Catalog(), args.model, progress=terminal_progress()).tokenizer
    result = preview(
        located_source(args.source),
        tokenizer,
        kind=args.kind,
        window=args.window,
        held_out=args.held_out,
        against=None if args.against is None else load_documents(args.against),
    )
    if args.json:
        return result
    numbers = [{"what": m.name, "value": m.value, "unit": m.unit} for m in result.metrics]
    said = [{"what": "refused", "value": flag, "unit": ""} for flag in result.flags]
    return pd.DataFrame([*numbers, *said])
