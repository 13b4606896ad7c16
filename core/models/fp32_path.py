"""Which kernels run float32 matrix products on the CPU, and the proof that the faster ones are still float32.

torch runs float32 matmuls through MKL. ``torch.backends.mkldnn.matmul.fp32_precision = "bf16"`` *allows*
oneDNN to round inputs to bfloat16; on a processor without bfloat16 matrix tiles (AMX) oneDNN keeps float32
and is simply the faster float32 library (1.3 to 1.8 times at prefill on a Zen 4/5 server core). On a processor
with AMX it really rounds. So the switch is thrown only where a parity check, run on this very machine with this
very torch, finds it equal to a float64 reference to 1e-4. Seen: 5.5e-6 on an AMD EPYC without AMX (taken), 1.2e-2
on an Intel Xeon with AMX (refused).

::

    with fast_fp32() as path:
        logits = model(**batch).logits
    path.name          # "oneDNN fp32, parity max diff 4.0e-06"  or  "exact fp32 (MKL)"

The switch belongs to the process, not to the thread: while any thread is inside ``fast_fp32`` every thread's
float32 matmuls take that path. Entries are counted, and the last one out restores what was there before.
Outside, nothing changes. It refuses to know models: it speaks of matmuls only. Inside, do not call
``torch.get_float32_matmul_precision()``: torch refuses to mix its two settings interfaces.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.cpu import cpu_model, instruction_sets
from core.lazy import torch
from core.paths import cache_dir
from core.types import content_hash

if TYPE_CHECKING:
    from torch import Tensor

Fp32Setting = Literal["exact", "auto"]

TOLERANCE = 1e-4
"""Largest difference to float64, as a share of the output's root mean square. True float32 is near 4e-6, inputs
rounded to bfloat16 (8 bits of mantissa) near 7e-3, to TF32 (11 bits) near 1e-3: the line is between them."""

SHAPES_MKN = (
    (1, 576, 1536),
    (16, 576, 1536),
    (256, 576, 1536),
    (128, 1536, 576),
    (1, 576, 8192),
    (64, 64, 64),
)
"""Rows × inner × columns: one token, a short and a long prompt, up and down projection, unembedding, a head."""

_DISABLED = "SLIMSCOPE_FP32_PATH"
_lock = threading.Lock()
_entered = 0
_previous = "none"
_known: dict[str, Parity] = {}


@dataclass(frozen=True)
class Parity:
    """Outcome of the check on this machine: the largest relative difference to float64 of each path."""

    fast: float
    exact: float

    @property
    def equal(self) -> bool:
        """Whether the fast path is float32 as far as ``TOLERANCE`` can tell."""
        return self.fast <= TOLERANCE


@dataclass(frozen=True)
class Fp32Path:
    """The path that is in force, and why."""

    fast: bool
    name: str
    """For conditions and provenance, e.g. ``oneDNN fp32, parity max diff 4.0e-06``."""


@contextmanager
def fast_fp32(setting: Fp32Setting = "auto", *, n_experts: int = 0) -> Iterator[Fp32Path]:
    """Run float32 matmuls of this process through oneDNN where that is proven equal; yields the path in force.

    ``setting`` ``"exact"`` (or the environment variable ``SLIMSCOPE_FP32_PATH=exact``) leaves torch as it is, and so
    does a model of ``n_experts``: each expert multiplies another number of rows every time, and oneDNN compiles and
    keeps a kernel for each. Seen: 25 to 45 % slower on 16 experts; 700 MB more over 20,000 tokens on 64.
    """
    path = choose_path(setting, n_experts=n_experts)
    if not path.fast:
        yield path
        return
    _enter()
    try:
        yield path
    finally:
        _leave()


def choose_path(setting: Fp32Setting = "auto", *, n_experts: int = 0) -> Fp32Path:
    """The path that ``fast_fp32`` would take here, without taking it. Runs the parity check if not yet known."""
    if n_experts:
        return Fp32Path(False, "exact fp32 (experts)")
    if setting == "exact" or os.environ.get(_DISABLED) == "exact":
        return Fp32Path(False, "exact fp32")
    if not _mkldnn().is_available():
        return Fp32Path(False, "exact fp32 (this torch has no oneDNN)")
    found = known_parity()
    if not found.equal:
        return Fp32Path(False, f"exact fp32 (oneDNN differs by {found.fast:.1e} > {TOLERANCE:.0e})")
    return Fp32Path(True, f"oneDNN fp32, parity max diff {found.fast:.1e}")


def known_parity() -> Parity:
    """``parity()`` of this machine, computed once per process and kept on disk per machine and torch."""
    key = content_hash(_environment())
    if key not in _known:
        file = cache_dir() / "fp32-parity" / f"{key[:16]}.json"
        _known[key] = _read(file) or _write(file, parity())
    return _known[key]


def parity() -> Parity:
    """Compare float32 matmuls of both paths with float64 on ``SHAPES_MKN``: linear, linear with bias, batched.

    Takes about 0.1 s. The generator is its own, so the caller's random state is untouched.
    """
    exact = max_difference(_products)
    _enter()
    try:
        fast = max_difference(_products)
    finally:
        _leave()
    return Parity(fast, exact)


def max_difference(products: Callable[[Tensor, Tensor, Tensor], list[Tensor]]) -> float:
    """Largest |float32 − float64| over all shapes, as a share of the root mean square of the float64 product."""
    generator = torch.Generator().manual_seed(20)
    worst = 0.0
    with torch.inference_mode():
        for rows, inner, columns in SHAPES_MKN:
            x_MK = torch.randn(rows, inner, generator=generator)
            w_NK = torch.randn(columns, inner, generator=generator)
            bias_N = torch.randn(columns, generator=generator)
            references = _products(x_MK.double(), w_NK.double(), bias_N.double())
            for product, reference in zip(products(x_MK, w_NK, bias_N), references, strict=True):
                gap = (product.double() - reference).abs().max() / reference.square().mean().sqrt()
                worst = max(worst, float(gap))
    return worst


def _products(x_MK: Tensor, w_NK: Tensor, bias_N: Tensor) -> list[Tensor]:
    """The kinds of product a transformer takes, in the dtype of the arguments."""
    linear = torch.nn.functional.linear
    batched = torch.bmm(x_MK.expand(2, -1, -1), w_NK.T.expand(2, -1, -1))
    return [linear(x_MK, w_NK), linear(x_MK, w_NK, bias_N), x_MK @ w_NK.T, batched]


def _mkldnn() -> Any:
    """torch's oneDNN settings; Any, because torch's stubs do not know ``matmul`` nor type ``is_available``."""
    return torch.backends.mkldnn


def _enter() -> None:
    global _entered, _previous
    with _lock:
        if _entered == 0:
            _previous = _mkldnn().matmul.fp32_precision
            _mkldnn().matmul.fp32_precision = "bf16"
        _entered += 1


def _leave() -> None:
    global _entered
    with _lock:
        _entered -= 1
        if _entered == 0:
            _mkldnn().matmul.fp32_precision = _previous


def _environment() -> dict[str, object]:
    """Everything the outcome of the check depends on; its hash names the cached answer."""
    limits = {
        name: os.environ[name] for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA") if name in os.environ
    }
    return {
        "cpu": cpu_model(),
        "instruction_sets": instruction_sets(),
        "torch": torch.__version__,
        "limits": limits,
        "shapes": SHAPES_MKN,
    }


def _read(file: Path) -> Parity | None:
    try:
        return Parity(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None  # absent, or half-written by a process that died: check again


def _write(file: Path, found: Parity) -> Parity:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(asdict(found)))
    part.replace(file)
    return found
