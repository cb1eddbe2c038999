"""Files of prompts: what is read, and what is said of a line that holds none."""

import json

import pytest

from stars_kernels.data import BadLine, PromptLine, read_prompts


def read(tmp_path, *rows, name="prompts.jsonl", **options):
    path = tmp_path / name
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return read_prompts(path, **options)


CHAT = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("Hi", (1, "Hi")),
        ({"prompt": "Hi"}, (1, "Hi")),
        ({"prompt": [1, 2], "custom_id": "a"}, ("a", [1, 2])),
        ({"prompt_token_ids": [1, 2], "id": 7}, (7, [1, 2])),
        ({"messages": CHAT, "custom_id": "a", "id": "b"}, ("a", CHAT)),
        ({"prompt": "Hi", "custom_id": None, "id": "b", "label": 3}, ("b", "Hi")),
        (
            {
                "custom_id": "r",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": "m", "messages": CHAT},
            },
            ("r", CHAT),
        ),
    ],
)
def test_forms_of_a_row(tmp_path, row, expected):
    (found,) = read(tmp_path, json.dumps(row) + "\n")
    assert isinstance(found, PromptLine) and (found.id, found.prompt) == expected


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("{", "line 1: Expecting property name"),
        (7, "line 1: it is the number 7, expected a string or an object"),
        (None, "line 1: it is null, expected a string or an object"),
        ({}, "line 1: found nothing, expected one of prompt, messages, prompt_token_ids"),
        ({"text": "Hi"}, "line 1: found text, expected one of prompt, messages"),
        ({"prompt": "Hi", "messages": CHAT}, "line 1: found prompt and messages, expected one of"),
        ({"messages": "Hi"}, "line 1: messages is a string, expected a list"),
        ({"prompt": "Hi", "custom_id": 1.5}, "line 1: custom_id is the number 1.5, expected an integer or a string"),
        ({"prompt": "Hi", "custom_id": True}, "line 1: custom_id is true, expected"),
        ({"custom_id": "r", "body": []}, "line 1: body is a list, expected an object"),
        (
            {"custom_id": "r", "body": {"messages": CHAT, "max_tokens": 5, "n": 2}},
            "line 1: it has max_tokens, n: settings are the call's, expected messages alone",
        ),
        ({"prompt": "Hi", "temperature": 0.5, "label": 3}, "line 1: it has temperature: settings are the call's"),
        ({"prompt": 7}, "line 1: prompt is the number 7, expected a string or a list"),
        ({"prompt": [1, "a"]}, "line 1: prompt is a list with a string in it, expected one of token ids"),
        ({"prompt": [True]}, "line 1: prompt is a list with true in it, expected one of token ids"),
        ({"prompt_token_ids": "Hi"}, "line 1: prompt_token_ids is a string, expected a list"),
        ({"messages": [1, 2]}, "line 1: messages is a list with the number 1 in it, expected one of objects"),
        (
            {"prompt": "Hi", "custom_id": 1 << 5000},
            "line 1: custom_id is an integer of 5001 bits, expected at most 4096",
        ),
    ],
)
def test_a_line_that_holds_no_prompt_is_told_and_the_others_are_read(tmp_path, row, why):
    bad, good = read(tmp_path, row if row == "{" else json.dumps(row), "\n", {"prompt": "Hi"})
    assert isinstance(bad, BadLine) and bad.error.startswith(why)
    assert isinstance(good, PromptLine) and (good.id, good.line) == (2, 2)


def test_lines_of_text(tmp_path):
    rows = read(tmp_path, "\ufeffHi\n", "\n", '{"not": json\n', "  spaces stay \n", name="prompts.txt")
    assert [(row.id, row.prompt) for row in rows] == [(1, "Hi"), (3, '{"not": json'), (4, "  spaces stay ")]


def test_line_ends(tmp_path):
    """Those of Windows end lines too, and those that JSON need not escape do not."""
    text = '"one"\r\n\r\n"t\u2028w\u0085o"\r\n'
    (tmp_path / "p.jsonl").write_bytes(text.encode())
    assert [(row.id, row.prompt) for row in read_prompts(tmp_path / "p.jsonl")] == [(1, "one"), (3, "t\u2028w\u0085o")]
    (tmp_path / "p.txt").write_bytes(b"one\r\ntwo")
    assert [row.prompt for row in read_prompts(tmp_path / "p.txt")] == ["one", "two"]


def test_json_too_deep_is_a_bad_row(tmp_path):
    bad, good = read(tmp_path, "[" * 100_000 + "\n", {"prompt": "Hi"})
    assert isinstance(bad, BadLine) and "line 1" in bad.error and isinstance(good, PromptLine)


def test_a_limit_counts_rows_and_not_lines(tmp_path):
    assert [
        row.id for row in read(tmp_path, "\n", {"prompt": "a"}, "\n", {"prompt": "b"}, {"prompt": "c"}, limit=2)
    ] == [2, 4]


def test_an_id_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"custom_id 'a' is in lines 1 and 3, expected it once"):
        read(tmp_path, {"prompt": "x", "custom_id": "a"}, {"prompt": "y"}, {"prompt": "z", "custom_id": "a"})


def test_what_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'"\xff"\n')
    with pytest.raises(ValueError, match=r"p\.jsonl is not UTF-8"):
        read_prompts(tmp_path / "p.jsonl")


def test_hashes_tell_prompts_apart(tmp_path):
    rows = read(
        tmp_path,
        {"prompt": "a"},
        {"prompt": "b"},
        {"prompt": "a", "custom_id": "x"},
        {"prompt": [97]},
        {"messages": CHAT},
    )
    assert [rows[0].hash == row.hash for row in rows] == [True, False, True, False, False]
