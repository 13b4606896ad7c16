"""What the device is, how it fares at this minute, and which engines it has. Linux and Android; what is hidden is None."""

from __future__ import annotations

import glob
import os
import platform
import shutil
import subprocess
from importlib import metadata, util
from typing import Any

INSTALL = {
    "llama_bench": "build llama.cpp there (cmake -B build && cmake --build build --target llama-bench) and put it on PATH",
    "onnxruntime": "python3 -m pip install onnxruntime",
    "torch": "python3 -m pip install torch transformers compressed-tensors",
}
TELLING = ("asimddp", "i8mm", "sve", "bf16", "fphp", "avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")


def read(path: str) -> str | None:
    """A small file's text, None where it cannot be read."""
    try:
        with open(path, errors="replace") as file:
            return file.read().strip("\0\n ")
    except OSError:
        return None


def said(*command: str) -> str | None:
    """A program's answer, None where it is missing or fails."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None


def host() -> dict[str, Any]:
    """What does not change by the minute; no host name, user, path or serial number."""
    facts = _processor()
    mode = said("nvpmodel", "-q")
    return {
        "board": read("/proc/device-tree/model") or said("getprop", "ro.product.model"),
        "cpu": facts.get("model name")
        or facts.get("Model")
        or facts.get("Hardware")
        or platform.processor()
        or None,
        "architecture": platform.machine(),
        "instruction_sets": [name for name in TELLING if name in _features(facts)],
        "physical_cores": cores(),
        "logical_cores": os.cpu_count(),
        "memory_gib": round((memory()[0] or 0) / 2**30, 1),
        "governor": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "power_mode": mode.splitlines()[0].split(":")[-1].strip() if mode else None,
        "system": platform.system() + " " + platform.release(),
    }


def software() -> dict[str, Any]:
    """Python and the libraries that move a number."""
    names = ("numpy", "onnxruntime", "torch", "transformers")
    return {"python": platform.python_version(), "packages": {name: _version(name) for name in names}}


def state(root: str) -> dict[str, Any]:
    """What changes by the minute; bytes, °C, MHz."""
    return {
        "memory_available_bytes": memory()[1],
        "disk_free_bytes": shutil.disk_usage(root).free,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        **telemetry(),
        "throttled": said("vcgencmd", "get_throttled"),
    }


def telemetry() -> dict[str, float | None]:
    """The hottest zone in °C and the fastest core's clock in MHz, from files only: cheap enough between two samples."""
    zones = [read(path) for path in glob.glob("/sys/class/thermal/thermal_zone*/temp")]
    clocks = [read(path) for path in glob.glob("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")]
    hot = [float(text) / 1e3 for text in zones if text and text.lstrip("-").isdigit()]
    fast = [float(text) / 1e3 for text in clocks if text and text.isdigit()]
    return {"temperature_c": max(hot) if hot else None, "clock_mhz": max(fast) if fast else None}


def engines() -> list[dict[str, Any]]:
    """Each engine: id, whether it is there, its version and the command that adds it."""
    ort, torch = _version("onnxruntime"), _version("torch")
    has = {
        "llama_bench": (llama_bench() is not None, None),
        "onnxruntime": (ort is not None or util.find_spec("onnxruntime") is not None, ort),
        "torch": (torch is not None and _version("transformers") is not None, torch),
    }
    return [
        {"id": id_, "available": found, "version": version, "install": INSTALL[id_]}
        for id_, (found, version) in has.items()
    ]


def llama_bench() -> str | None:
    """Where llama.cpp's own benchmark is."""
    built = os.path.expanduser("~/llama.cpp/build/bin/llama-bench")
    return shutil.which("llama-bench") or (built if os.access(built, os.X_OK) else None)


def memory() -> tuple[int | None, int | None]:
    """Bytes of memory, and of it available."""
    found = {}
    for line in (read("/proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        if rest.strip().endswith("kB"):
            found[name] = int(rest.split()[0]) * 1024
    return found.get("MemTotal"), found.get("MemAvailable")


def cores() -> int:
    """Cores that are not each other's siblings, as far as the system tells."""
    siblings = {
        read(path) for path in glob.glob("/sys/devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list")
    }
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(len(siblings - {None}) or usable, usable))


def _processor() -> dict[str, str]:
    pairs = (line.partition(":") for line in (read("/proc/cpuinfo") or "").splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _features(facts: dict[str, str]) -> list[str]:
    return (facts.get("flags") or facts.get("Features") or "").split()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
