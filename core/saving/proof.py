"""The reload proof: a fresh process loads the saved files with plain transformers and must find the same model.

Compared are the outputs on fixed inputs (difference exactly 0), every parameter bit for bit, the ties, and the real
bytes against the predicted ones. A failure is a sentence, not a number to be explained away.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from core.lazy import torch
from core.models.loaded import LoadedModel
from core.models.open import AUTO_CLASSES
from core.models.patch_grid import image_size
from core.models.targets import tied_names
from core.saving import fresh_load
from core.saving.room import PROOF_BYTES
from core.saving.store import SavedFiles
from core.types import Metric, Progress, Provenance, Result

if TYPE_CHECKING:
    from torch import Tensor

BYTES_TOLERANCE = 0.02
POLL_SECONDS = 0.1
PROBE_TOKENS = 48


@dataclass(frozen=True)
class Proof:
    """What a fresh process found in the saved files."""

    passed: bool
    failure: str
    """One sentence; empty when passed."""
    max_logit_difference: float | None
    """Largest |reloaded - before saving| over the probe's outputs; None when nothing came back."""
    differing_parameters: int | None
    """Parameters that are not bit-equal after the reload."""
    ties_kept: bool | None
    """One tensor in the file and one in memory for every tied pair; None when nothing is tied."""
    predicted_bytes: int
    real_bytes: int
    parameters: int
    share_parameters: float
    """Of the parameters before the recipe, those it removed or changed."""
    share_bytes: float
    """The same of the bytes before the recipe."""
    share_expert_parameters: float | None
    """The same of the routed experts' parameters; None for a model that had none."""
    loader: str
    """The call that was proved, e.g. ``AutoModelForCausalLM.from_pretrained(folder)``."""
    dtype: str
    """The dtype the artifact declares and loads in."""
    format: str
    load_seconds: float | None
    seconds: float

    def as_result(self) -> Result:
        """The proof as a result: its metrics, its facts as conditions."""
        facts = asdict(self)
        numbers = {
            "max_logit_difference": ("", "lower"), "differing_parameters": ("", "lower"), "real_bytes": ("B", "lower"),
            "predicted_bytes": ("B", "neither"), "share_parameters": ("", "higher"), "share_bytes": ("", "higher"),
            "share_expert_parameters": ("", "higher"), "load_seconds": ("s", "lower"), "seconds": ("s", "neither"),
        }  # fmt: skip
        metrics = tuple(
            Metric(name, float(facts[name]), unit, better)  # type: ignore[arg-type]
            for name, (unit, better) in numbers.items()
            if facts[name] is not None
        )
        return Result(
            {"main": pd.DataFrame([facts])},
            (),
            metrics,
            Provenance(
                "proof", conditions={k: v for k, v in facts.items() if k not in numbers}, dtype=self.dtype,
                seconds=self.seconds, exactness_gap=self.max_logit_difference,
                exactness_check="output of the reloaded files against the model before saving",
            ),
        )  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """What the model in memory gives: taken before saving, so that saving cannot change it unseen."""

    inputs: Mapping[str, Tensor]
    output: Tensor | None
    """None for a library's model, which is run only after it was saved."""
    digests: Mapping[str, str]


def expect(loaded: LoadedModel) -> Expected:
    """Run the probe and hash every parameter of the model in memory."""
    inputs = _probe_inputs(loaded)
    if loaded.library is not None:
        state = fresh_load.flat(loaded.library.model)
        return Expected(inputs, None, {name: fresh_load.digest(tensor) for name, tensor in state.items()})
    output = fresh_load.output_of(loaded.model, dict(inputs)).clone()
    digests = {name: fresh_load.digest(p) for name, p in loaded.model.named_parameters()}
    return Expected(inputs, output, digests)


def prove(saved: SavedFiles, *, loaded: LoadedModel, expected: Expected, progress: Progress) -> Proof:
    """Load ``saved`` in a fresh process and compare it with ``expected``.

    Never raises for a failed proof: it says so. Raises what ``progress`` raises, after ending the process.
    """
    started = time.monotonic()
    loader = auto_class(loaded)
    # Beside the files: what a killed process leaves is found and removed with them.
    with tempfile.TemporaryDirectory(prefix=".proof-", dir=saved.folder.parent) as scratch:
        answer, output, failure = _ask(saved, loaded, expected, loader, Path(scratch), progress)
    difference = None if output is None else _difference(output, _output(loaded, expected))
    differing = None if answer is None else _differing(answer["digests"], expected.digests)
    ties = None if answer is None or not answer["ties"] else all(answer["ties"].values())
    if answer is not None:
        failure = _verdict(saved, answer, difference, differing, ties)
    return Proof(
        passed=not failure,
        failure=failure,
        max_logit_difference=difference,
        differing_parameters=None if differing is None else len(differing),
        ties_kept=ties,
        predicted_bytes=saved.predicted_bytes,
        real_bytes=saved.bytes,
        parameters=saved.parameters,
        share_parameters=saved.shares.parameters,
        share_bytes=saved.shares.bytes,
        share_expert_parameters=saved.shares.expert_parameters,
        loader=_call(loaded, loader),
        dtype=loaded.dtype if answer is None else answer["dtype"],
        format=saved.format,
        load_seconds=None if answer is None else answer["load_seconds"],
        seconds=time.monotonic() - started,
    )


def _ask(
    saved: SavedFiles, loaded: LoadedModel, expected: Expected, loader: str, scratch: Path, progress: Progress
) -> tuple[dict[str, Any] | None, Tensor | None, str]:
    """The fresh process's answer and output, or why there is none."""
    from safetensors.torch import load_file, save_file

    paths = {name: str(scratch / name) for name in ("inputs", "output", "answer")}
    save_file(dict(expected.inputs), paths["inputs"])
    request = {
        **paths,
        "folder": str(saved.folder.resolve()),
        "loader": loader,
        "library": None if loaded.library is None else loaded.library.library,
        "options": _options(loaded),
        "ties": tied_names(loaded.model),
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
    }
    (scratch / "request.json").write_text(json.dumps(request), encoding="utf-8")
    code, words = _run_fresh(scratch, progress)
    if code != 0:
        return None, None, _death(code, words, loaded.nbytes + PROOF_BYTES)
    answer = json.loads(Path(paths["answer"]).read_text(encoding="utf-8"))
    return answer, load_file(paths["output"])["output"], ""


def _run_fresh(scratch: Path, progress: Progress) -> tuple[int, str]:
    """Exit code and last words of the fresh process."""
    command = [sys.executable, "-I", fresh_load.__file__, str(scratch / "request.json")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    log = scratch / "log"
    with log.open("wb") as stream:
        child = subprocess.Popen(  # its standard input closes when we end, however we end
            command, cwd=scratch, env=environment, stdin=subprocess.PIPE, stdout=stream, stderr=stream
        )
        try:
            while child.poll() is None:
                progress(0.0, 1.0, "reloading in a fresh process")
                time.sleep(POLL_SECONDS)
        finally:
            if child.poll() is None:
                child.kill()
            with child:
                pass  # reaped, and its pipe closed
    return child.returncode, log.read_text(encoding="utf-8", errors="replace")


def _death(code: int, words: str, nbytes: int) -> str:
    if code == -9:
        return (
            "the fresh process that reloads the files was killed, most likely for memory, of which it needs about "
            f"{nbytes / 1e6:.0f} MB; free memory and retry"
        )
    last = next((line for line in reversed(words.strip().splitlines()) if line.strip()), "no message")
    how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    return f"the fresh process that reloads the files {how}: {last}"


def _verdict(
    saved: SavedFiles,
    answer: dict[str, Any],
    difference: float | None,
    differing: list[str] | None,
    ties: bool | None,
) -> str:
    """The first thing that is wrong, or nothing."""
    for kind in ("missing", "unexpected", "mismatched"):
        if answer[kind]:
            return f"{len(answer[kind])} tensors are {kind} after the reload, first {answer[kind][0]}"
    if answer["engine_modules"]:
        return f"the fresh process loaded engine code ({answer['engine_modules'][0]}), so it proves nothing"
    if differing:
        return f"{len(differing)} parameters differ after the reload, first {differing[0]}"
    if difference != 0:
        return f"the reloaded model's outputs differ by up to {difference}, they must be equal"
    if ties is False:
        broken = next(name for name, kept in answer["ties"].items() if not kept)
        return f"{broken} was tied and is a second tensor after the reload"
    if abs(saved.bytes - saved.predicted_bytes) > BYTES_TOLERANCE * saved.bytes:
        return f"the weight file has {saved.bytes} bytes where {saved.predicted_bytes} were predicted: over 2 % apart"
    return ""


def _difference(output: Tensor, expected: Tensor) -> float:
    if output.shape != expected.shape or output.dtype != expected.dtype:
        return float("inf")
    gap = (output.double() - expected.double()).abs().max()
    return float(gap.nan_to_num(nan=float("inf")))


def _differing(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


def _output(loaded: LoadedModel, expected: Expected) -> Tensor:
    """What the model in memory gives: a library's by its own kernels, as in the fresh process."""
    if expected.output is not None:
        return expected.output
    assert loaded.library is not None
    with torch.inference_mode(False):
        output: Tensor = fresh_load.output_of(loaded.library.model, dict(expected.inputs))
    return output


def _call(loaded: LoadedModel, loader: str) -> str:
    """The call that is proved, with the library it needs."""
    form = loaded.library
    if form is None:
        return f"{loader}.from_pretrained(folder)"
    return f"{form.loader}.from_pretrained(folder) with {form.library} {form.version}"


def auto_class(loaded: LoadedModel) -> str:
    """The name of the transformers class whose ``from_pretrained`` loads this model."""
    architecture = type(loaded.model).__name__
    return next(auto for end, auto in AUTO_CLASSES.items() if architecture.endswith(end))


def _options(loaded: LoadedModel) -> dict[str, Any]:
    """Kernels as the model in memory has them; nothing that changes what is loaded."""
    config = loaded.model.config
    options: dict[str, Any] = {"attn_implementation": config._attn_implementation}
    if loaded.anatomy.n_experts:
        options["experts_implementation"] = config._experts_implementation
    if getattr(loaded.model, "pooler", True) is None:
        options["add_pooling_layer"] = False
    if loaded.ref.trust_remote_code:
        options["trust_remote_code"] = True
    return options


def _probe_inputs(loaded: LoadedModel) -> dict[str, Tensor]:
    """Fixed inputs: two token sequences, or two images."""
    config = loaded.model.config
    if loaded.family == "vision":
        shape = (2, config.num_channels, *image_size(config))
        return {"pixel_values": torch.arange(float(torch.Size(shape).numel())).sin().reshape(shape)}
    length = min(PROBE_TOKENS, loaded.anatomy.context_length)
    ids = (torch.arange(2 * length) * 7919 + 13) % loaded.anatomy.vocab_size
    return {"input_ids": ids.reshape(2, length)[: 2 if loaded.runs_batches else 1]}
