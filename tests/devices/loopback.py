"""A device without hardware: a real sshd on loopback with a home of its own, and a shim in place of ``adb`` (labelled so)."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from core.devices.registry import Device, published

SSHD = next((str(p) for p in map(Path, ("/usr/sbin/sshd", "/usr/local/sbin/sshd")) if p.is_file()), None)


def executable(path: Path, text: str) -> Path:
    """Write a shell script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def own(transport: str, address: str, python: str = sys.executable) -> Device:
    """A registry's device that is reached at an address."""
    base = published()["raspberry-pi-5-8gb"]
    return replace(base, slug="loop", transport=transport, address=address, python=python, power_mode="")  # type: ignore[arg-type]


@dataclass
class Loopback:
    """One sshd, and the ssh on PATH that uses its configuration file."""

    folder: Path
    port: int
    server: subprocess.Popen[bytes]
    device: Device

    @property
    def home(self) -> Path:
        """The device's home folder."""
        return self.folder / "home"

    @property
    def root(self) -> Path:
        """Where ours lies on the device."""
        return self.home / ".cache" / "slimscope"

    def stop(self) -> None:
        """End the server and its connections, as a pulled cable does."""
        subprocess.run(["pkill", "-KILL", "-P", str(self.server.pid)], check=False)
        self.server.kill()
        self.server.wait()

    def start(self) -> None:
        """Bring the server (again) up on the same port."""
        self.server = _serve(self.folder, self.port)

    def new_key(self) -> None:
        """Another host key, as after a machine was set up anew."""
        self.stop()
        for old in self.folder.glob("host_key*"):
            old.unlink()
        _key(self.folder / "host_key")
        self.start()


def loopback(folder: Path, bin_: Path) -> Loopback:
    """Start an sshd; ``bin_`` gets the ``ssh`` that reads the configuration of this test alone."""
    (folder / "home").mkdir(parents=True)
    for name in ("host_key", "user_key"):
        _key(folder / name)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    executable(
        folder / "as_device", f'export HOME={folder}/home\ncd "$HOME"\nexec sh -c "$SSH_ORIGINAL_COMMAND"'
    )
    (folder / "config").write_text(
        f"Host loop\n  HostName 127.0.0.1\n  Port {port}\n  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n"
    )
    executable(bin_ / "ssh", f'exec {shutil.which("ssh", path="/usr/bin:/bin")} -F {folder}/config "$@"')
    return Loopback(folder, port, _serve(folder, port), own("ssh", "loop"))


def _key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _serve(folder: Path, port: int) -> subprocess.Popen[bytes]:
    assert SSHD is not None
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    options = {
        "ListenAddress": "127.0.0.1", "HostKey": folder / "host_key", "AuthorizedKeysFile": folder / "authorized_keys",
        "StrictModes": "no", "UsePAM": "no", "PasswordAuthentication": "no", "PidFile": "none",
        "PermitRootLogin": "prohibit-password", "ForceCommand": folder / "as_device",
    }  # fmt: skip
    told = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    log = (folder / "sshd.log").open("ab")
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", "/dev/null", "-p", str(port), *told], stderr=log)
    for _ in range(100):
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return server
        time.sleep(0.05)
    raise AssertionError((folder / "sshd.log").read_text())


SHIM = """# A shim, not adb: runs the commands of `adb -s SERIAL shell -T COMMAND` on this machine.
[ "$2" = {serial} ] || {{ echo "error: device '$2' not found" >&2; exit 1; }}
exec sh -c "$(printf %s "$5" | sed 's#/data/local/tmp/slimscope#{root}#g')\""""


def adb_shim(bin_: Path, root: Path, serial: str = "SHIM01") -> Device:
    """A shim called adb that knows one serial number."""
    executable(bin_ / "adb", SHIM.format(serial=serial, root=root))
    return own("adb", serial)
