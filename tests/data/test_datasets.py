"""Prompts by name: of rows in the layout in which the data sets are published."""

import sys

import pytest

from stars_kernels.data import datasets as datasets_module
from stars_kernels.data import load_prompts

datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")

TALK = "\n\nHuman: Hi\n\nAssistant: Hello.\nHow are you?\n\nHuman: Fine: and you?\n\nAssistant:"
ROWS = {
    "Anthropic/hh-rlhf": {"chosen": [TALK + " Well."], "rejected": [TALK + " Go away."]},
    "declare-lab/HarmfulQA": {
        "id": [1], "topic": ["Science"], "subtopic": ["Optics"], "question": ["What is light?"],
        "blue_conversations": [{}], "red_conversations": [{}],
    },
    "stanfordnlp/imdb": {"text": ["One two three<br /><br />four five six seven eight nine ten eleven."], "label": [1]},
}  # fmt: skip


@pytest.fixture
def published(monkeypatch):
    """The data sets, each of one row; a list of what is asked for."""
    asked = []

    def load(path, split):
        asked.append((path, split))
        columns = {name: values for name, values in ROWS[path].items() if values != [{}]}
        return datasets.Dataset.from_dict(columns)

    monkeypatch.setattr(datasets, "load_dataset", load)
    datasets_module._named.cache_clear()
    yield asked
    datasets_module._named.cache_clear()


def prompt(name):
    (line,) = load_prompts(name)
    return line.id, line.prompt


def test_conversations(published):
    assert prompt("hh-rlhf-text") == ("hh-rlhf-0", TALK)
    turns = [("user", "Hi"), ("assistant", "Hello.\nHow are you?"), ("user", "Fine: and you?")]
    assert prompt("hh-rlhf") == ("hh-rlhf-0", [{"role": role, "content": content} for role, content in turns])
    assert published == [("Anthropic/hh-rlhf", "test")] * 2
    load_prompts("hh-rlhf")
    assert len(published) == 2  # it is in memory


def test_questions_and_reviews(published):
    assert prompt("harmfulqa") == ("harmfulqa-0", [{"role": "user", "content": "What is light?"}])
    assert prompt("harmfulqa-text") == ("harmfulqa-0", "What is light?")
    assert prompt("imdb") == ("imdb-0", "One two three four five six seven eight nine ten")
    assert set(published) == {("declare-lab/HarmfulQA", "train"), ("stanfordnlp/imdb", "test")}


def test_builtin():
    chats, texts = load_prompts("builtin"), load_prompts("builtin-text")
    assert len(chats) == len(texts) == 40 == len({line.prompt for line in texts})
    for chat, text in zip(chats, texts, strict=True):
        assert chat.prompt == [{"role": "user", "content": text.prompt}] and chat.id == text.id
    assert load_prompts("builtin", 3) == chats[:3]


def test_a_file_of_that_name_goes_first(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imdb").write_text('"mine"\n')
    assert prompt("imdb") == (1, "mine") and not published


def test_no_such_name():
    with pytest.raises(FileNotFoundError, match=r"expected a file, or one of builtin, hh-rlhf, .*: 'hh-rlfh'"):
        load_prompts("hh-rlfh")


def test_without_a_network(published, monkeypatch):
    def away(path, split):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", away)
    with pytest.raises(ConnectionError, match=r"'imdb' \(stanfordnlp/imdb .*Couldn't reach the Hub.* give a file of"):
        load_prompts("imdb")


def test_without_the_library(published, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("stars_kernels.extras.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"datasets is not installed: pip install 'stars-kernels\[eval\]'"):
        load_prompts("imdb")
