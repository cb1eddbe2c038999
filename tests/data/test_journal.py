"""A journal has whole rows, wherever its writer was stopped."""

import errno
import json
import random

import pytest

from stars_kernels.data import journal as journal_module
from stars_kernels.data.journal import Journal, to_line


def rows(count):
    return [{"custom_id": i if i % 3 else f"r{i}", "text": "ü\n\u2028" * i, "n": i / 7} for i in range(count)]


def test_rows_come_back(tmp_path):
    with Journal(tmp_path / "j") as journal:
        for row in rows(9):
            journal.append(row)
    with Journal(tmp_path / "j") as journal:
        assert list(journal) == rows(9)
        journal.append({"custom_id": 1, "text": "again"})
    with Journal(tmp_path / "j") as journal:  # the last row of an id counts
        assert {"custom_id": 1, "text": "again"} in list(journal) and len(list(journal)) == 9


def test_every_torn_tail_is_cut_off(tmp_path):
    whole, path = b"".join(map(to_line, rows(6))), tmp_path / "j"
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        with Journal(path) as journal:
            count = whole[:end].count(b"\n")
            assert list(journal) == rows(6)[:count]
            journal.append({"custom_id": "new"})
        assert [json.loads(line) for line in path.read_bytes().splitlines()] == [*rows(6)[:count], {"custom_id": "new"}]


def test_a_line_in_the_middle_that_is_no_row_is_refused(tmp_path):
    for bad in (b"{\n", b"[]\n", b'{"text": "x"}\n', b"\xff\n"):
        (tmp_path / "j").write_bytes(to_line(rows(2)[0]) + bad + to_line(rows(2)[1]))
        with pytest.raises(ValueError, match=r"j, line 2, is not a row of a run"):
            Journal(tmp_path / "j")


class Full(journal_module.FileIO):
    """A file on a disk with room for so many bytes more."""

    room = 0

    def write(self, data):
        taken = min(len(data), type(self).room, 7)  # a few at a time
        type(self).room -= taken
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(bytes(data[:taken]))


def test_a_full_disk_leaves_whole_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "FileIO", Full)
    rng = random.Random(0)
    for case in range(60):
        path, written = tmp_path / f"j{case}", []
        Full.room = rng.randint(0, 150)
        with Journal(path) as journal, pytest.raises(OSError, match=r"No space left on device \(the \d+ rows before"):
            for row in rows(20):
                journal.append(row)
                written.append(row)
        assert path.read_bytes() == b"".join(map(to_line, written))
        Full.room = 10_000
        with Journal(path) as journal:  # there is room again
            journal.append(rows(20)[len(written)])
        assert path.read_bytes() == b"".join(map(to_line, rows(20)[: len(written) + 1]))


def test_what_failed_is_known(tmp_path):
    with Journal(tmp_path / "j") as journal:
        for row in (
            {"custom_id": 1, "error": "x"},
            {"custom_id": "1"},
            {"custom_id": 2, "error": "x"},
            {"custom_id": 2},
        ):
            journal.append(row)
        assert journal.failed == {1} and "1" in journal and 1 in journal and 3 not in journal
    with Journal(tmp_path / "j") as journal:
        assert journal.failed == {1} and len(list(journal)) == 3


def test_half_a_surrogate_pair(tmp_path):
    with Journal(tmp_path / "j") as journal:
        journal.append({"custom_id": 1, "text": "\ud83d"})
    with Journal(tmp_path / "j") as journal:
        assert [row["text"] for row in journal] == ["\ud83d"]


def test_sorted_in_one_step(tmp_path, monkeypatch):
    with Journal(tmp_path / "j") as journal:
        for row in rows(5):
            journal.append(row)
        order = [row["custom_id"] for row in reversed(rows(5))]
        with monkeypatch.context() as patch, pytest.raises(OSError, match="broken"):
            patch.setattr(journal_module.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("broken")))
            journal.sort(order)
        assert (tmp_path / "j").read_bytes() == b"".join(map(to_line, rows(5)))
        journal.sort([*order, "unknown"])
        journal.append({"custom_id": "last"})
    assert (tmp_path / "j").read_bytes() == b"".join(map(to_line, [*reversed(rows(5)), {"custom_id": "last"}]))
