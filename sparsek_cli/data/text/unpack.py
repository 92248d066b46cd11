"""Bytes of a file, unpacked where it is a .zst."""

import io
from pathlib import Path
from typing import BinaryIO

from sparsek_cli.errors import UsageError

# Packed bytes unpacked at once: of a run of one byte they become 32,000 times as many.
_PIECE = 1 << 12
PACKED = ".zst"


def is_packed(path: Path) -> bool:
    """Whether a file is called a .zst."""
    return path.suffix.lower() == PACKED


def open_bytes(path: Path) -> BinaryIO:
    """Opens a file to be read from its beginning to its end.

    While it is read, a .zst that is none, or of which the end is missing, raises UsageError.

    Raises:
        OSError: it cannot be opened.
    """
    if not is_packed(path):
        return path.open("rb")
    return io.BufferedReader(_Unpacked(path), buffer_size=1 << 20)


class _Unpacked(io.RawIOBase):
    """A .zst, frame by frame.

    zstandard's own stream ends quietly where a file does, in the midst of a frame too: what was
    fetched halfway would pass for the whole.
    """

    def __init__(self, path: Path):
        import zstandard

        self._path, self._file = path, path.open("rb")
        self._zstd = zstandard.ZstdDecompressor()
        self._error = zstandard.ZstdError
        self._frame = None  # being read
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            piece = self._file.read(_PIECE)
            if not piece:
                if self._frame is not None:
                    raise UsageError(
                        f"{self._path} is cut short: its last frame has no end",
                        hint="fetch it again",
                    )
                return 0
            self._ready = memoryview(self._unpack(piece))
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _unpack(self, piece: bytes) -> bytes:
        unpacked = []
        try:
            while piece:
                self._frame = self._frame or self._zstd.decompressobj()
                unpacked.append(self._frame.decompress(piece))
                piece = self._frame.unused_data if self._frame.eof else b""
                self._frame = None if self._frame.eof else self._frame
        except self._error as error:
            raise UsageError(
                f"{self._path} is not a readable .zst file: {error}", hint="fetch it again"
            ) from error
        return b"".join(unpacked)

    def close(self) -> None:
        self._file.close()
        super().close()
