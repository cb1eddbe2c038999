"""A file of JSON lines that grows by whole lines, whatever ends the process that writes it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any


class Journal:
    """Rows of JSON in a file, each an object with a custom_id, handed to the operating system one by one.

    A last line that was torn, as where the process was killed, is cut off when the file is opened. Of rows with one id
    the last counts.

    failed: ids of the rows that have an "error".
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or begin it. Raises ValueError where another line than the last one is not such a row."""
        self.path, self.failed = path, set[int | str]()
        self._lies: dict[int | str, tuple[int, int]] = {}  # first byte and length of each row
        self._file = _opened(path)
        try:
            self._scan()
        except BaseException:
            self._file.close()
            raise

    @property
    def answered(self) -> set[int | str]:
        """The ids of the rows that have no error."""
        return set(self._lies) - self.failed

    def __contains__(self, row_id: object) -> bool:
        return row_id in self._lies

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Read the rows, each id's once, in the order of their first coming."""
        for start, size in list(self._lies.values()):
            yield json.loads(os.pread(self._file.fileno(), size, start))

    def _scan(self) -> None:
        """Note where the rows lie, and cut off what stands behind the last newline."""
        start = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    self._file.truncate(start)
                    return
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict) or "custom_id" not in row:
                        raise ValueError("it is no object with a custom_id")
                except ValueError as error:
                    raise ValueError(f"{self.path}, line {number}, is not a row of a run: {error}") from None
                self._note(row, start, len(line))
                start += len(line)

    def _note(self, row: dict[str, Any], start: int, size: int) -> None:
        self._lies[row["custom_id"]] = (start, size)
        (self.failed.add if "error" in row else self.failed.discard)(row["custom_id"])

    def append(self, row: dict[str, Any]) -> None:
        """Write a row, whole; where that fails, as on a full disk, the file ends with the row before it."""
        start, line = self._file.seek(0, os.SEEK_END), to_line(row)
        left = memoryview(line)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.truncate(start)
            raise OSError(
                error.errno, f"{error.strerror} (the {len(self._lies)} rows before are whole)", str(self.path)
            ) from None
        self._note(row, start, len(line))

    def sort(self, ids: Sequence[int | str]) -> None:
        """Put the rows in the order of these ids, each once, in one step: a kill leaves the old file or the new one."""
        lies = [self._lies[row_id] for row_id in ids if row_id in self._lies]
        write_whole(self.path, (os.pread(self._file.fileno(), size, start) for start, size in lies))
        self._file.close()
        self._file = _opened(self.path)
        self._lies.clear()
        self._scan()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a journal that may be growing."""
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file if line.endswith("\n"))  # else it is being written


def _opened(path: Path) -> FileIO:
    return FileIO(path, "ab+")  # without a buffer: what was appended is with the operating system


def to_line(row: dict[str, Any]) -> bytes:
    """Return a row as a line of JSON: text as it is, but what no UTF-8 has is escaped."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return (json.dumps(row) + "\n").encode()


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Replace a file in one step; where that fails, as on a full disk, it is as it was."""
    beside = path.with_name(path.name + ".new")
    try:
        with beside.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
