"""transformers and exporters without their own talk: no progress bars, no reports, no warnings on the terminal."""

from __future__ import annotations

import logging as python_logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from core.lazy import transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers off the terminal while the block runs: what matters becomes an error or a note."""
    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def without_chatter() -> Iterator[None]:
    """Exporters warn of every operator they do not know; what matters is checked afterwards."""
    before = python_logging.root.manager.disable
    python_logging.disable(python_logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        python_logging.disable(before)
