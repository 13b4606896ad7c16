"""Devices by the Android debug bridge, through the ``adb`` program: USB, or Wi-Fi once it is paired."""

from __future__ import annotations

import re

from core.devices.link import LinkLost, Said, called
from core.devices.registry import Device
from core.errors import CannotConnect

_END = re.compile(rb"\n?slimscope-ended (\d+)\s*$")


class AdbLink:
    """A device whose address is a serial number of ``adb devices``."""

    root = "/data/local/tmp/slimscope"

    def __init__(self, device: Device) -> None:
        self._device = device

    def run(self, command: str, given: bytes = b"") -> Said:
        """One command of the device's shell; its exit code is said by the shell, since old bridges keep it to themselves."""
        told = f"( {command} ) 2>&1; code=$?; echo; echo slimscope-ended $code"
        said = called(["adb", "-s", self._device.address, "shell", "-T", told], given, program="adb")
        ended = _END.search(said.out)
        if ended is None:
            raise _explained(self._device, said.words or said.out.decode(errors="replace").strip())
        out = said.out[: ended.start()]
        return Said(int(ended[1]), out, out.decode(errors="replace").strip())


def _explained(device: Device, words: str) -> CannotConnect:
    if "unauthorized" in words:
        return CannotConnect(
            f"{device.slug} has not allowed this computer; confirm the question on its screen"
        )
    if "not found" in words and "device" in words:
        return CannotConnect(
            f"adb knows no device {device.address}; `adb devices` lists them: plug it in, or pair it over Wi-Fi"
        )
    return LinkLost(f"adb lost {device.slug} ({words or 'no answer'}); check the cable and try again")
