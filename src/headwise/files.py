"""Files: a path -> its text, or one line that says why it has none; and files that appear whole or not at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headwise.errors import FileWriteError, InputError


def read_text(file: str | Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        InputError: when it cannot be read, is empty or is no UTF-8 text.
    """
    return decode_text(read_bytes(file), repr(str(file)))


def read_bytes(file: str | Path) -> bytes:
    """What a file holds.

    Raises:
        InputError: when it cannot be read.
    """
    name = repr(str(file))
    try:
        with open(file, "rb") as stream:
            return stream.read()
    except FileNotFoundError:
        raise InputError(f"there is no file {name}") from None
    except IsADirectoryError:
        raise InputError(f"{name} is a folder, not a file") from None
    except (OSError, ValueError) as error:
        # ValueError: a name with a null character.
        raise InputError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from error


def decode_text(data: bytes, name: str) -> str:
    """Bytes as UTF-8 text.

    Args:
        name: of where they come from, for the complaint.

    Raises:
        InputError: when there are none, or they are no text.
    """
    try:
        # Some editors begin a file with a byte order mark, which is no part of the text.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start:,})") from None
    if not text.strip():
        raise InputError(f"{name} is empty")
    return text


@contextmanager
def whole_file(target: Path, what: str = "") -> Iterator[Path]:
    """A place to write to beside the target, which takes its name when the block ends without an error.

    So whoever looks finds the old file or the new one, never a part. It has the permissions that any new file gets.

    Args:
        what: is written, such as "a picture": a failure then becomes a complaint of ours, and else stays an OSError.

    Raises:
        FileWriteError: when it cannot be written and `what` is given.
    """
    # No other process writes to it, and no other thread.
    scratch = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        yield scratch
        os.replace(scratch, target)
    except OSError as error:
        if not what:
            raise
        raise FileWriteError(f"cannot write {what} to {str(target)!r}: {error.strerror or error}") from error
    finally:
        scratch.unlink(missing_ok=True)


def check_target_file(path: str | Path, what: str) -> Path:
    """Where a file will be written, looked at before any work is done for it.

    Args:
        what: it is, for complaints.

    Raises:
        InputError: when no file can be written there.
    """
    if str(path) == "-":
        raise InputError(f"{what} needs the name of a file; it cannot go to standard output")
    # The file behind a link is what should change, not the link.
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise InputError(f"cannot write {what} to {str(path)!r}: it is not a file")
    if not target.parent.is_dir():
        raise InputError(f"cannot write {what} to {str(path)!r}: there is no folder {str(target.parent)!r}")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {what} to {str(path)!r}: the folder is not writable")
    return target


def write_text(target: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all.

    Raises:
        InputError: when it cannot be written.
    """
    with whole_file(target, "text") as scratch:
        scratch.write_text(text, encoding="utf-8")
