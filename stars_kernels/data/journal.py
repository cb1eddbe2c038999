"""A file of JSON lines that grows by whole lines, whatever ends the process that writes it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any


class Journal:
    """Rows of JSON, appended and handed to the operating system one by one.

    A last line that was torn, as where the machine stopped, is cut off when the file is opened. Of rows with one id the
    last counts.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or begin it. Raises ValueError where another line than the last one is not JSON."""
        self.path = path
        self._file = _opened(path)
        try:
            whole = self._mend()
            self.rows: dict[int | str, dict[str, Any]] = {row["custom_id"]: row for row in self._read(whole)}
        except BaseException:
            self._file.close()
            raise

    def _mend(self) -> bytes:
        """Cut off what stands behind the last newline, and return the rest."""
        self._file.seek(0)
        data = self._file.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            self._file.truncate(end)
        return data[:end]

    def _read(self, data: bytes) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(data.splitlines(), 1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or "custom_id" not in row:
                    raise ValueError("it is no object with a custom_id")
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number}, is not a row of a run: {error}") from None
            yield row

    def append(self, row: dict[str, Any]) -> None:
        """Write a row, whole; where that fails, as on a full disk, the file ends with the row before it."""
        end, line = self._file.seek(0, os.SEEK_END), memoryview(to_line(row))
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            self._file.truncate(end)
            raise OSError(
                error.errno, f"{error.strerror} (the {len(self.rows)} rows before are whole)", str(self.path)
            ) from None
        self.rows[row["custom_id"]] = row

    def sort(self, ids: Sequence[int | str]) -> None:
        """Put the rows in the order of these ids, each once, in one step: a kill leaves the old file or the new one."""
        write_whole(self.path, b"".join(to_line(self.rows[i]) for i in ids if i in self.rows))
        self._file.close()
        self._file = _opened(self.path)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _opened(path: Path) -> FileIO:
    return FileIO(path, "ab+")  # without a buffer: what was appended is with the operating system


def to_line(row: dict[str, Any]) -> bytes:
    """Return a row as a line of JSON: text as it is, but what no UTF-8 has is escaped."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return (json.dumps(row) + "\n").encode()


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file in one step."""
    beside = path.with_name(path.name + ".new")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
