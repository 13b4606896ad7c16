"""Run as a file in a fresh process: load a folder with plain transformers and say what came out.

Imports nothing of Slimscope, so that what it shows is what any user of transformers gets. Called as
``python -I _fresh_load.py REQUEST.json``; the request names the folder, the auto class, the probe inputs, where to
write outputs, and the conditions (threads, kernels) the comparison needs. Prints nothing; writes ``answer`` as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

LEFT_BESIDE = ("weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale", "input_scale")
"""What stays beside a weight that was unpacked at the first forward, as parameters the model in memory never had."""


def digest(tensor: Any) -> str:
    """SHA-256 of a tensor's shape, dtype and bytes."""
    import torch

    content = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    content.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return content.hexdigest()


def output_of(model: Any, inputs: dict[str, Any]) -> Any:
    """What is compared: logits, or for a model without a head its last hidden states."""
    import torch

    with torch.no_grad():  # quanto's layers refuse inference mode
        output = model(**inputs)
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def flat(model: Any) -> dict[str, Any]:
    """Every tensor of a model's state by name; one that a library packed as the plain tensors it is made of."""
    import torch

    def parts(name: str, tensor: Any) -> dict[str, Any]:
        inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
        if not inner:
            return {name: tensor}
        return {n: t for part in inner for n, t in parts(f"{name}.{part}", getattr(tensor, part)).items()}

    found = {}
    with torch.inference_mode(False), torch.no_grad():  # torchao's tensors refuse inference mode
        for name, tensor in model.state_dict().items():
            if hasattr(tensor, "detach"):
                found.update(parts(name, tensor))
    return found


def loaded_by(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model and the loading report, by plain transformers, or by quanto's class for such models."""
    import transformers

    auto = getattr(transformers, request["loader"])
    if request["library"] == "quanto":
        from optimum.quanto.models.transformers_models import QuantizedTransformersModel

        own: Any = type("QuantizedModel", (QuantizedTransformersModel,), {"auto_class": auto})
        nothing: dict[str, Any] = {"missing_keys": (), "unexpected_keys": (), "mismatched_keys": ()}
        return own.from_pretrained(request["folder"])._wrapped, nothing
    model, report = auto.from_pretrained(request["folder"], output_loading_info=True, **request["options"])
    return model, report


def end_with_parent() -> None:
    """Wait for the end of standard input, which comes when the parent is gone; then end at once."""
    os.read(0, 1)
    os._exit(1)


def main(request_path: str) -> None:
    """Answer one request."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    torch.backends.mkldnn.matmul.fp32_precision = request["matmul_precision"]  # type: ignore[attr-defined]
    started = time.monotonic()
    model, report = loaded_by(request)
    seconds = time.monotonic() - started
    model.eval()
    # Before the forward pass: bitsandbytes repacks its weights at the first one.
    packed = {name: digest(t) for name, t in flat(model).items()} if request["library"] else None
    output = output_of(model, load_file(request["inputs"]))
    save_file({"output": output.contiguous()}, request["output"])
    ties = {
        name: model.get_parameter(name).data_ptr() == model.get_parameter(source).data_ptr()
        for name, source in request["ties"].items()
    }
    answer = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(report["unexpected_keys"]),
        "mismatched": sorted(str(key) for key in report["mismatched_keys"]),
        "ties": ties,
        # After the forward pass: some files are unpacked by it.
        "digests": packed
        or {
            name: digest(parameter)
            for name, parameter in model.named_parameters()
            if name.rpartition(".")[2] not in LEFT_BESIDE
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        "load_seconds": seconds,
        "engine_modules": sorted(name for name in sys.modules if name.partition(".")[0] == "core"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
