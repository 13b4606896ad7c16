"""The inspector's child process: holds warm models and answers one call at a time.

Run as ``python -m core.inspector.child FD OPENER MAX_BYTES``, where FD is its end of a socket pair. It knows
how to open, probe and tokenize; it knows nothing of the UI, of jobs or of who asks. It ends when its parent
does: on Linux by signal, everywhere by the end of the pipe.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import logging
import os
import queue
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from core.calling import run_probe
from core.errors import BadInput, OutOfMemory, SlimscopeError, ran_out_of_memory
from core.free_memory import free_memory
from core.inspector.protocol import MAX_RESULT_BYTES, Answer, Failure, Report, Request, Stamp, Token, stamp
from core.registry import get
from core.types import ModelRef, Progress, Prompt, Result

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel
    from core.models.pace import Pace
    from core.models.sizes import ModelCard

Opener = Callable[[ModelRef, Progress], "LoadedModel"]
SHARE_OF_FREE_MEMORY = 0.6
PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


def open_from_anywhere(ref: ModelRef, progress: Progress) -> LoadedModel:
    """Open any kind of source; ``variant:`` ids are looked up in the catalog, which is read only when needed."""
    from core.models.open import open_model

    return open_model(ref, variant_folder=_variant_folder, progress=progress)


def _variant_folder(variant_id: str) -> Path:
    from core.catalog.store import Catalog

    return Catalog(read_only=True).variant_folder(variant_id)


class WarmModels:
    """Opened models, the least recently used ones dropped when their bytes exceed the limit.

    The model in use always stays, however large: the limit is about what is kept beside it.
    """

    def __init__(self, opener: Opener, *, max_bytes: int) -> None:
        self._opener = opener
        self._max_bytes = max_bytes
        self._models: OrderedDict[tuple[ModelRef, Stamp], LoadedModel] = OrderedDict()

    def get(self, ref: ModelRef, progress: Progress) -> LoadedModel:
        """The warm model, or a freshly opened one; raises what opening raises."""
        key = ref, stamp(ref)
        if key not in self._models:
            for stale in [known for known in self._models if known[0] == ref]:
                del self._models[stale]
            progress(0, 1, f"opening {ref}")
            self._models[key] = self._opener(ref, progress)
        self._models.move_to_end(key)
        while len(self._models) > 1 and self._total_bytes() > self._max_bytes:
            (dropped, _), _ = self._models.popitem(last=False)
            log.info("dropped %s to stay within %d bytes", dropped, self._max_bytes)
        return self._models[key]

    def sources(self) -> list[str]:
        """What is warm, least recently used first."""
        return [str(ref) for ref, _ in self._models]

    def clear(self) -> None:
        """Drop everything."""
        self._models.clear()

    def _total_bytes(self) -> int:
        return sum(model.nbytes for model in self._models.values())


class Calls:
    """The calls a client can make; each returns plain records."""

    def __init__(self, models: WarmModels) -> None:
        self.models = models
        self._paces: WeakKeyDictionary[LoadedModel, Pace] = WeakKeyDictionary()

    def ping(self, progress: Progress) -> list[str]:
        """The sources of the warm models, least recently used first."""
        return self.models.sources()

    def open(self, progress: Progress, ref: ModelRef) -> ModelCard:
        """Open a model (or find it warm), describe it, and time a forward pass of it once."""
        loaded = self.models.get(ref, progress)
        from core.models.pace import measure_pace
        from core.models.sizes import model_card

        progress(0, 1, f"describing {ref}")
        if loaded not in self._paces:
            self._paces[loaded] = measure_pace(loaded)
        return replace(model_card(loaded), pace=self._paces[loaded])

    def probe(
        self,
        progress: Progress,
        method_id: str,
        ref: ModelRef,
        prompt: Prompt,
        settings: dict[str, Any],
        reference: ModelRef | None = None,
    ) -> Result:
        """Run one probe; settings and needs are checked before anything is computed."""
        method = get("probe", method_id)
        parsed = method.parse(settings)
        original = None if reference is None else self.models.get(reference, progress)
        loaded = self.models.get(ref, progress)
        progress(0, 1, f"running {method.title}")
        with loaded.lock:
            return run_probe(method, loaded, prompt, progress, parsed, reference=original)

    def tokenize(self, progress: Progress, ref: ModelRef, text: str) -> tuple[Token, ...]:
        """The text's tokens, special tokens included."""
        from core.probes._tokens import token_texts

        tokenizer = self.models.get(ref, progress).tokenizer
        if tokenizer is None:
            raise BadInput(f"{ref} has no tokenizer: it reads images; give it none of your text")
        ids = tokenizer(text)["input_ids"]
        return tuple(Token(i, t) for i, t in zip(ids, token_texts(tokenizer, ids), strict=True))


def serve(connection: Connection, calls: Calls) -> None:
    """Answer requests one by one until the process is ended from outside."""
    requests = _read_ahead(connection)

    def report(done: float, total: float, message: str) -> None:
        connection.send(Report(done, total, message))

    while True:
        request = requests.get()
        connection.send_bytes(_respond(request, calls, report))


def _respond(request: Request, calls: Calls, report: Progress) -> memoryview:
    """Run one call; returns the pickled ``Answer`` or ``Failure``, whatever happens inside the call."""
    try:
        pickled = ForkingPickler.dumps(Answer(getattr(calls, request.call)(report, *request.args)))
        if len(pickled) > MAX_RESULT_BYTES:
            raise BadInput(
                f"the result has {len(pickled):,} bytes, more than the {MAX_RESULT_BYTES:,} a page can take; "
                "look at fewer positions, layers or top tokens"
            )
        return pickled
    except SlimscopeError as error:
        log.info("%s: %s", request.call, error)
        return ForkingPickler.dumps(Failure.of(error))
    except Exception as error:
        log.exception("%s failed", request.call)
        if ran_out_of_memory(error):
            calls.models.clear()
            return ForkingPickler.dumps(Failure.of(OutOfMemory(_memory_sentence(request, error))))
        return ForkingPickler.dumps(
            Failure(
                "SlimscopeError",
                f"{request.call} failed with {type(error).__name__}: {error}; "
                "this is a defect of Slimscope or of the model's code, the inspector's log has the traceback",
            )
        )


def _memory_sentence(request: Request, error: Exception) -> str:
    detail = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"{request.call} ran out of memory ({detail}); all warm models were dropped: "
        "use a shorter prompt, a smaller model or a 16-bit dtype"
    )


def _read_ahead(connection: Connection) -> queue.SimpleQueue[Request]:
    """Read the pipe in a thread, so that the parent's end is noticed in the middle of a call too."""
    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()

    def read() -> None:
        while True:
            try:
                requests.put(connection.recv())
            except (EOFError, OSError):
                os._exit(0)

    threading.Thread(target=read, name="inspector-reader", daemon=True).start()
    return requests


def _die_with_parent() -> None:
    """Linux: be killed when the parent is; and be the process that the kernel kills first for memory."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("500")


def _find(opener: str) -> Opener:
    module, _, name = opener.partition(":")
    found: Opener = getattr(importlib.import_module(module), name)
    return found


def main(arguments: list[str]) -> None:
    """Entry of the child process: descriptor of the pipe, ``module:function`` of the opener, bytes (0: default)."""
    descriptor, opener, max_bytes = arguments
    _die_with_parent()
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s inspector %(levelname)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end ends us
    limit = int(max_bytes) or int(SHARE_OF_FREE_MEMORY * free_memory())
    with Connection(int(descriptor)) as connection:
        serve(connection, Calls(WarmModels(_find(opener), max_bytes=limit)))


if __name__ == "__main__":
    main(sys.argv[1:])
