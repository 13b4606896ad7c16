"""The registry: every published entry reads, the user's file lies over it, and wrong entries name device and field."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.devices.registry import PUBLISHED, device, devices, published, user_file, write_user_file
from core.errors import BadInput


def test_every_published_device_is_plausible():
    found = published()
    assert len(found) >= 45
    for slug, one in found.items():
        assert one.source, slug
        assert 0 < one.usable_bytes <= one.ram_bytes, slug
        assert bool(one.engines) <= (one.bandwidth is not None), (
            f"{slug} is predicted for without a bandwidth"
        )
        assert not one.own
        assert not one.address
        if one.fp16 and one.fp32:
            assert one.fp16 >= one.fp32, slug
    orin, super_ = found["jetson-orin-nano"], found["jetson-orin-nano-super"]
    assert (orin.bandwidth, super_.bandwidth) == (68e9, 102e9)  # one chip in two power modes
    assert found["raspberry-pi-5-8gb"].usable_bytes == round(6.8 * 2**30)


def test_own_devices_lie_over_the_published_ones(tmp_path: Path):
    file = tmp_path / "devices.yaml"
    write_user_file(
        "my-pi:\n  like: raspberry-pi-5-8gb\n  name: The one on my desk\n  usable_gib: 5\n  transport: ssh\n"
        "  address: pi\nrtx-3090:\n  usable_gib: 20\n",
        file,
    )
    found = devices(file)
    assert found["my-pi"].own
    assert found["my-pi"].usable_bytes == 5 << 30
    assert found["my-pi"].bandwidth == published()["raspberry-pi-5-8gb"].bandwidth
    assert found["rtx-3090"].usable_bytes == 20 << 30
    assert found["rtx-3090"].bandwidth == published()["rtx-3090"].bandwidth
    assert set(found) == {*published(), "my-pi"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: {like: nothing}", "not a published device"),
        ("a: [", "not YAML"),
        ("- a\n- b", "name"),
        ("a: {name: x}", "device a: "),
        ("a: {like: rtx-3090, bandwidth_gb_s: -1}", "bandwidth_gb_s"),
        ("a: {like: rtx-3090, password: secret}", "password"),
        ("my-pi: {like: raspberry-pi-5-8gb, transport: ssh}", "needs an address"),
        ("my-pi: {like: raspberry-pi-5-8gb, transport: ssh, address: '-oProxyCommand=x'}", "address"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_a_wrong_file_is_refused_and_the_old_one_stays(tmp_path: Path, text: str, said: str):
    file = tmp_path / "devices.yaml"
    good = "my-pi:\n  like: raspberry-pi-5-8gb\n"
    write_user_file(good, file)
    with pytest.raises(BadInput, match=said):
        write_user_file(text, file)
    assert file.read_text() == good
    file.write_text(text)
    with pytest.raises(BadInput, match=said):
        devices(file)


def test_no_file_is_the_published_table(tmp_path: Path):
    assert devices(tmp_path / "none.yaml") == published()


def test_a_wrong_name_gets_close_ones(tmp_path: Path):
    with pytest.raises(BadInput, match="raspberry-pi-5-8gb"):
        device("raspberry-pi-5", tmp_path / "none.yaml")


def test_the_users_file_lies_beside_the_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLIMSCOPE_CATALOG", f"sqlite:///{tmp_path / 'catalog.sqlite'}")
    assert user_file() == tmp_path / "devices.yaml"
    assert PUBLISHED.is_file()
