"""Files of the Hugging Face hub as a local folder; the only file of core that may use the network.

What is fetched stays in the user's Hugging Face cache, shared with every other tool. Knows no model and no text: the
caller says which files it wants.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from core.errors import CannotOpen

PATIENCE_S = 5.0
"""For the hub's first answer: a network that swallows packets must not hold a page or a command for long."""


def hub_snapshot(
    repo: str,
    *,
    kind: Literal["model", "dataset"],
    revision: str | None = None,
    wanted: Sequence[str],
    unwanted: Sequence[str] = (),
) -> Path:
    """The snapshot folder of a repository with the ``wanted`` files, fetched if they are not in the cache.

    Raises ``CannotOpen`` for an id that is none, unknown, private or gated, and when the hub is out of reach.
    """
    from huggingface_hub import errors, snapshot_download

    named = f"{repo}@{revision}" if revision else repo
    try:
        folder = snapshot_download(
            repo,
            repo_type=kind,
            revision=revision,
            allow_patterns=list(wanted),
            ignore_patterns=list(unwanted),
            etag_timeout=PATIENCE_S,
        )
    except errors.HFValidationError:
        raise CannotOpen(
            f"{named!r} is neither a folder here nor a hub id; a hub id looks like org/name or org/name@revision"
        ) from None
    except errors.GatedRepoError:
        raise CannotOpen(
            f"{named} is gated: accept its terms on huggingface.co, log in with `hf auth login`, and try again"
        ) from None
    except errors.RevisionNotFoundError:
        raise CannotOpen(
            f"{repo} has no revision {revision!r} on the hub; check the revision's name"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CannotOpen(
            f"the hub has no {kind} {repo!r}, or it is private; check the spelling, or log in with `hf auth login`"
        ) from None
    except (
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.HfHubHTTPError,
        OSError,
    ) as error:
        raise CannotOpen(
            f"{named} is not in the local hub cache and the hub cannot be reached ({type(error).__name__}); "
            "go online once, or give local files"
        ) from None
    return Path(folder)
