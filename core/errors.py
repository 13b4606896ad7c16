"""Every error a user can cause or meet, as one tree.

::

    SlimscopeError                  base: one clear sentence; the CLI prints it, the page shows it as a card
    ├── BadInput                    the user's value is wrong: says what was given, what is allowed, what to do
    │   ├── NeedsInput              nothing was given yet where something must be: asks for it
    │   ├── UnknownMethod           no method of that id
    │   └── BadSettings             settings out of bounds or unknown
    ├── CannotOpen                  a model that cannot be opened: missing, corrupt, unknown, offline
    │   └── AnatomyMismatch         opened, but an identity of its anatomy fails: names module and check
    ├── CannotCompress              a method that does not apply to this model with these settings
    ├── ProofFailed                 the artifact did not reload to the model that was saved
    ├── CannotExport                a model that a format cannot hold, or whose export would not be that model
    ├── MissingLibrary              a method's library is not installed: the command that adds it
    ├── CannotMeasure               a measurement that would be meaningless: says why
    ├── CannotConnect               a device that does not answer, or is not the one it was
    ├── CatalogError                catalog unreachable, newer than this code, or corrupt
    ├── WorkerDied                  a child process died: exit code, last log lines
    │   └── OutOfMemory             killed for memory, or an allocator said so
    └── Cancelled                   the user asked to stop; not a failure
        └── Paused                  the user asked to stop for now and to go on later

``ValueError`` is for the caller's input, ``assert`` for our own bugs. A message never blames, and always
ends with the next move.
"""

from __future__ import annotations

import errno

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ALLOCATOR_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory")


def refused_by_system(error: OSError) -> str:
    """One sentence for what the operating system refused: a full disk, a place that cannot be written to."""
    said = error.strerror or str(error) or type(error).__name__
    where = f"{error.filename}: {said}" if error.filename else said
    if error.errno in _NO_SPACE:
        return f"{where}; nothing half-written is kept: free some space and try again"
    return f"{where}; check this path, or choose other places by SLIMSCOPE_HOME, SLIMSCOPE_CACHE or SLIMSCOPE_CATALOG"


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an allocator's refusal: Python says so by type, torch (CPU and CUDA) in words only."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(words in said for words in _ALLOCATOR_WORDS)


class SlimscopeError(Exception):
    """Base of every error that is shown to a user as one sentence."""


class BadInput(SlimscopeError, ValueError):
    """A value that is not allowed; the message names the value, the choices and the next move."""


class NeedsInput(BadInput):
    """An input that a method cannot do without is still empty; the message asks for it."""


class UnknownMethod(BadInput):
    """No method with that id and kind is registered."""


class BadSettings(BadInput):
    """Settings that are unknown, of the wrong type or out of bounds."""


class CannotOpen(SlimscopeError):
    """A model source that is missing, corrupt, unsupported, or out of reach offline."""


class AnatomyMismatch(CannotOpen):
    """The model loads, but one of the anatomy's identities fails; names the module and the check."""


class CannotCompress(SlimscopeError, ValueError):
    """A compression step that does not apply to this model with these settings."""


class ProofFailed(SlimscopeError):
    """The saved artifact, reloaded in a fresh process, is not the model that was saved."""


class CannotExport(SlimscopeError, ValueError):
    """A model that a format cannot hold, or an export that does not give the model's outputs."""


class MissingLibrary(SlimscopeError):
    """A library that this method runs on is not installed; the message has the command that adds it."""


class CannotMeasure(SlimscopeError):
    """A measurement whose number would mean nothing; says why."""


class CannotConnect(SlimscopeError):
    """A device cannot be reached, or is not the one whose key was pinned; says what to do."""


class CatalogError(SlimscopeError):
    """The catalog cannot be reached, is newer than this code, or is damaged."""


class WorkerDied(SlimscopeError):
    """A child process ended without an answer; carries its exit code and last words."""


class OutOfMemory(WorkerDied):
    """A child process was killed for memory."""


class Cancelled(SlimscopeError):
    """The user asked for the work to stop."""


class Paused(Cancelled):
    """The user asked for the work to stop for now: what is finished is kept, and it goes on from there."""
