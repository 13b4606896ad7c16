"""Uploads are checked, named by content, and cannot name anything else on the disk."""

from __future__ import annotations

import hashlib
import io

import pytest
from PIL import Image

from app import images
from core.errors import BadInput


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path))


def picture(kind: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (10, 200, 30)).save(stream, kind)
    return stream.getvalue()


def test_a_picture_is_kept_under_its_content():
    name = images.keep(picture())
    assert name == hashlib.sha256(picture()).hexdigest() + ".png"
    assert images.keep(picture()) == name
    with open(images.source_of(name), "rb") as file:
        assert file.read() == picture()
    assert images.name_of(images.source_of(name)) == name


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no image"),
        (b"GIF89a", "no image"),
        (b"<svg onload=alert(1)>", "no image"),
        (picture()[:40], "no image"),
        (picture("GIF"), "GIF images are not read"),
        (b"\0" * (images.LIMIT_BYTES + 1), "is the most"),
    ],
)
def test_what_is_no_picture_is_refused(content, words):
    with pytest.raises(BadInput, match=words):
        images.keep(content)


def test_too_many_pixels_are_refused(monkeypatch):
    monkeypatch.setattr(images, "LIMIT_PIXELS", 63)
    with pytest.raises(BadInput, match="8×8 pixels"):
        images.keep(picture())


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "digits:x", "", "a" * 64 + ".png", "x" * 500]
)
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(BadInput, match="there is no image"):
        images.source_of(name)


def test_a_row_of_the_digits_stays_as_it_is():
    assert images.source_of("digits:7") == images.name_of("digits:7") == "digits:7"
