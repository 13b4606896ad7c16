"""Devices by the system's own OpenSSH: its configuration, agent and jump hosts are used, and no secret is held here.

Host keys are pinned in a file of our own beside the catalog, under a name of our own; one that is not pinned, or is another,
ends the connection before anything is said.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from core.devices.link import LinkLost, Said, called
from core.devices.registry import Device, user_file
from core.durable import whole_file
from core.errors import BadInput, CannotConnect

CONNECT_S = 10
_FAILED = 255


def known_hosts() -> Path:
    """The pinned keys, beside the user's devices."""
    return user_file().with_name("known_hosts")


class SshLink:
    """A device whose address is an alias of the user's SSH configuration."""

    root = '"$HOME"/.cache/slimscope'

    def __init__(self, device: Device) -> None:
        self._device = device

    def run(self, command: str, given: bytes = b"") -> Said:
        """One command in one connection."""
        said = called(
            [*_base(self._device, known_hosts(), "yes"), "--", self._device.address, command],
            given,
            program="ssh",
        )
        if said.code == _FAILED:
            raise _explained(self._device, said.words)
        return said


def offered_key(device: Device) -> tuple[str, str]:
    """The key that a device shows now, without logging in: its line for the pinned file, and its fingerprint.

    Raises ``BadInput`` for a device that is not reached by SSH, ``CannotConnect``.
    """
    if device.transport != "ssh":
        raise BadInput(f"{device.slug} is not reached by SSH; only SSH devices have host keys")
    with tempfile.TemporaryDirectory() as scratch:
        seen = Path(scratch) / "seen"
        nobody = ["-o", "PreferredAuthentications=none"]
        said = called(
            [*_base(device, seen, "accept-new"), *nobody, "--", device.address, "true"], b"", program="ssh"
        )
        if not seen.is_file():
            raise _explained(device, said.words)
        told = called(["ssh-keygen", "-l", "-f", str(seen)], b"", program="ssh-keygen").out.decode().split()
        return seen.read_text().splitlines()[0], told[1]


def pin(device: Device, fingerprint: str) -> None:
    """Trust the key that a device shows, if it has this fingerprint. Raises ``CannotConnect`` if it has another."""
    line, found = offered_key(device)
    if found != fingerprint:
        raise CannotConnect(
            f"{device.slug} shows the key {found}, not {fingerprint}; compare with `ssh-keygen -lf` on the device itself"
        )
    path = known_hosts()
    kept = path.read_text().splitlines() if path.is_file() else []
    others = [old for old in kept if not old.startswith(f"{_name(device)} ")]
    with whole_file(path) as part:
        part.write_text("\n".join([*others, line]) + "\n")


def _name(device: Device) -> str:
    return f"slimscope-{device.slug}"


def _base(device: Device, hosts: Path, checking: str) -> list[str]:
    options = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": checking,
        "UserKnownHostsFile": str(hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "HostKeyAlias": _name(device),
        "HashKnownHosts": "no",
        "UpdateHostKeys": "no",
        "CheckHostIP": "no",
        "ConnectTimeout": str(CONNECT_S),
        "ServerAliveInterval": "5",
        "ServerAliveCountMax": "3",
        "ForwardAgent": "no",
        "ClearAllForwardings": "yes",
        "PermitLocalCommand": "no",
        "RequestTTY": "no",
        "LogLevel": "ERROR",
    }
    return ["ssh", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]


def _explained(device: Device, words: str) -> CannotConnect:
    low = words.lower()
    if "identification has changed" in low:
        return CannotConnect(
            f"{device.slug} shows another host key than the one that was pinned: somebody may stand in between, or it was "
            f"set up anew; if that is so, run `slimscope devices trust {device.slug}` and compare the fingerprint"
        )
    if "host key verification failed" in low or "no ed25519 host key is known" in low:
        return CannotConnect(
            f"the host key of {device.slug} is not pinned yet; run `slimscope devices trust {device.slug}`"
        )
    if "permission denied" in low:
        return CannotConnect(
            f"{device.address} refuses every key; `ssh {device.address}` must work without a password (key in the agent "
            "or in ~/.ssh/config)"
        )
    last = words.splitlines()[-1] if words else "the connection broke"
    return LinkLost(
        f"no connection to {device.slug} ({last}); check that it is on and that `ssh {device.address}` works"
    )
