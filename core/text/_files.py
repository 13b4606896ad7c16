"""Reading a user's text file, or refusing it in one sentence. Knows nothing about what the text is for."""

from __future__ import annotations

from pathlib import Path

from core.errors import BadInput


def read_text(path: Path, what: str) -> str:
    """The UTF-8 text of ``path``, byte order mark dropped, line ends made ``\\n``.

    ``what`` names the file's role in messages. Raises ``BadInput`` for a missing file, a folder, unreadable
    or empty content, and non-UTF-8 bytes (naming the offset of the first).
    """
    if path.is_dir():
        raise BadInput(f"{what} {path} is a folder; give one file")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadInput(f"{what} {path} does not exist; check the path") from None
    except OSError as error:
        raise BadInput(f"{what} {path} cannot be read ({error.strerror}); check its permissions") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # utf-8-sig counts from behind the byte order mark; the reader's editor counts from the file's start.
        offset = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        raise BadInput(
            f"{what} {path} is not UTF-8: byte 0x{data[offset]:02x} at offset {offset}; save it as UTF-8"
        ) from None
    if not text.strip():
        raise BadInput(f"{what} {path} is empty; give a file with text in it")
    return text.replace("\r\n", "\n").replace("\r", "\n")
