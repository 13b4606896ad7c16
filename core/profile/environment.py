"""The machine and the software a number was taken on, as plain data with a hash.

Two numbers with the same hash were taken on the same kind of machine with the same software. It holds no user
name, host name, path or serial number, so it may be published. What varies by the minute (load, clocks) is a
condition of a run and not here.
"""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from core.cpu import cpu_model, instruction_sets, is_virtual_machine, physical_cores
from core.lazy import torch
from core.types import content_hash

PACKAGES = ("slimscope", "torch", "transformers", "compressed-tensors", "safetensors", "numpy", "accelerate")
VARIABLES = re.compile(
    r"(?!\w+_NUM_THREADS)(OMP|MKL|KMP|GOMP|OPENBLAS|ONEDNN|DNNL|ATEN)_\w+|PYTORCH_\w*ALLOC\w*"
)
"""Environment variables that change how kernels are run; thread counts are set by us, a condition of the run."""


def environment(device: str) -> dict[str, Any]:
    """Host and software fingerprint for a device (``cpu``, ``cuda``, ``cuda:1``), with their hash."""
    facts = {"host": host(device), "software": software()}
    return {**facts, "hash": content_hash(facts)}


def host(device: str) -> dict[str, Any]:
    """What the machine is; values the system hides are None."""
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "instruction_sets": instruction_sets(),
        "physical_cores": physical_cores(),
        "logical_cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "governor": governor.read_text().strip() if governor.exists() else None,
        "system": f"{platform.system()} {platform.release()}",
        "container": _in_container(),
        "virtual_machine": is_virtual_machine(),
        **(_gpu(device) if device.startswith("cuda") else {}),
    }


def software() -> dict[str, Any]:
    """Python, the packages that move a number, and the variables that steer their threads."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {k: v for k, v in sorted(os.environ.items()) if VARIABLES.fullmatch(k)},
    }


def _gpu(device: str) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(torch.device(device))
    version = Path("/proc/driver/nvidia/version")
    driver = re.search(r"\d+\.\d+(\.\d+)?", version.read_text()) if version.exists() else None
    return {
        "gpu": facts.name,
        "gpu_memory_gib": round(facts.total_memory / 2**30),
        "gpu_driver": driver.group() if driver else None,
        "cuda": torch.version.cuda,
    }


def _in_container() -> bool:
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists() or "container" in os.environ


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
