"""Texts of attempts: what each adds to the answer, whole characters only."""

from stars_kernels.data.texts import attempt_texts
from tests.tiny import EOS, byte_tokenizer


def segment(*tokens, chosen=0):
    return {"tokens": [list(some) for some in tokens], "chosen": chosen}


def test_characters_belong_to_the_segment_that_ends_them():
    tokenizer = byte_tokenizer()

    def ids(text):
        return tokenizer(text)["input_ids"]

    half, rest = ids("é")[:1], ids("é")[1:]
    found = attempt_texts(
        tokenizer,
        [
            segment(ids("no"), [*ids("yes "), *half], chosen=1),
            segment([*rest, *ids(" more")], [*rest, *ids("!")], ids("x"), chosen=0),
            segment([*ids(" and more than eight tokens"), EOS]),
        ],
    )
    assert found == [["no", "yes "], ["é more", "é!", "\ufffdx"], [" and more than eight tokens"]]
    assert attempt_texts(tokenizer, []) == []


class Tidy:
    """A tokenizer that takes out the space before a comma; the space is a token of its own."""

    words = ("one", " ", ",", " two")

    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return "".join(self.words[token] for token in tokens).replace(" ,", ",")


def test_a_tokenizer_that_tidies_up():
    assert attempt_texts(Tidy(), [segment([0, 1]), segment([2, 3], [3])]) == [["one "], [", two", " two"]]
