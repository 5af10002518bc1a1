"""`hocket dataset`: what is done with rows before anything is learnt from them."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "the quick brown fox jumps over the lazy dog and runs away into the wood behind the old mill"


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(question: str, answer: str = "yes", **more: Any) -> dict[str, Any]:
    return {"prompt": question, "completion": answer, **more}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Five rows: the second is the first once more, and the third nearly so."""
    rows = [row(TEXT, kind="fox"), row(TEXT.upper(), kind="fox"), row(TEXT + "!", kind="fox")]
    return write(tmp_path / "rows.jsonl", *rows, row("how many?", "two", kind="count"), row("why?", kind="why"))


class TestValidate:
    def test_a_sound_file_is_valid(self, hocket: Any, file: Path) -> None:
        assert hocket("dataset", "validate", file).out == f"{file} is valid: 5 rows (prompt)\n"
        document = {"path": str(file), "valid": True, "rows": 5, "format": "prompt", "error_count": 0, "errors": []}
        assert hocket("dataset", "validate", file, "--json").document == document

    def test_every_line_that_is_wrong_is_counted_and_the_first_are_named(self, hocket: Any, tmp_path: Path) -> None:
        bad = write(tmp_path / "bad.jsonl", row("x"), *["{"] * 30, row("y"))
        outcome = hocket("dataset", "validate", bad)
        assert outcome.code == 2
        assert outcome.out.count("BAD_JSON bad.jsonl, line ") == 20
        assert "lines that are wrong: 30 (above are the first 20); fine: 2" in outcome.out
        document = hocket("dataset", "validate", bad, "--json").document
        assert (document["valid"], document["rows"], document["error_count"]) == (False, 2, 30)
        assert [(error["line"], error["reason"]) for error in document["errors"]] == [
            (line, "BAD_JSON") for line in range(2, 22)
        ]

    def test_what_is_no_dataset_at_all_is_told_in_a_few_lines(self, hocket: Any, tmp_path: Path) -> None:
        page = tmp_path / "README.md"
        page.write_text("# Hocket\n" * 30)
        outcome = hocket("dataset", "validate", page)
        assert (outcome.code, outcome.out.count("BAD_JSON")) == (2, 3)
        assert "lines that are wrong: 30 (above are the first 3); fine: 0" in outcome.out
        assert "one JSON object a line: docs/datasets.md" in outcome.out

    def test_several_files_are_a_line_each(self, hocket: Any, file: Path, tmp_path: Path) -> None:
        bad = write(tmp_path / "bad.jsonl", {"text": ""})
        outcome = hocket("dataset", "validate", bad, file, "--json")
        assert (outcome.code, [report["valid"] for report in outcome.lines]) == (2, [False, True])

    def test_a_manifest_says_which_file(self, hocket: Any, file: Path, tmp_path: Path) -> None:
        manifest = write(tmp_path / "manifest.json", {"training": {"dataset": {"path": "rows.jsonl"}}})
        assert hocket("dataset", "validate", "--manifest", manifest, "--json").document["path"] == str(file)
        wrong: list[dict[str, Any]] = [{}, {"dataset": []}, {"dataset": {"path": ""}}]
        for training in wrong:
            write(manifest, {"training": training})
            refused = hocket("dataset", "validate", "--manifest", manifest, "--json").document["error"]
            assert refused["reason"] == "BAD_MANIFEST"

    def test_something_has_to_be_given(self, hocket: Any) -> None:
        assert hocket("dataset", "validate", "--json").document["error"]["reason"] == "BAD_REQUEST"


class TestStats:
    def test_a_file_is_described(self, hocket: Any, file: Path) -> None:
        out = hocket("dataset", "stats", file, "--by", "kind").out
        for what in ("rows", "distinct-2", "nearly the same", "median", "16 - 31", "fox", "█"):
            assert what in out
        found = hocket("dataset", "stats", file, "--by", "kind", "--json").document
        assert (found["rows"], found["exact"], found["near"], found["strata"]["fox"]) == (5, 0.2, 0.2, 3)

    def test_many_strata_are_cut(self, hocket: Any, tmp_path: Path) -> None:
        many = write(tmp_path / "many.jsonl", *(row("x", kind=number) for number in range(25)))
        assert "and 5 more" in hocket("dataset", "stats", many, "--by", "kind").out

    def test_a_row_that_is_wrong_is_refused_by_its_line(self, hocket: Any, tmp_path: Path) -> None:
        outcome = hocket("dataset", "stats", write(tmp_path / "bad.jsonl", row("x"), "{"), "--json")
        assert (outcome.code, outcome.document["error"]["reason"]) == (2, "BAD_JSON")
        assert "bad.jsonl, line 2" in outcome.document["error"]["message"]


class TestDedupe:
    def test_rows_that_repeat_others_are_left_out(self, hocket: Any, file: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.jsonl"
        assert "3 of 5 rows stay" in hocket("dataset", "dedupe", file, "-o", out).out
        lines = file.read_bytes().splitlines()
        assert out.read_bytes().splitlines() == [lines[0], *lines[3:]]

    def test_only_the_same_are_left_out_if_asked_for(self, hocket: Any, file: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.jsonl"
        found = hocket("dataset", "dedupe", file, "-o", out, "--exact", "--json").document
        assert found == {"path": str(file), "out": str(out), "rows": 5, "kept": 4, "exact": 1, "near": 0}

    def test_the_file_that_is_read_stays(self, hocket: Any, file: Path) -> None:
        before = file.read_bytes()
        assert hocket("dataset", "dedupe", file, "-o", file, "--json").document["error"]["reason"] == "BAD_REQUEST"
        assert file.read_bytes() == before


class TestSplit:
    @pytest.fixture
    def many(self, tmp_path: Path) -> Path:
        letters = random.Random(0)
        texts = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz ", k=60)) for _ in range(100)]
        return write(tmp_path / "many.jsonl", *(row(text, kind=number % 2) for number, text in enumerate(texts)))

    def test_every_row_comes_into_one_file(self, hocket: Any, many: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        found = hocket("dataset", "split", many, "-o", tmp_path / "out", "--strata", "kind", "--json").document
        files = {name: (tmp_path / "out" / f"many.{name}.jsonl").read_bytes().splitlines() for name in found["splits"]}
        assert sorted(line for lines in files.values() for line in lines) == sorted(many.read_bytes().splitlines())
        assert {name: len(lines) for name, lines in files.items()} == {
            name: split["rows"] for name, split in found["splits"].items()
        }
        assert found["rows"] == found["groups"] == 100
        assert sum(found["splits"]["train"]["strata"].values()) == found["splits"]["train"]["rows"] > 60

    def test_shares_are_chosen_and_shown(self, hocket: Any, many: Path) -> None:
        outcome = hocket("dataset", "split", many, "--train", "0.5", "--eval", "0.5", "--test", "0", "--strata", "kind")
        assert outcome.code == 0
        assert "train" in outcome.out
        assert "kind" in outcome.out
        assert (many.parent / "many.eval.jsonl").exists()
        assert not (many.parent / "many.test.jsonl").exists()

    def test_what_makes_a_split_useless_is_said(self, hocket: Any, many: Path) -> None:
        outcome = hocket("dataset", "split", many, "--by", "kind")
        assert "50 of 100 rows stay together" in outcome.err
        assert "no row came into" in outcome.err

    def test_shares_are_of_a_whole(self, hocket: Any, many: Path) -> None:
        assert hocket("dataset", "split", many, "--train", "0.5", "--json").document["error"]["reason"] == "BAD_REQUEST"
        assert [path.name for path in many.parent.iterdir()] == ["many.jsonl"]
