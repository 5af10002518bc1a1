"""Datasets: what a row is, which rows repeat others, where each belongs."""

from __future__ import annotations

import io
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.datasets import (
    SPLITS,
    DatasetLimits,
    Format,
    Verdict,
    assign_rows,
    judge_rows,
    measure,
    read_rows,
    scan_rows,
    stratum,
)
from hocket.datasets import statistics as measuring
from hocket.datasets.rows import file_digest, row_at
from hocket.datasets.similarity import Fingerprint, NearIndex, jaccard, normalise
from hocket.datasets.writing import writing
from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable

LIMITS = DatasetLimits(line_bytes=200, depth=4, values=20, messages=4, rows=5)
PROMPT = {"prompt": "how many?", "completion": "two"}
ASKED = {"role": "user", "content": "how many?"}
SAID = {"role": "assistant", "content": "two"}
WORDS = [
    "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=6)) for seed in range(400)
]  # pairwise unlike


def row(question: str, answer: str = "yes", **more: Any) -> dict[str, Any]:
    return {"prompt": question, "completion": answer, **more}


def unlike(number: int) -> str:
    """A question that is like no other."""
    return " ".join(random.Random(number).sample(WORDS, 8))


def written(path: Path, *lines: Any, end: str = "\n") -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + end for text in texts))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def refusal(path: Path, limits: DatasetLimits = LIMITS) -> HocketError:
    [refused] = [each for each in scan_rows(path, limits=limits) if isinstance(each, HocketError)]
    return refused


class TestRows:
    def test_a_prompt_and_its_completion_are_a_question_and_its_answer(self, file: Path) -> None:
        [found] = read_rows(written(file, {**PROMPT, "kind": "count"}))
        assert (found.format, found.question, found.answer) == (Format.PROMPT, (ASKED,), "two")
        assert (found.line, found.offset_bytes, found.asked) == (1, 0, "how many?")
        assert stratum(found, "kind") == "count"

    def test_a_conversation_is_all_but_its_last_turn_and_that(self, file: Path) -> None:
        system = {"role": "system", "content": "be short"}
        [found] = read_rows(written(file, {"messages": [system, ASKED, SAID], "n": [1]}))
        assert (found.format, found.question, found.answer) == (Format.MESSAGES, (system, ASKED), "two")
        assert (found.asked, stratum(found, "n")) == ("be short\nhow many?", "[1]")

    def test_plain_text_asks_nothing(self, file: Path) -> None:
        [found] = read_rows(written(file, {"text": "once"}))
        assert (found.format, found.question, found.answer, found.asked) == (Format.TEXT, (), "", "once")

    def test_rows_are_read_again_from_where_they_were(self, file: Path) -> None:
        written(file, {"text": "é" * 50}, {"text": "two"}, end="\r\n")
        for found in read_rows(file):
            assert row_at(file, found.offset_bytes, found.line) == found
        with pytest.raises(HocketError, match="line 2"):
            row_at(file, 3, 2)
        with pytest.raises(HocketError, match="is no file"):
            row_at(file.parent, 0, 1)

    def test_the_last_line_needs_no_end(self, file: Path) -> None:
        assert len(list(read_rows(written(file, PROMPT, end="")))) == 1

    def test_a_row_without_the_key_of_the_strata_is_refused(self, file: Path) -> None:
        [found] = read_rows(written(file, PROMPT))
        with pytest.raises(HocketError, match="line 1 has no 'kind'") as refused:
            stratum(found, "kind")
        assert (refused.value.reason, refused.value.metadata["line"]) == (Reason.BAD_DATASET, "1")

    @pytest.mark.parametrize(
        ("line", "reason", "what", "twin"),
        [
            ('{"text": "a", "text": "b"}', Reason.BAD_JSON, "occurs twice", '{"text": "a", "Text": "b"}'),
            ('{"text": NaN}', Reason.BAD_JSON, "NaN", '{"text": "NaN"}'),
            ('{"text": "\\ud800"}', Reason.BAD_JSON, "surrogate", '{"text": "\\ud83d\\ude00"}'),
            ("[1]", Reason.BAD_DATASET, "no JSON object", '{"text": "[1]"}'),
            ("", Reason.BAD_DATASET, "is empty", '{"text": "x"}'),
            ('{"q": "x"}', Reason.BAD_DATASET, "has none of them", '{"q": "x", "text": "x"}'),
            ('{"text": "x", "prompt": "y"}', Reason.BAD_DATASET, "'prompt' and 'text'", '{"text": "x", "Prompt": "y"}'),
            ('{"prompt": "x"}', Reason.BAD_DATASET, "'completion' is missing", '{"prompt": "x", "completion": "y"}'),
            ('{"text": 1}', Reason.BAD_DATASET, "'text' is no text", '{"text": "1"}'),
            ('{"text": " \\n"}', Reason.BAD_DATASET, "'text' is empty", '{"text": " \\n."}'),
            ('{"text": [[[[]]]]}', Reason.TOO_LARGE, "nested", '{"text": "x", "n": [[[]]]}'),
            ('{"text": "x", "n": [' + "1," * 18 + "1]}", Reason.TOO_LARGE, "values", '{"text": "x", "n": [1, 1]}'),
            ('{"text": "' + "x" * 189 + '"}', Reason.TOO_LARGE, "longer than 200", '{"text": "' + "x" * 188 + '"}'),
            ('{"text": "' + "x" * 99_999 + '"}', Reason.TOO_LARGE, "longer than 200", '{"text": "x"}'),
        ],
    )
    def test_what_is_no_row_is_refused_by_its_line(
        self, file: Path, line: str, reason: Reason, what: str, twin: str
    ) -> None:
        refused = refusal(written(file, {"text": "first"}, line, {"text": "last"}))
        assert (refused.reason, refused.metadata["line"]) == (reason, "2")
        assert refused.message.startswith("rows.jsonl, line 2: ")
        assert what in refused.message
        [first, second] = read_rows(
            written(file, {"text": "first"}, twin) if "prompt" not in line else alone(file, twin)
        )
        assert (first.line, second.line) == (1, 2)

    def test_lines_after_one_that_is_refused_are_read_where_they_are(self, file: Path) -> None:
        written(file, {"text": "first"}, "x" * 99_999, {"text": "last"})
        first, _, last = scan_rows(file, limits=LIMITS)
        assert not isinstance(first, HocketError)
        assert not isinstance(last, HocketError)
        assert row_at(file, last.offset_bytes, last.line) == last

    @pytest.mark.parametrize(
        ("messages", "what"),
        [
            ("x", "no list"),
            ([ASKED, SAID] * 3, "at most 4"),
            ([ASKED, {**SAID, "name": "x"}], "message 1: it must have"),
            ([ASKED, "x"], "message 1: it must have"),
            ([{**ASKED, "role": "boss"}, SAID], "the role 'boss' is none"),
            ([{**ASKED, "role": ["user"]}, SAID], "is none"),
            ([ASKED, {**ASKED, "role": "system"}, SAID], "message 1: the system speaks first"),
            ([{**ASKED, "content": ""}, SAID], "message 0: 'content' is empty"),
            ([SAID], "the last word"),
            ([], "the last word"),
            ([SAID, ASKED], "the last word"),
        ],
    )
    def test_a_conversation_that_cannot_be_learnt_is_refused(self, file: Path, messages: Any, what: str) -> None:
        refused = refusal(written(file, {"messages": messages}), DatasetLimits(messages=4))
        assert refused.reason is Reason.BAD_DATASET
        assert what in refused.message

    def test_a_file_is_of_one_format(self, file: Path) -> None:
        refused = refusal(written(file, {"text": "x"}, PROMPT, {"text": "y"}))
        assert "one format a file" in refused.message
        assert refused.metadata["line"] == "2"

    def test_bytes_that_are_no_utf_8_are_refused(self, file: Path) -> None:
        file.write_bytes(b'{"text": "\xff"}\n')
        assert (refusal(file).reason, refusal(file).metadata["line"]) == (Reason.BAD_JSON, "1")

    def test_only_so_many_lines_are_read(self, file: Path) -> None:
        assert len(list(read_rows(written(file, *[{"text": "x"}] * 5), limits=LIMITS))) == 5
        *rows, last = scan_rows(written(file, *[{"text": "x"}] * 9), limits=LIMITS)
        assert len(rows) == 5
        assert isinstance(last, HocketError)
        assert last.reason is Reason.TOO_LARGE

    def test_an_empty_file_has_no_rows(self, file: Path) -> None:
        file.touch()
        assert refusal(file).reason is Reason.BAD_DATASET
        with pytest.raises(HocketError, match="the file is empty"):
            list(read_rows(file))

    @pytest.mark.parametrize("reads", [lambda path: list(read_rows(path)), file_digest])
    def test_what_is_no_file_is_not_read(self, tmp_path: Path, reads: Callable[[Path], object]) -> None:
        os.mkfifo(tmp_path / "pipe")  # which nobody writes
        for path, what in (
            (tmp_path / "none", "No such file"),
            (tmp_path / "nul\0", "null byte"),
            (tmp_path, "is no file"),
            (tmp_path / "pipe", "is no file"),
            (Path("/dev/zero"), "is no file"),
        ):
            with pytest.raises(HocketError, match=what) as refused:
                reads(path)
            assert refused.value.reason is Reason.BAD_REQUEST
        with pytest.raises(HocketError, match="cannot read /proc/self/mem"):  # a file, of which nothing can be read
            reads(Path("/proc/self/mem"))

    def test_a_file_is_not_opened_beyond_its_limit(self, file: Path) -> None:
        written(file, {"text": "x"}, {"text": "y"})
        whole = file.stat().st_size
        assert len(list(read_rows(file, limits=replace(LIMITS, file_bytes=whole)))) == 2
        with pytest.raises(HocketError, match="divide it") as refused:
            list(read_rows(file, limits=replace(LIMITS, file_bytes=whole - 1)))
        assert refused.value.reason is Reason.TOO_LARGE

    def test_the_digest_is_that_of_its_bytes(self, file: Path) -> None:
        file.write_bytes(b"abc")
        assert file_digest(file) == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

    def test_progress_is_told_in_bytes(self, file: Path) -> None:
        told: list[tuple[int, int]] = []
        list(read_rows(written(file, *[{"text": "x"}] * 600), on_progress=lambda *each: told.append(each)))
        assert told == [(255 * 14, 8400), (511 * 14, 8400), (8400, 8400)]

    def test_a_failure_of_who_is_told_stays_what_it_is(self, file: Path) -> None:
        def closed(_done: int, _total: int) -> None:
            raise BrokenPipeError

        with pytest.raises(BrokenPipeError):
            list(read_rows(written(file, {"text": "x"}), on_progress=closed))

    @settings(deadline=None, max_examples=50)
    @given(st.binary(max_size=300))
    def test_hostile_bytes_are_rows_or_refusals(self, tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
        path = tmp_path_factory.getbasetemp() / "hostile.jsonl"
        path.write_bytes(data)
        found = list(scan_rows(path, limits=LIMITS))
        assert found
        assert all(each.metadata["line"] for each in found if isinstance(each, HocketError))


def alone(path: Path, line: str) -> Path:
    return written(path, line, line)


class TestSimilarity:
    @settings(deadline=None, max_examples=30)
    @given(st.text(max_size=60), st.text(max_size=60))
    def test_the_index_is_that_of_the_sets_of_five_characters(self, a: str, b: str) -> None:
        def windows(text: str) -> set[str]:
            text = text.ljust(5, "\0")
            return {text[place : place + 5] for place in range(len(text) - 4)}

        a, b = (normalise(text).encode(errors="ignore").decode() for text in (a, b))
        expected = len(windows(a) & windows(b)) / len(windows(a) | windows(b))
        assert jaccard(Fingerprint.of(a).shingles, Fingerprint.of(b).shingles) == pytest.approx(expected)

    def test_signatures_agree_as_often_as_the_sets_are_alike(self) -> None:
        for seed in range(5):
            words = random.Random(seed).sample(WORDS, 200)
            a, b = Fingerprint.of(" ".join(words)), Fingerprint.of(" ".join(words[:150]))
            assert np.mean(a.signature == b.signature) == pytest.approx(jaccard(a.shingles, b.shingles), abs=0.2)

    def test_a_text_of_many_blocks_has_the_least_of_all(self) -> None:
        words = [f"{word}{number}" for number in range(20) for word in WORDS]
        whole, half = (Fingerprint.of(" ".join(part)).signature for part in (words, words[:4000]))
        assert (whole <= half).all()

    def test_candidates_are_those_that_are_alike_and_of_the_same_kind(self) -> None:
        index = NearIndex(0.8)
        texts = [" ".join(random.Random(number).sample(WORDS, 40)) for number in range(50)]
        for number, text in enumerate(texts):
            index.add(number, Fingerprint.of(text, b"k"))
        assert index.candidates(Fingerprint.of(texts[7] + "s", b"k")) == [7]
        assert index.candidates(Fingerprint.of(texts[7] + "s", b"l")) == []

    @pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9, 1.0])
    def test_the_same_text_is_found_at_every_threshold(self, threshold: float) -> None:
        index = NearIndex(threshold)
        index.add(1, Fingerprint.of("the same text"))
        assert index.candidates(Fingerprint.of("the same text")) == [1]


class TestDuplicates:
    def test_the_first_of_those_that_are_the_same_stays(self, file: Path) -> None:
        written(
            file,
            row("How  many?"),
            row("how many?", id=2),
            row("how many?", "no"),
            row("\uff48\uff4f\uff57 many?", "YES "),
        )
        assert [(each.verdict, each.first_line) for each in judge_rows(file, near=None)] == [
            (Verdict.KEPT, 1),
            (Verdict.EXACT, 1),
            (Verdict.KEPT, 3),
            (Verdict.EXACT, 1),
        ]

    def test_the_first_of_those_that_are_nearly_the_same_stays(self, file: Path) -> None:
        text = " ".join(WORDS[:40])
        written(file, row(text), row(unlike(1)), row(text + "!"), row(text + "!", "no"), row(text + "?"))
        assert [(each.verdict, each.first_line) for each in judge_rows(file, near=0.9)] == [
            (Verdict.KEPT, 1),
            (Verdict.KEPT, 2),
            (Verdict.NEAR, 1),
            (Verdict.KEPT, 4),
            (Verdict.NEAR, 1),
        ]

    def test_no_row_is_left_out_that_is_less_alike_than_asked_for(self, file: Path) -> None:
        texts = [" ".join(WORDS[:40] + WORDS[100 : 100 + number]) for number in range(12)]
        written(file, *map(row, texts))
        prints = [Fingerprint.of(text) for text in texts]
        for judged in judge_rows(file, near=0.9):
            likeness = jaccard(prints[judged.row.line - 1].shingles, prints[judged.first_line - 1].shingles)
            assert (likeness >= 0.9) if judged.verdict is Verdict.NEAR else judged.first_line == judged.row.line

    def test_nearly_all_that_are_alike_are_found(self, file: Path) -> None:
        rows = [row(f"{unlike(number)} {unlike(number + 1000)}") for number in range(100)]
        changed = [row(each["prompt"] + "s") for each in rows]
        verdicts = [judged.verdict for judged in judge_rows(written(file, *rows, *changed), near=0.9)]
        assert verdicts[:100] == [Verdict.KEPT] * 100
        assert verdicts[100:].count(Verdict.NEAR) >= 99

    @pytest.mark.parametrize("near", [0.0, 1.1, float("nan")])
    def test_a_likeness_is_a_share(self, file: Path, near: float) -> None:
        with pytest.raises(HocketError, match="near is a share"):
            list(judge_rows(written(file, PROMPT), near=near))


class TestSplitting:
    def test_every_split_gets_about_its_share(self, file: Path) -> None:
        written(file, *(row(unlike(number)) for number in range(400)))
        found = assign_rows(file, (0.7, 0.2, 0.1))
        counts = [found.splits.count(place) for place in range(len(SPLITS))]
        assert sum(counts) == found.group_count == 400
        assert found.largest_group == 1
        assert counts == [pytest.approx(share * 400, abs=35) for share in (0.7, 0.2, 0.1)]

    def test_rows_that_are_added_move_no_others(self, file: Path) -> None:
        rows = [row(unlike(number)) for number in range(120)]
        before = assign_rows(written(file, *rows[:80]), (0.5, 0.5, 0.0), seed=3)
        after = assign_rows(written(file, *rows), (0.5, 0.5, 0.0), seed=3)
        assert after.splits[:80] == before.splits
        assert assign_rows(file, (0.5, 0.5, 0.0), seed=4).splits != after.splits

    def test_rows_that_are_alike_stay_together(self, file: Path) -> None:
        texts = [" ".join(random.Random(number).sample(WORDS, 40)) for number in range(30)]
        written(file, *(row(text + end) for end in ("", "!", "?", "!") for text in texts))
        found = assign_rows(file, (0.4, 0.3, 0.3))
        assert len({found.splits[start : start + 30] for start in range(0, 120, 30)}) == 1
        assert (found.group_count, found.largest_group) == (30, 4)

    def test_rows_of_a_group_stay_together(self, file: Path) -> None:
        written(file, *(row(unlike(number), template=number % 20) for number in range(200)))
        found = assign_rows(file, (0.4, 0.3, 0.3), by="template")
        assert all(len(set(found.splits[place::20])) == 1 for place in range(20))
        assert (found.group_count, found.largest_group) == (20, 10)
        assert len(set(found.splits)) == 3

    def test_groups_that_share_a_row_are_one(self, file: Path) -> None:
        same = unlike(0)
        written(file, row(unlike(1), t="a"), row(same, t="a"), row(same, t="b"), row(unlike(2), t="b"))
        assert assign_rows(file, (0.4, 0.3, 0.3), by="t").group_count == 1

    def test_all_of_it_may_be_one_split(self, file: Path) -> None:
        assert set(assign_rows(written(file, PROMPT), (0.0, 1.0, 0.0)).splits) == {1}

    @pytest.mark.parametrize("shares", [(0.5, 0.5), (0.5, 0.4, 0.0), (1.5, -0.5, 0.0), (float("nan"), 0.5, 0.5)])
    def test_shares_are_of_a_whole(self, file: Path, shares: tuple[float, ...]) -> None:
        with pytest.raises(HocketError, match="1 together"):
            assign_rows(written(file, PROMPT), shares)

    def test_every_row_needs_the_key(self, file: Path) -> None:
        with pytest.raises(HocketError, match="line 2 has no 't'"):
            assign_rows(written(file, row("a", t=1), row("b")), (1.0, 0.0, 0.0), by="t")


class TestStatistics:
    def test_sizes_words_and_strata_are_counted(self, file: Path) -> None:
        found = measure(
            written(file, row("one two", "three", k="a"), row("one", "two", k="b"), row("One", "two", k="b")), by="k"
        )
        assert (found.rows, found.format, dict(found.strata)) == (3, Format.PROMPT, {"b": 2, "a": 1})
        assert (found.characters.least, found.characters.most) == (6, 12)
        assert (found.words.median, found.answer_words.most) == (2, 1)
        assert found.words.mean == pytest.approx(7 / 3)
        assert found.word_bins == (0, 3)
        assert (found.diversity_words, found.vocabulary) == (7, 3)
        assert found.distinct_1 == pytest.approx(3 / 7)
        assert found.distinct_2 == pytest.approx(2 / 4)
        assert found.exact == pytest.approx(1 / 3)
        assert found.near == 0

    def test_memory_is_bounded(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(measuring, "DIVERSITY_WORDS_MAX", 3)
        monkeypatch.setattr(measuring, "STRATA_MAX", 2)
        found = measure(written(file, *(row(unlike(number), k=number) for number in range(4))), by="k")
        assert found.diversity_words == found.vocabulary == 3
        assert dict(found.strata) == {"0": 1, "1": 1, measuring.OTHERS: 2}


class TestWriting:
    def test_a_file_appears_whole(self, tmp_path: Path) -> None:
        with writing(tmp_path / "out") as write:
            write(b"one")
            assert not (tmp_path / "out").exists()
        assert (tmp_path / "out").read_bytes() == b"one\n"

    def test_nothing_is_left_of_one_that_fails(self, tmp_path: Path) -> None:
        def fail() -> None:
            with writing(tmp_path / "out") as write:
                write(b"one")
                raise HocketError(Reason.BAD_DATASET, "no")

        with pytest.raises(HocketError, match="no"):
            fail()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("failure", [OSError(2, "No such file"), ValueError("no"), BrokenPipeError()])
    def test_what_fails_beside_the_writing_stays_what_it_is(self, tmp_path: Path, failure: Exception) -> None:
        with pytest.raises(type(failure)) as raised, writing(tmp_path / "out"):
            raise failure
        assert raised.value is failure
        assert list(tmp_path.iterdir()) == []

    def test_what_cannot_be_written_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        for path in (tmp_path / "none" / "out", tmp_path / "nul\0", tmp_path / "nul\0" / "out", tmp_path / "folder"):
            with pytest.raises(HocketError, match="cannot write") as refused, writing(path):
                pass
            assert refused.value.reason is Reason.BAD_REQUEST
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]

    def test_a_full_disk_is_refused_at_the_line_or_at_the_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Path, "open", lambda _path, _mode: io.open("/dev/full", "wb"))  # noqa: SIM115, UP020 - Path.open itself is replaced
        for size in (1, 2**20):
            with pytest.raises(HocketError, match="No space left"), writing(tmp_path / "out") as write:
                write(b"x" * size)
