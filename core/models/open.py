"""Opening a model from whatever the user typed; refuses, in one sentence, what cannot be opened faithfully.

Only safetensors are read: nothing is ever unpickled. A model with missing weights (which transformers would draw at
random) is refused, as is one whose anatomy does not prove itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from core.errors import CannotOpen, OutOfMemory, ran_out_of_memory
from core.hub import hub_snapshot
from core.lazy import torch, transformers
from core.models.anatomy import Anatomy
from core.models.anatomy_find import find_anatomy
from core.models.anatomy_verify import verify_anatomy
from core.models.checkpoint import fingerprint, read_config, stored_tensors, weight_files
from core.models.demo import demo, demo_files
from core.models.gguf import converted_gguf
from core.models.learned import read_learned
from core.models.library import QUANTO_MAP, load_quanto
from core.models.loaded import LoadedModel, Pooling
from core.models.quantized import LIBRARIES, MODULES, densify, is_lazy, left_out, unpack
from core.models.quiet import quiet
from core.numerics.activations import ActivationScheme
from core.types import ModelRef, Progress, silent

VariantFolder = Callable[[str], Path]
AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForImageClassification": "AutoModelForImageClassification",
    "Model": "AutoModel",
}
"""How the end of an architecture's name says which auto class loads it."""
HUB_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
"""Configs, tokenizers and safetensors, never pickled weights."""
HUB_UNWANTED = ("consolidated*", "original/*", "onnx/*", "openvino/*", "*/model*.safetensors")
"""Second copies of the same weights that some repositories carry."""
REPORTED = ("missing_keys", "mismatched_keys", "unexpected_keys")
"""What transformers reports of a load; quanto's own loader, which reports nothing, ends with an error instead."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")


def open_model(
    ref: ModelRef, *, variant_folder: VariantFolder | None = None, progress: Progress = silent
) -> LoadedModel:
    """Open a model in eval mode without gradients, its anatomy proved on a seeded input.

    ``variant_folder`` finds the files of ``variant:ID``. Raises ``CannotOpen``, ``AnatomyMismatch`` or ``BadInput``.
    """
    folder = local_folder(ref, variant_folder=variant_folder, progress=progress)
    progress(0, 3, "reading weights")
    config = read_config(folder)
    tensors = stored_tensors(weight_files(folder))
    with quiet():
        model, activations, notes = _load(ref, folder, config, tensors)
        progress(1, 3, "checking the anatomy")
        anatomy = _anatomy(model)
        checks = verify_anatomy(model, anatomy)
        progress(2, 3, "reading the tokenizer")
        tokenizer = None if anatomy.family == "vision" else _tokenizer(ref, folder)
        processor = _processor(ref, folder) if anatomy.family == "vision" else None
    if ref.kind == "demo" and (caveat := demo(ref.source.removeprefix("demo:")).caveat):
        notes = (caveat, *notes)
    loaded = LoadedModel(
        ref=ref,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        processor=processor,
        anatomy=anatomy,
        fingerprint=fingerprint(folder),
        pooling=_pooling(folder),
        notes=notes,
        checks=checks,
        learned=read_learned(folder),
    )
    for module, scheme in activations.items():
        loaded.round_inputs(module, scheme)
    progress(3, 3, "open")
    return loaded


def local_folder(
    ref: ModelRef, *, variant_folder: VariantFolder | None = None, progress: Progress = silent
) -> Path:
    """The folder with config.json, safetensors and tokenizer of a model, fetched or converted if need be.

    Raises ``CannotOpen``, or ``BadInput`` for an unknown demo or variant.
    """
    name = ref.source.partition(":")[2]
    if ref.kind == "variant":
        if variant_folder is None:
            raise CannotOpen(f"{ref.source} needs a catalog to be found in; name one with SLIMSCOPE_CATALOG")
        return variant_folder(name)
    if ref.kind == "hub":
        progress(0, 1, f"looking for {ref} on the Hugging Face hub")
        return hub_snapshot(
            ref.source, kind="model", revision=ref.revision, wanted=HUB_WANTED, unwanted=HUB_UNWANTED
        )
    path = demo_files(name) if ref.kind == "demo" else Path(ref.source).expanduser()
    if path.suffix.lower() == ".gguf":
        return converted_gguf(path, progress=progress)
    if not path.is_dir():
        raise CannotOpen(
            f"{path} does not exist; give an existing folder, a .gguf file or a hub id like org/name"
        )
    return path


def _load(
    ref: ModelRef, folder: Path, config: dict[str, Any], tensors: dict[str, Any]
) -> tuple[Any, dict[str, ActivationScheme], tuple[str, ...]]:
    """Build the model and fill it from the checkpoint; returns it with what its layers' inputs are rounded to, and notes
    on what was left unused."""
    architecture = _architecture(folder, config)
    auto = next(auto for end, auto in AUTO_CLASSES.items() if architecture.endswith(end))
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": ref.trust_remote_code}
    quantization = config.get("quantization_config")
    by = None if quantization is None else str(quantization.get("quant_method"))
    by = "quanto" if (folder / QUANTO_MAP).is_file() else by
    _refuse_unreadable(folder, by)
    if auto == "AutoModel" and config.get("model_type") == "bert":
        # The pooler is drawn at random when a checkpoint has none, and nothing here reads it.
        options["add_pooling_layer"] = any(
            name.removeprefix("bert.").startswith("pooler.") for name in tensors
        )
    dtype = "auto" if ref.dtype == "stored" else getattr(torch, ref.dtype)
    try:
        lazy = by == "compressed-tensors" and is_lazy(quantization or {})
        if quantization is not None and by == "compressed-tensors":
            options["config"] = transformers.AutoConfig.from_pretrained(folder, **options)
            options["config"].quantization_config = {**quantization, "dequantize": not lazy}
        if by == "quanto":
            model, report = load_quanto(folder, auto), dict.fromkeys(REPORTED, ())
        else:
            model, report = getattr(transformers, auto).from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that the report names them; they are refused below
                **options,
            )
        activations: dict[str, ActivationScheme] = {}
        note = ""
        if by in LIBRARIES:
            model, note = densify(model, by)
            model = model if dtype == "auto" else model.to(dtype)
        elif lazy:
            activations, note = unpack(model)
        elif quantization is not None:
            note = left_out(quantization)
        model = model.to(ref.device)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, ImportError) as error:
        if ran_out_of_memory(error):
            raise OutOfMemory(
                f"not enough memory on {ref.device} to hold {folder}; free memory, or open a smaller model"
            ) from None
        raise CannotOpen(_reason(folder, config, error)) from None
    unused = _refuse_partial(folder, architecture, report)
    model.eval().requires_grad_(False)
    left = (
        f"{len(unused)} tensors of the checkpoint have no place in {architecture}: {unused[0]} …"
        if unused
        else ""
    )
    return model, activations, tuple(filter(None, (note, left)))


def _refuse_unreadable(folder: Path, by: str | None) -> None:
    """Refuse what was quantized by something that cannot be read back as dense weights here."""
    if by is None or by == "compressed-tensors":
        return
    if by not in LIBRARIES:
        raise CannotOpen(
            f"{folder} is quantized with {by!r}; only compressed-tensors, {', '.join(LIBRARIES)} can be read back as "
            "dense weights here"
        )
    package = MODULES.get(by, by)
    spec = find_spec(package) if find_spec(package.partition(".")[0]) else None
    if spec is None or spec.origin is None:  # a folder without code is a namespace to Python, and no library
        raise CannotOpen(
            f"{folder} is quantized with {by}, which is not installed; run `pip install --no-deps {LIBRARIES[by]}` and open it again"
        )


def _architecture(folder: Path, config: dict[str, Any]) -> str:
    names = config.get("architectures") or [""]
    if not any(names[0].endswith(end) for end in AUTO_CLASSES):
        said = f"names the architecture {names[0]}" if names[0] else "names no architecture"
        raise CannotOpen(
            f"{folder}/config.json {said}; supported are causal and masked language models, encoders without a head, "
            "and classifiers of texts and of images"
        )
    architecture: str = names[0]
    if "auto_map" not in config and not hasattr(transformers, architecture):
        raise CannotOpen(
            f"{folder}/config.json names the architecture {architecture}, which transformers "
            f"{transformers.__version__} does not have; open another model"
        )
    return architecture


def _reason(folder: Path, config: dict[str, Any], error: Exception) -> str:
    first = (str(error).strip().splitlines() or ["no message"])[0]
    kind = config.get("model_type")
    known = kind in transformers.CONFIG_MAPPING
    if not known and "auto_map" in config:
        return f"{folder} needs its own Python code to load; allow it with trust_remote_code only if you trust its author"
    if not known:
        return f"{folder}: transformers {transformers.__version__} does not know the model type {kind!r}; open another model"
    return f"{folder} does not load ({type(error).__name__}: {first}); fetch it again or open another model"


def _refuse_partial(folder: Path, architecture: str, report: dict[str, Any]) -> tuple[str, ...]:
    """Refuse missing or misshapen weights, and weights of a layer with no place; returns other unused names."""
    missing = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    if missing:
        raise CannotOpen(
            f"{folder}: {len(missing)} weights of {architecture} are missing or of another shape, first {missing[0]}; "
            "they would be random numbers, so it is not opened: fetch the whole checkpoint"
        )
    unexpected = tuple(sorted(report["unexpected_keys"]))
    inside = [name for name in unexpected if any(part.isdigit() for part in name.split("."))]
    if inside:
        raise CannotOpen(
            f"{folder}: {len(inside)} weights inside layers have no place in {architecture}, first {inside[0]}; "
            "leaving them out would open another model: check that config.json belongs to these weights"
        )
    return unexpected


def _anatomy(model: Any) -> Anatomy:
    try:
        return find_anatomy(model)
    except (AttributeError, StopIteration) as error:
        raise CannotOpen(
            f"{type(model).__name__}: its config or modules lack what every supported architecture has ({error}); "
            "this architecture is not supported"
        ) from None


def _tokenizer(ref: ModelRef, folder: Path) -> Any | None:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=ref.trust_remote_code
        )
    except Exception as error:  # noqa: BLE001 - tokenizers raises plain Exception for a damaged file
        raise CannotOpen(f"{folder}: the tokenizer does not load ({error}); fetch its files again") from None


def _processor(ref: ModelRef, folder: Path) -> Any | None:
    if not (folder / "preprocessor_config.json").is_file():
        return None
    try:
        processor_class: Any = transformers.AutoImageProcessor
        return processor_class.from_pretrained(
            folder, local_files_only=True, trust_remote_code=ref.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise CannotOpen(
            f"{folder}: the image processor does not load ({error}); fetch its files again"
        ) from None


def _pooling(folder: Path) -> Pooling:
    """How a sentence-transformers checkpoint pools token vectors; ``mean`` where nothing is said."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CannotOpen(f"{path} cannot be read as JSON ({error}); fetch the file again") from None
    mode = settings.get("pooling_mode")
    if mode == "mean" or settings.get("pooling_mode_mean_tokens"):
        return "mean"
    if mode == "cls" or settings.get("pooling_mode_cls_token"):
        return "cls"
    raise CannotOpen(f"{path} asks for a pooling other than mean or cls; open another encoder")
