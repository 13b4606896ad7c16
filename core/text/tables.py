"""Rows of a user's table, each with its line and its cells by column: .csv, .tsv, .jsonl, .parquet and hub data sets.

Knows nothing about what the columns mean.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import BadInput, CannotOpen
from core.text._files import read_text

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


class Record(NamedTuple):
    """One row: where it stands, and its cells by the name of their column (in lower case)."""

    place: str
    """For messages: file and line, or data set and row."""
    cells: dict[str, Any]


def always(header: list[str]) -> bool:
    """A first row that must name the columns."""
    return True


def read_table(
    path: Path, what: str, *, is_header: Callable[[list[str]], bool] = always, tabs: bool | None = None
) -> Iterator[Record]:
    """The rows of a .csv (quoted as spreadsheets do), .tsv (quotes are ordinary characters), .jsonl or .parquet file.

    Where ``is_header`` says that the first row of a .csv or .tsv (in lower case) names no columns, they are called
    ``1``, ``2``, …. A cell that a short row lacks is missing from its record. ``tabs`` overrules the file's name.
    Raises ``BadInput`` for what cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(path, what)
        return
    content = read_text(path, what)
    if suffix == ".jsonl":
        yield from _json_lines(path, content)
    else:
        yield from _separated(path, content, suffix == ".tsv" if tabs is None else tabs, is_header)


def _separated(
    path: Path, content: str, tabs: bool, is_header: Callable[[list[str]], bool]
) -> Iterator[Record]:
    lines = io.StringIO(content, newline="")
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines)
    columns: list[str] | None = None
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if columns is None:
                header = [cell.strip().lower() for cell in row]
                named = is_header(header)
                columns = header if named else [str(number) for number in range(1, len(row) + 1)]
                if named:
                    continue
            yield Record(f"{path} line {reader.line_num}", dict(zip(columns, row, strict=False)))
    except csv.Error as error:
        raise BadInput(
            f"{path} line {reader.line_num} cannot be read as a table ({error}); check its quotes"
        ) from None


def _json_lines(path: Path, content: str) -> Iterator[Record]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise BadInput(f"{path} line {number} is not a JSON object; give one such as {{…}} per line")
        yield Record(f"{path} line {number}", _lower(row))


def _parquet(path: Path, what: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise BadInput(f"{what} {path} does not exist; check the path")
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield Record(f"{path} row {number}", _lower(row))
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(
            f"{what} {path} is not a parquet file that can be read ({error}); write it again"
        ) from None


def hub_rows(source: str, *, limit: int) -> Iterator[Record]:
    """The first rows of ``hub:ID[:CONFIG][:SPLIT]``, streamed: nothing is run, no more is fetched than is read.

    A local folder works as ID. A class label is given by its name. Raises ``BadInput`` in one sentence.
    """
    import datasets

    from core.hub import hub_snapshot

    parts = source.removeprefix("hub:").split(":")
    if not parts[0] or len(parts) > 3:
        raise BadInput(
            f"text {source!r} is not understood; write hub:ID, hub:ID:SPLIT or hub:ID:CONFIG:SPLIT"
        )
    config = parts[1] if len(parts) == 3 else None
    wanted = parts[-1] if len(parts) > 1 else None
    try:
        if not Path(parts[0]).is_dir():  # one quick look: the loader below would retry for half a minute
            hub_snapshot(parts[0], kind="dataset", wanted=["README.md"])
        found = datasets.load_dataset(parts[0], config, streaming=True)
        if wanted is not None and wanted not in found:
            raise BadInput(f"{source}: no split {wanted!r}; there are: {', '.join(map(str, found))}")
        rows = found[wanted if wanted is not None else next(iter(found))]
        names = {
            column: kind.int2str
            for column, kind in (rows.features or {}).items()
            if isinstance(kind, datasets.ClassLabel)
        }
        for number, row in enumerate(islice(rows, limit), start=1):
            spoken = {column: names[column](row[column]) for column in names if row[column] is not None}
            yield Record(f"{source} row {number}", _lower({**row, **spoken}))
    except BadInput:
        raise
    except CannotOpen as error:
        raise BadInput(f"{source}: {error}") from None
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        said = str(error).strip().split("\n")[0]
        raise BadInput(
            f"data set {source} cannot be read ({type(error).__name__}: {said}); check the id and the network, "
            "or give a local .txt or .jsonl file"
        ) from None


def _lower(row: dict[str, Any]) -> dict[str, Any]:
    return {str(column).strip().lower(): value for column, value in row.items()}
