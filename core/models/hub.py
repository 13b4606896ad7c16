"""A model of the Hugging Face hub as a local folder; the only file of core.models that may use the network.

Only configs, tokenizers and safetensors are fetched, never pickled weights. What is fetched stays in the user's
Hugging Face cache, shared with every other tool.
"""

from __future__ import annotations

from pathlib import Path

from core.errors import CannotOpen
from core.types import Progress, silent

WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
UNWANTED = ("consolidated*", "original/*", "onnx/*", "openvino/*", "*/model*.safetensors")
"""Second copies of the same weights that some repositories carry."""


def hub_folder(repo: str, *, revision: str | None = None, progress: Progress = silent) -> Path:
    """The snapshot folder of a hub model, fetched if it is not in the cache; raises ``CannotOpen``."""
    from huggingface_hub import errors, snapshot_download

    progress(0, 1, f"looking for {repo} on the Hugging Face hub")
    named = f"{repo}@{revision}" if revision else repo
    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
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
            f"the hub has no model {repo!r}, or it is private; check the spelling, or log in with `hf auth login`"
        ) from None
    except (
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.HfHubHTTPError,
        OSError,
    ) as error:
        raise CannotOpen(
            f"{named} is not in the local hub cache and the hub cannot be reached ({type(error).__name__}); "
            "go online once, or give a local folder or a demo model"
        ) from None
    progress(1, 1, f"{repo} is here")
    return Path(folder)
