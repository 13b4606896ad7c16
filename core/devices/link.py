"""A way to a device: commands run there and files sent there. What SSH and adb have in common."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Protocol

from core.devices.registry import Device
from core.errors import BadInput, CannotConnect

CHUNK = 32 << 20
"""Bytes sent in one call: what a lost link can cost."""
TIMEOUT_S = 180.0


class LinkLost(CannotConnect):
    """The device does not answer just now; trying again may help."""


@dataclass(frozen=True)
class Said:
    """How a command ended on the device."""

    code: int
    out: bytes
    words: str
    """What it wrote to standard error."""


class Link(Protocol):
    """One device; raises ``LinkLost`` or ``CannotConnect``."""

    root: str
    """Where everything of ours lies there, as a POSIX shell writes it."""

    def run(self, command: str, given: bytes = b"") -> Said:
        """Run a command line of the device's shell with ``given`` as its standard input."""


def link_to(device: Device) -> Link:
    """The way to a registry's device; raises ``BadInput`` for one that has none."""
    from core.devices.adb import AdbLink
    from core.devices.ssh import SshLink

    if device.transport == "ssh":
        return SshLink(device)
    if device.transport == "adb":
        return AdbLink(device)
    raise BadInput(
        f"{device.slug} has no address; put it into devices.yaml with transport: ssh and address: ALIAS of your SSH "
        "configuration, or transport: adb and a serial number"
    )


def called(command: list[str], given: bytes, *, program: str) -> Said:
    """Run a program of this machine to its end; raises ``CannotConnect`` where it is missing, ``LinkLost`` at a time-out."""
    try:
        done = subprocess.run(command, input=given, capture_output=True, timeout=TIMEOUT_S, check=False)
    except FileNotFoundError as error:
        raise CannotConnect(
            f"the program {program} is not installed here; install it and try again"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LinkLost(
            f"{program} got no answer within {TIMEOUT_S:.0f} s; check the cable or the network"
        ) from error
    return Said(done.returncode, done.stdout, done.stderr.decode(errors="replace").strip())


def append(link: Link, name: str, data: bytes) -> None:
    """Add bytes to a file below the root. Raises ``CannotConnect`` with the device's words, e.g. of a full disk."""
    said = link.run(f"cat >> {link.root}/{shlex.quote(name)}", data)
    if said.code != 0:
        raise CannotConnect(
            f"the device could not write: {said.words or said.code}; make room there and try again"
        )


def chunks(file: IO[bytes], offset: int) -> Iterator[bytes]:
    """A file's bytes from an offset on."""
    file.seek(offset)
    while data := file.read(CHUNK):
        yield data
