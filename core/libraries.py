"""Libraries that only some methods need: which version of each is known to work, and how it is added.

They are imported inside functions, after ``needed``; a method without its library is refused with one command.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

from core.errors import MissingLibrary

PINS = {
    "bitsandbytes": "0.50.2",
    "ninja": "1.13.2",
    "nncf": "3.4.0",
    "onnx": "1.23.2",
    "onnxruntime": "1.32.0",
    "onnxruntime-genai": "0.18.0",
    "onnxscript": "0.7.2",
    "openvino": "2026.4.1",
    "optimum-quanto": "0.2.7",
    "torchao": "0.18.0",
    "xllamacpp": "2026.10.11549",
}
"""Distribution → the version that our tests run with."""


def needed(*libraries: str, by: str) -> dict[str, str]:
    """The installed version of each library; raises ``MissingLibrary`` with the command that adds the missing ones."""
    found: dict[str, str] = {}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            missing = " ".join(f"{each}=={PINS[each]}" for each in libraries)
            raise MissingLibrary(
                f"{by} needs {name}, which is not installed; run `pip install {missing}` and try again"
            ) from None
    return found


def without_telemetry() -> None:
    """Keep OpenVINO and NNCF from reporting their use over the network, which they do unless this module is missing.

    Call it before either is imported, also by transformers' exporters.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
