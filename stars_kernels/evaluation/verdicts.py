"""Each answer against plain sampling's to the same prompt: what a judge says, asked once and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from stars_kernels.data.journal import Journal
from stars_kernels.evaluation.answers import Answer
from stars_kernels.evaluation.judges import UNREADABLE, Judge, JudgeError, Question, key_of

Result = Literal["win", "tie", "loss", "unreadable", "error"]
FIRST: dict[str, Result] = {"first": "win", "second": "loss", "tie": "tie"}
"""What a verdict means to the answer that stands first."""
SECOND: dict[str, Result] = {"first": "loss", "second": "win", "tie": "tie"}
Answers = Mapping[int | str, Answer]
"""By the prompts' ids."""


@dataclass(frozen=True)
class Prompt:
    """What answers are to: as its file has it, and as text."""

    prompt: Any
    text: str


@dataclass(frozen=True)
class Outcome:
    """How an answer came off against plain sampling's.

    result: of a pair that was asked in both orders, a tie where these disagree; "unreadable" or "error" where a verdict
    is missing. flipped: whether the two orders disagree; None where it was not asked in both, or one is missing.
    """

    result: Result
    flipped: bool | None


def judge_all(
    judge: Judge,
    path: Path,
    prompts: Mapping[int | str, Prompt],
    base: Answers,
    rules: Mapping[str, Answers],
    *,
    retry: bool = False,
    progress: bool = True,
) -> dict[str, dict[int | str, Outcome]]:
    """Judge each rule's answers against those of plain sampling, where both are there.

    Verdicts are kept in a journal as they come, and what it has is not asked again, whichever rule it was asked for.
    Two equal texts are a tie, about which no judge of pairs is asked. At the end the journal's rows are in the order of
    rules and prompts; verdicts on answers that are no more stay behind them.

    Args:
        path: of the journal.
        prompts: by their ids, in the order of their file.
        base: plain sampling's answers.
        rules: the other rules' answers, by the rules' names.
        retry: ask those again that failed.

    Raises:
        JudgeError: the judge is away. What it has said is kept.
        OSError: the journal cannot be written; it has whole rows.
    """
    asked = {
        (name, i): _questions(judge, name, i, prompts[i], base[i], answers[i])
        for name, answers in rules.items()
        for i in prompts
        if i in base and i in answers
    }
    unique = dict[str, Question]()
    for questions in asked.values():
        for question in questions:
            unique.setdefault(question.key, question)
    with Journal(path) as journal:
        left = [q for q in unique.values() if q.key not in journal or (retry and q.key in journal.failed)]
        with tqdm(total=len(unique), initial=len(unique) - len(left), desc="judge", unit="verdict",
                  disable=None if progress else True) as bar:  # fmt: skip
            with closing(judge.ask(left)) as verdicts:  # whatever ends this, nothing more is asked
                for question, found in verdicts:
                    row = {"custom_id": question.key, "rule": question.rule, "prompt": question.prompt_id}
                    journal.append({**row, **found})
                    bar.update()
        missing = [key for key in unique if key not in journal]
        if missing:
            raise JudgeError(f"the judge gave no verdict on {len(missing)} of {len(unique)} questions")
        journal.sort([*unique, *(row["custom_id"] for row in journal if row["custom_id"] not in unique)])
        rows = {row["custom_id"]: row for row in journal if row["custom_id"] in unique}
    outcomes = dict[str, dict[int | str, Outcome]]({name: {} for name in rules})
    for (name, i), questions in asked.items():
        outcomes[name][i] = _outcome(judge.pairwise, [rows[question.key] for question in questions])
    return outcomes


def _questions(
    judge: Judge, rule: str, prompt_id: int | str, prompt: Prompt, base: Answer, answer: Answer
) -> list[Question]:
    """Return what to ask about a pair: plain sampling's answer first, and then the other one first."""
    if not judge.pairwise:
        return [
            Question(key_of(judge.identity, prompt.prompt, [one.token_ids]), rule, prompt_id, *_of(prompt), (one,))
            for one in (base, answer)
        ]
    if base.text is None or answer.text is None:
        raise ValueError("an answer has no text, as the model has no tokenizer: a judge of pairs cannot read it")
    if base.text == answer.text:
        return []
    return [
        Question(
            key_of(judge.identity, prompt.text, [first.text, second.text]),
            rule,
            prompt_id,
            *_of(prompt),
            (first, second),
        )
        for first, second in ((base, answer), (answer, base))
    ]


def _of(prompt: Prompt) -> tuple[Any, str]:
    return prompt.prompt, prompt.text


def _outcome(pairwise: bool, rows: Sequence[Mapping[str, Any]]) -> Outcome:
    """Read what was found for a pair."""
    if not rows:
        return Outcome("tie", None)
    if any("error" in row for row in rows):
        return Outcome("error", None)
    if not pairwise:
        base, own = (row["score"] for row in rows)
        return Outcome("win" if own > base else "loss" if own < base else "tie", None)
    if any(row["verdict"] == UNREADABLE for row in rows):
        return Outcome("unreadable", None)
    first, second = (row["verdict"] for row in rows)
    seen = [SECOND[first], FIRST[second]]
    return Outcome(seen[0] if seen[0] == seen[1] else "tie", seen[0] != seen[1])
