from __future__ import annotations

import json
import unicodedata
from collections import Counter
from itertools import combinations
from typing import Final

from benchmarks.routing_set import BASE, PATH, STRATA, read
from training.starter.corpus import TASKS

# The set is frozen: figures before and after a change of it cannot be compared. Prompts that fail are no training data.
DIGEST: Final = "sha256:cec60f8987a2e2a3ad762eed94e6f9fde7064323153a413bf61243cc81b52a9a"
SIMILARITY_MAX: Final = 0.9


def grams(text: str) -> frozenset[str]:
    """All runs of five characters."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return frozenset(plain[begin : begin + 5] for begin in range(max(len(plain) - 4, 1)))


def test_the_set_is_the_frozen_one() -> None:
    assert read().digest == DIGEST


def test_every_row_has_the_same_keys_and_an_id_of_its_stratum() -> None:
    rows = [json.loads(line) for line in PATH.read_text().splitlines()]
    assert all(row.keys() == {"id", "prompt", "accept", "stratum", "author"} for row in rows)
    numbers: Counter[str] = Counter()
    for row in rows:
        numbers[row["stratum"]] += 1
        assert row["id"] == f"{row['stratum']}{numbers[row['stratum']]:03d}"
    assert tuple(numbers) == STRATA


def test_prompts_are_texts_and_labels_are_experts_of_the_kit_or_the_base() -> None:
    for prompt in read().prompts:
        assert prompt.text == prompt.text.strip() != ""
        assert prompt.author
        assert len(set(prompt.accept)) == len(prompt.accept) > 0
        assert {*prompt.accept} <= {*TASKS, BASE}


def test_requests_are_for_experts_and_general_questions_for_the_base() -> None:
    for prompt in read().prompts:
        assert (prompt.accept == (BASE,)) == (prompt.stratum in ("C", "D"))


def test_every_stratum_and_every_expert_has_enough_prompts() -> None:
    prompts = read().prompts
    strata = Counter(prompt.stratum for prompt in prompts)
    assert len(prompts) >= 420
    assert strata["A"] >= 120
    assert min(strata.values()) >= 100
    for stratum in ("A", "B"):
        experts = Counter(label for prompt in prompts if prompt.stratum == stratum for label in prompt.accept)
        assert experts.keys() == TASKS.keys()
        assert min(experts.values()) >= 12


def test_no_two_prompts_are_alike() -> None:
    seen = [(prompt.id, grams(prompt.text)) for prompt in read().prompts]
    alike = [
        (one, other)
        for (one, mine), (other, its) in combinations(seen, 2)
        if len(mine & its) >= SIMILARITY_MAX * len(mine | its)
    ]
    assert alike == []
