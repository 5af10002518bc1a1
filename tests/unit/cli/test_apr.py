from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import typer
from sklearn.ensemble import RandomForestClassifier, VotingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from skops import io as skops_io

from hocket.authoring import DraftSoftmax, read_draft
from hocket.identity import digest_of, key_id_of
from hocket.mixtures import FixedGate
from hocket.packages import apr
from hocket.packages import model as m
from hocket.packages.apr.encryption import Password, RecipientKey
from hocket.packages.from_sklearn import convert
from tests.builders import apr_bytes, forest, linear, logistic, same, signer
from tests.signing import ACME_ID

if TYPE_CHECKING:
    from pathlib import Path

CARD = 'name = "iris"\nversion = "1.0"\nauthor = "acme"\nbias_risks = ["few flowers"]\n[metrics]\naccuracy = 0.5\n'


@pytest.fixture
def package(tmp_path: Path) -> Path:
    path = tmp_path / "iris.apr"
    path.write_bytes(apr_bytes(logistic(*np.linspace(-1, 1, 200)), name="iris", labels=["x", "y"]))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.apr"


@pytest.fixture
def password(tmp_path: Path) -> Path:
    path = tmp_path / "iris.password"
    path.write_text("hunter2\n")
    path.chmod(0o600)
    return path


def opened(path: Path, credential: Any = None) -> Any:
    data = path.read_bytes()
    return apr.decode(apr.split(data), digest_of(data), credential=credential)


def reason(outcome: Any) -> str:
    assert outcome.code == 2
    found: str = outcome.document["error"]["reason"]
    return found


def test_a_package_is_encrypted_with_a_password_signed_and_decrypted(
    hocket: Any, package: Path, out: Path, password: Path, key: Path, tmp_path: Path
) -> None:
    done = hocket("apr", "encrypt", package, out, "--password-file", password, "--key", key, "--json")

    assert (done.code, done.document["digest"]) == (0, digest_of(out.read_bytes()))
    assert done.document["encrypted_for"] == {"mode": "password"}
    container = apr.split(out.read_bytes())
    assert container.header.encrypted
    assert container.signature is not None
    assert key_id_of(container.signature.public_key) == ACME_ID
    assert same(opened(out, Password("hunter2"))[1], opened(package)[1])
    assert "hunter2" not in done.out + done.err

    back = tmp_path / "back.apr"
    again = hocket("apr", "decrypt", out, back, "--password-file", password)
    assert again.code == 0
    assert "signature inside was of other bytes" in again.err
    assert same(opened(back)[1], opened(package)[1])
    assert again.out.endswith(f"Next: hocket inspect {back}\n"), "what was decrypted is not meant to be published"


def next_steps(outcome: Any) -> list[str]:
    """The commands that it ends with."""
    return [line.removeprefix("Next: ").strip() for line in outcome.out[outcome.out.index("Next: ") :].splitlines()]


@pytest.mark.parametrize(
    "verb", [("encrypt", "--unsigned"), ("quantize",), ("compress", "--method", "none"), ("card", "--remove")]
)
def test_a_rewritten_package_is_to_be_signed_and_published(
    hocket: Any, package: Path, out: Path, password: Path, verb: tuple[str, ...]
) -> None:
    name, *options = verb
    secret = ("--password-file", password) if name == "encrypt" else ()

    done = hocket("apr", name, package, out, *options, *secret)

    assert next_steps(done) == [
        f"hocket sign {out} --publisher YOU --name NAME --version VERSION",
        f"hocket publish {out}",
    ]


def test_a_package_is_encrypted_for_a_recipient_whose_key_keygen_makes(
    hocket: Any, package: Path, out: Path, tmp_path: Path
) -> None:
    made = hocket("apr", "keygen", tmp_path / "new" / "worker.key", "--json").document
    path = tmp_path / "new" / "worker.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert made["public_key"] == str(RecipientKey(path.read_bytes()).recipient)
    assert reason(hocket("apr", "keygen", path, "--json")) == "NAME_TAKEN"

    done = hocket("apr", "encrypt", package, out, "--to", made["public_key"], "--unsigned", "--json")
    assert done.document["encrypted_for"] == {"mode": "recipient", "recipient": made["public_key"]}
    assert apr.split(out.read_bytes()).signature is None
    back = tmp_path / "back.apr"
    assert hocket("apr", "decrypt", out, back, "--key-file", path).code == 0
    assert same(opened(back)[1], opened(package)[1])
    other = hocket("apr", "keygen", tmp_path / "other.key")
    assert "hocket apr encrypt FILE OUT --to x25519:" in other.out
    assert (
        reason(hocket("apr", "decrypt", out, back, "--key-file", tmp_path / "other.key", "--json")) == "WRONG_RECIPIENT"
    )


def test_keygen_has_a_place_of_its_own(hocket: Any, home: Path) -> None:
    assert hocket("apr", "keygen").code == 0
    assert (home / ".config" / "hocket" / "keys" / "recipient.key").stat().st_size == 32


def test_a_password_is_asked_for_at_a_terminal_alone(
    hocket: Any, package: Path, out: Path, at_terminal: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert reason(hocket("apr", "encrypt", package, out, "--unsigned", "--json")) == "BAD_REQUEST"
    asked = []

    def prompt(text: str, **options: Any) -> str:
        asked.append((text, options["hide_input"], options["confirmation_prompt"]))
        return "typed"

    at_terminal("<stdin>")
    monkeypatch.setattr(typer, "prompt", prompt)
    assert hocket("apr", "encrypt", package, out, "--unsigned").code == 0
    assert hocket("apr", "decrypt", out, tmp_path / "back.apr").code == 0
    assert asked == [("Password", True, True), ("Password", True, False)]
    assert opened(out, Password("typed"))

    def interrupted(*_: Any, **__: Any) -> str:
        raise typer.Abort

    monkeypatch.setattr(typer, "prompt", interrupted)
    assert hocket("apr", "decrypt", out, tmp_path / "back.apr").code == 130


def test_encrypting_signs_unless_told_otherwise(hocket: Any, package: Path, out: Path, password: Path) -> None:
    refused = hocket("apr", "encrypt", package, out, "--password-file", password, "--json")

    assert reason(refused) == "BAD_KEY_FILE"
    assert not out.exists()


def test_a_key_to_sign_with_and_unsigned_exclude_each_other(
    hocket: Any, package: Path, out: Path, password: Path, key: Path
) -> None:
    options = ("--password-file", password, "--json")

    refused = hocket("apr", "encrypt", package, out, "--unsigned", "--key", key, *options)
    assert reason(refused) == "BAD_REQUEST"
    assert {"--key", "--unsigned"} <= set(refused.document["error"]["message"].replace(",", "").split())
    assert not out.exists()
    assert hocket("apr", "encrypt", package, out, "--key", key, *options).code == 0


def test_a_credential_is_one_of_two(hocket: Any, package: Path, out: Path, password: Path, key: Path) -> None:
    both = ("--password-file", password)

    assert (
        reason(hocket("apr", "encrypt", package, out, *both, "--to", "x25519:" + 64 * "a", "--json")) == "BAD_REQUEST"
    )
    for verb in (("apr", "decrypt", package, out), ("verify", package)):
        refused = hocket(*verb, *both, "--key-file", key, "--json")
        assert (reason(refused), "either" in refused.out) == ("BAD_REQUEST", True)
    assert reason(hocket("apr", "encrypt", package, out, "--to", "someone", "--unsigned", "--json")) == "BAD_REQUEST"
    password.chmod(0o644)
    assert reason(hocket("apr", "encrypt", package, out, *both, "--unsigned", "--json")) == "BAD_KEY_FILE"


def test_quantising_tells_how_far_weights_moved(hocket: Any, package: Path, out: Path) -> None:
    done = hocket("apr", "quantize", package, out, "--kind", "q4_0", "--json").document

    assert (done["kind"], done["signature_lost"]) == ("q4_0", False)
    assert 0.02 < done["largest_change"] < 0.08
    assert done["size_bytes"] < done["size_bytes_before"]
    assert opened(out)[0].layout == "Quantized<LogisticRegression>"
    assert "largest change" in hocket("apr", "quantize", package, out).out
    assert opened(out)[0].quantization == "q8_0"


def test_a_package_is_compressed_by_any_method(hocket: Any, package: Path, out: Path) -> None:
    for method in ("none", "zstd", "zstd-max", "lz4"):
        assert hocket("apr", "compress", package, out, "--method", method).code == 0
        assert opened(out)[0].compression == method.removesuffix("-max")
    assert reason(hocket("apr", "compress", package, out, "--method", "brotli", "--json")) == "BAD_REQUEST"


def test_a_card_is_put_in_from_toml_or_json_and_taken_away(
    hocket: Any, package: Path, out: Path, tmp_path: Path
) -> None:
    toml = tmp_path / "card.toml"
    toml.write_text(CARD)
    done = hocket("apr", "card", package, out, "--card", toml, "--json").document

    card = opened(out)[0].metadata["model_card"]
    assert done["card"] == card
    assert card["model_id"] == "iris-1.0"
    assert card["framework_version"].startswith("hocket ")
    assert (card["author"], card["metrics"], card["bias_risks"]) == ("acme", {"accuracy": 0.5}, ["few flowers"])
    assert "few flowers" in hocket("inspect", out).out

    also = tmp_path / "card.json"
    also.write_text(json.dumps({**card, "model_id": "own"}))
    assert hocket("apr", "card", out, out, "--card", also).code == 0
    assert opened(out)[0].metadata["model_card"]["model_id"] == "own"
    assert hocket("apr", "card", out, out, "--remove").code == 0
    assert out.read_bytes() == package.read_bytes()


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("card.toml", "name = 3", "BAD_METADATA"),
        ("card.toml", 'name = "x"', "BAD_METADATA"),
        ("card.json", "[]", "BAD_METADATA"),
        ("card.toml", "name =", "BAD_REQUEST"),
        ("card.json", "{", "BAD_REQUEST"),
        ("card.yaml", "name: x", "BAD_REQUEST"),
        ("card.toml", CARD + "param_count = 3", None),
        ("card.toml", "training_data = 'x'\n" + CARD, "BAD_METADATA"),
        ("card.toml", CARD.replace("[metrics]", "param_count = 'many'\n[metrics]"), "BAD_METADATA"),
        ("card.toml", CARD.replace("[metrics]", "day = 2025-11-27\n[metrics]"), "BAD_METADATA"),
    ],
)
def test_a_card_that_is_none_is_refused(
    hocket: Any, package: Path, out: Path, tmp_path: Path, name: str, text: str, wanted: str | None
) -> None:
    (tmp_path / name).write_text(text)

    outcome = hocket("apr", "card", package, out, "--card", tmp_path / name, "--json")

    assert (outcome.document.get("error") or {}).get("reason") == wanted
    assert out.exists() == (wanted is None)


def test_a_card_is_given_or_taken_away(hocket: Any, package: Path, out: Path) -> None:
    assert reason(hocket("apr", "card", package, out, "--json")) == "BAD_REQUEST"


def test_a_release_that_lies_beside_the_result_is_said_to_be_of_other_bytes(
    hocket: Any, package: Path, key: Path
) -> None:
    hocket("sign", package, "--publisher", "acme", "--name", "iris", "--version", "1", "--key", key)

    done = hocket("apr", "compress", package, package, "--method", "none")

    assert "is no release of these bytes" in done.err


def test_a_rewritten_package_is_signed_inside_where_a_key_is_given(
    hocket: Any, out: Path, key: Path, package: Path
) -> None:
    package.write_bytes(apr_bytes(signing=signer()))

    assert hocket("apr", "compress", package, out, "--json").document["signature_lost"]
    assert not hocket("apr", "compress", package, out, "--key", key, "--json").document["signature_lost"]
    assert apr.split(out.read_bytes()).signature is not None


@pytest.fixture
def flowers() -> Any:
    random = np.random.default_rng(0)
    x = random.normal(0, 1, (90, 3))
    return x, np.array(["setosa", "other", "third"])[np.digitize(x[:, 0] + x[:, 1], [-0.5, 0.5])]


def test_an_estimator_becomes_a_package(hocket: Any, out: Path, tmp_path: Path, flowers: Any) -> None:
    file = tmp_path / "model.skops"
    skops_io.dump(RandomForestClassifier(4, max_depth=2, random_state=0).fit(*flowers), file)

    done = hocket("apr", "from-sklearn", file, out, "--name", "iris", "--drop", "other")

    facts, _ = opened(out)
    assert (facts.name, facts.layout, facts.labels) == ("iris", "RandomForestClassifier", (None, "setosa", "third"))
    assert "(dropped), setosa, third" in done.out
    assert "leaves of several classes" in done.out
    [package] = hocket(
        "apr", "from-sklearn", file, out, "--label", "a", "--label", "b", "--label", "c", "--json"
    ).document["packages"]
    assert package["layout"] == "RandomForestClassifier"
    assert opened(out)[0].labels == ("a", "b", "c")
    assert opened(out)[0].name == "out"


def test_a_vote_becomes_packages_and_a_mixture(hocket: Any, tmp_path: Path, flowers: Any) -> None:
    vote = VotingClassifier([("lr", LogisticRegression()), ("nb", GaussianNB())], voting="soft", weights=[3, 1])
    file = tmp_path / "vote.skops"
    skops_io.dump(vote.fit(*flowers), file)

    done = hocket("apr", "from-sklearn", file, tmp_path / "vote.toml")

    assert next_steps(done) == [
        f"hocket sign {tmp_path}/vote-lr.apr --publisher YOU --name vote-lr --version VERSION",
        f"hocket publish {tmp_path}/vote-lr.apr",
        f"hocket sign {tmp_path}/vote-nb.apr --publisher YOU --name vote-nb --version VERSION",
        f"hocket publish {tmp_path}/vote-nb.apr",
        f"hocket mixtures put {tmp_path}/vote.toml --publisher YOU --version VERSION",
    ]
    draft = read_draft(tmp_path / "vote.toml")
    assert [member.name for member in draft.members] == [
        digest_of((tmp_path / name).read_bytes()) for name in ("vote-lr.apr", "vote-nb.apr")
    ]
    assert draft.gate == FixedGate((0.75, 0.25))
    assert draft.labels == ("other", "setosa", "third")
    listed = hocket("apr", "from-sklearn", file, tmp_path / "two.toml", "--drop", "other", "--json").document
    assert [package["name"] for package in listed["packages"]] == ["two-lr", "two-nb"]
    assert listed["labels"] == [None, "setosa", "third"]
    assert read_draft(tmp_path / "two.toml").labels == ("setosa", "third")
    assert [opened(tmp_path / name)[0].labels for name in ("two-lr.apr", "two-nb.apr")] == [
        (None, "setosa", "third")
    ] * 2
    assert reason(hocket("apr", "from-sklearn", file, tmp_path / "vote.apr", "--json")) == "BAD_REQUEST"


def test_members_of_a_vote_take_the_place_of_no_file(hocket: Any, tmp_path: Path, flowers: Any) -> None:
    vote = VotingClassifier([("lr", LogisticRegression()), ("nb", GaussianNB())], voting="soft")
    file = tmp_path / "vote.skops"
    skops_io.dump(vote.fit(*flowers), file)
    mine = tmp_path / "vote-nb.apr"
    mine.write_bytes(b"mine")

    assert reason(hocket("apr", "from-sklearn", file, tmp_path / "vote.toml", "--json")) == "NAME_TAKEN"
    assert mine.read_bytes() == b"mine"
    assert not (tmp_path / "vote-lr.apr").exists()
    assert hocket("apr", "from-sklearn", file, tmp_path / "vote.toml", "--name", "other").code == 0


def test_a_class_is_dropped_without_converting_twice(
    hocket: Any, out: Path, tmp_path: Path, flowers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.skops"
    skops_io.dump(GaussianNB().fit(*flowers), file)
    calls = []

    def counted(*arguments: Any, **more: Any) -> Any:
        calls.append(arguments)
        return convert(*arguments, **more)

    monkeypatch.setattr("hocket.cli.apr_models.convert", counted)
    options = ("--label", "a", "--label", "b", "--label", "c", "--drop", "b", "--json")

    assert hocket("apr", "from-sklearn", file, out, *options).document["labels"] == ["a", None, "c"]
    assert opened(out)[0].labels == ("a", None, "c")
    assert len(calls) == 1


def test_what_is_no_skops_file_or_has_no_such_class_is_refused(
    hocket: Any, tmp_path: Path, out: Path, flowers: Any
) -> None:
    pickled = tmp_path / "model.joblib"
    pickled.write_bytes(b"\x80\x04")
    file = tmp_path / "model.skops"
    skops_io.dump(LogisticRegression().fit(*flowers), file)

    assert reason(hocket("apr", "from-sklearn", pickled, out, "--json")) == "BAD_REQUEST"
    assert reason(hocket("apr", "from-sklearn", file, out, "--drop", "rose", "--json")) == "BAD_REQUEST"
    assert reason(hocket("apr", "from-sklearn", file, tmp_path / "out.toml", "--json")) == "BAD_REQUEST"
    assert not out.exists()


@pytest.fixture
def halves(tmp_path: Path) -> Any:
    """Two linear experts, each right on its side, and rows that say so."""
    paths = []
    for name, intercept in (("east", 1.0), ("west", -1.0)):
        paths.append(tmp_path / f"{name}.apr")
        paths[-1].write_bytes(apr_bytes(linear(0.0, 1.0, intercept=intercept), name=name))
    rows = np.random.default_rng(1).uniform(-1, 1, (200, 2))
    truth = np.where(rows[:, 0] > 0, 1.0, -1.0) + rows[:, 1]
    np.savez(tmp_path / "rows.npz", rows=rows, truth=truth)
    lines = "\n".join(f"{a},{b},{c}" for (a, b), c in zip(rows, truth, strict=True))
    (tmp_path / "rows.csv").write_text(f"a,b,wanted\n{lines}\n")
    return paths


def test_a_gate_is_trained_into_one_apr_file(hocket: Any, halves: Any, tmp_path: Path, out: Path) -> None:
    done = hocket("apr", "train-gate", *halves, "--examples", tmp_path / "rows.csv", "--truth", "wanted", "-o", out)

    assert done.code == 0
    facts, model = opened(out)
    assert (facts.layout, facts.expert_layout, facts.name) == ("MixtureOfExperts", "LinearRegression", "out")
    assert model.gate.weights[0, 0] > model.gate.weights[0, 1]
    assert model.top_k == 1
    assert "east.apr alone" in done.out
    assert "less is better" in done.out
    assert next_steps(done) == [
        f"hocket sign {out} --publisher YOU --name out --version VERSION",
        f"hocket publish {out}",
    ]


def test_a_gate_is_trained_into_a_mixture_to_be_signed(hocket: Any, halves: Any, tmp_path: Path) -> None:
    out = tmp_path / "sides.toml"
    options = ("--examples", tmp_path / "rows.npz", "-o", out, "--top-k", "2", "--held-out", "0.5", "--json")
    done = hocket("apr", "train-gate", *halves, *options).document

    assert (done["learned_rows"], done["figures"]["rows"], done["figures"]["measure"]) == (100, 100, "rmse")
    assert done["figures"]["mixture"] < min(done["figures"]["members"])
    draft = read_draft(out)
    assert [member.name for member in draft.members] == [digest_of(path.read_bytes()) for path in halves]
    assert isinstance(draft.gate, DraftSoftmax)
    assert draft.gate.bias is not None
    assert (draft.name, draft.top_k) == ("sides", 2)
    assert done["gate_path"] == str(tmp_path / "sides-gate.npy")
    assert (tmp_path / "sides-gate.npy").exists()
    assert done["converged"]


def test_a_mixture_is_put_when_its_members_are_published(hocket: Any, halves: Any, tmp_path: Path, key: Path) -> None:
    east, west = halves
    hocket("sign", west, "--publisher", "acme", "--name", "west", "--version", "1", "--key", key)

    done = hocket("apr", "train-gate", *halves, "--examples", tmp_path / "rows.npz", "-o", tmp_path / "sides.toml")

    assert f"{tmp_path}/sides-gate.npy" in done.out
    assert next_steps(done) == [
        f"hocket sign {east} --publisher YOU --name NAME --version VERSION",
        f"hocket publish {east}",
        f"hocket publish {west}",
        f"hocket mixtures put {tmp_path}/sides.toml --publisher YOU --version VERSION",
    ]


def test_training_that_was_stopped_is_told(
    hocket: Any, halves: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--examples", tmp_path / "rows.npz", "-o", tmp_path / "sides.toml")
    assert "stopped" not in hocket("apr", "train-gate", *halves, *options).err
    monkeypatch.setattr("hocket.packages.gate_training._STEPS_MAX", 1)

    assert "training was stopped before its end" in hocket("apr", "train-gate", *halves, *options).err
    assert not hocket("apr", "train-gate", *halves, *options, "--json").document["converged"]


def test_labels_that_no_member_knows_are_told(hocket: Any, tmp_path: Path, flowers: Any) -> None:
    rows, kinds = flowers
    members = []
    for name, labels in (("one", ("setosa", "other")), ("two", ("other", "setosa"))):
        members.append(tmp_path / f"{name}.apr")
        weights = m.LogisticRegression(np.array([3, -2, 0], np.float32), 0.0)
        members[-1].write_bytes(apr_bytes(weights, labels=labels))
    np.savez(tmp_path / "rows.npz", rows=rows, truth=kinds)

    done = hocket("apr", "train-gate", *members, "--examples", tmp_path / "rows.npz", "-o", tmp_path / "g.toml")

    assert "no member knows third" in done.err
    assert "more is better" in done.out


@pytest.mark.parametrize("kind", [float, int, str])
def test_labels_are_known_however_the_truth_writes_them(hocket: Any, tmp_path: Path, flowers: Any, kind: type) -> None:
    rows, kinds = flowers
    members = []
    for name, labels in (("one", (0, 1)), ("two", (1, 0))):
        members.append(tmp_path / f"{name}.apr")
        weights = m.LogisticRegression(np.array([3, -2, 0], np.float32), 0.0)
        members[-1].write_bytes(apr_bytes(weights, labels=labels))
    truth: Any = np.unique(kinds, return_inverse=True)[1].astype(kind)
    options = ("--examples", tmp_path / "rows.npz", "-o", tmp_path / "g.toml", "--json")

    np.savez(tmp_path / "rows.npz", rows=rows, truth=truth)
    assert hocket("apr", "train-gate", *members, *options).document["unknown_labels"] == ["2"]
    known = truth != np.array(2, kind)
    np.savez(tmp_path / "rows.npz", rows=rows[known], truth=truth[known])
    assert hocket("apr", "train-gate", *members, *options).document["unknown_labels"] == []


def test_what_one_file_cannot_hold_is_written_as_a_mixture(hocket: Any, halves: Any, tmp_path: Path, out: Path) -> None:
    other = tmp_path / "forest.apr"
    other.write_bytes(apr_bytes(forest()))
    examples = ("--examples", tmp_path / "rows.npz", "--json")

    assert reason(hocket("apr", "train-gate", halves[0], other, *examples, "-o", out)) == "BAD_REQUEST"
    assert (
        reason(hocket("apr", "train-gate", halves[0], other, *examples, "-o", tmp_path / "x.toml"))
        == "MEMBERS_NOT_ALIGNED"
    )
    assert reason(hocket("apr", "train-gate", *halves, *examples, "-o", tmp_path / "x.json")) == "BAD_REQUEST"
    assert reason(hocket("apr", "train-gate", *halves, *examples, "-o", out, "--top-k", "3")) == "TOP_K_OUT_OF_RANGE"
