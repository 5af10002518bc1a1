from __future__ import annotations

from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.mixtures import MixtureRecord, SoftmaxGate
from hocket.packages import DEFAULT_LIMITS, Policy, RecipientKey, Revocations, TrustRoots
from hocket.packages.apr.header import Flag
from hocket.packages.model import KMeans, ModelFacts
from hocket.rpc.convert import COLUMNS_MAX
from services.registry.admission import (
    AdmittedMixture,
    AdmittedPackage,
    Dated,
    Shape,
    State,
    Terms,
    admit_mixture,
    admit_package,
    align,
    check_gate,
    expert_shape,
    judge,
    package_subject,
)
from tests.builders import apr_bytes, linear, logistic, mixture, raw_apr, signer
from tests.experts import expert_package
from tests.registries import fixed, gated, labelled, mixture_release
from tests.signing import (
    ACME_ID,
    ACME_SEED,
    NOW,
    STRANGER_ID,
    STRANGER_SEED,
    ZETA_ID,
    ZETA_SEED,
    envelope_of,
    forged,
    roots,
    trusted,
)

KEY = RecipientKey(b"\x09" * 32)
DATA = labelled("a", "b")
OTHER = labelled("c", "d", weight=2.0)


def terms(
    trust: TrustRoots | None = None, *, allow_unsigned: bool = False, revoked: Revocations = frozenset()
) -> Terms:
    return Terms(roots() if trust is None else trust, Policy(allow_unsigned=allow_unsigned), revoked)


def admit(data: bytes = DATA, release: bytes = b"", at: Terms | None = None, **changes: Any) -> AdmittedPackage:
    arguments = {"digest": digest_of(data), "terms": at or terms(), "limits": DEFAULT_LIMITS, "now": NOW, **changes}
    return admit_package(data, release, **arguments)


def model_of(admitted: AdmittedPackage) -> ModelFacts:
    assert isinstance(admitted.facts, ModelFacts)
    return admitted.facts


def refusal_of(call: Any, *arguments: Any, **more: Any) -> Reason:
    with pytest.raises(HocketError) as caught:
        call(*arguments, **more)
    return caught.value.reason


class TestPackages:
    def test_a_package_with_a_trusted_release_is_admitted_under_its_name(self) -> None:
        admitted = admit(release=envelope_of(DATA))

        assert str(admitted.proof.release) == "acme/iris@1.0.0"
        assert admitted.proof.key_id == ACME_ID
        assert admitted.release == envelope_of(DATA)
        assert model_of(admitted).labels == ("a", "b")
        assert admitted.mixture is None

    @pytest.mark.parametrize(
        ("release", "reason"),
        [
            (b"", Reason.UNSIGNED),
            (b"{}", Reason.BAD_RELEASE),
            (envelope_of(OTHER), Reason.DIGEST_MISMATCH),
            (envelope_of(DATA, size_bytes=1), Reason.BAD_RELEASE),
            (envelope_of(DATA, STRANGER_SEED), Reason.SIGNER_NOT_TRUSTED),
            (envelope_of(DATA, ZETA_SEED), Reason.NAME_NOT_ALLOWED),
            (forged(DATA), Reason.SIGNATURE_INVALID),
            (mixture_release(fixed("iris", DATA)), Reason.BAD_RELEASE),
        ],
    )
    def test_a_package_without_a_proof_is_refused(self, release: bytes, reason: Reason) -> None:
        assert refusal_of(admit, release=release) is reason

    def test_a_key_that_is_revoked_or_out_of_its_time_proves_nothing(self) -> None:
        release = envelope_of(DATA)

        assert refusal_of(admit, release=release, at=terms(revoked=frozenset({ACME_ID}))) is Reason.KEY_REVOKED
        assert refusal_of(admit, release=release, at=terms(roots(not_after=NOW))) is Reason.KEY_EXPIRED
        assert admit(release=release, at=terms(roots(not_after=NOW + timedelta(seconds=1)))).release == release

    def test_bytes_that_are_not_those_announced_are_refused(self) -> None:
        assert refusal_of(admit, release=envelope_of(DATA), digest=digest_of(OTHER)) is Reason.DIGEST_MISMATCH

    def test_a_trusted_signature_inside_the_file_is_enough_but_gives_no_name(self) -> None:
        data = apr_bytes(linear(), signing=signer(ACME_SEED))

        admitted = admit(data)

        assert (admitted.proof.kind, admitted.embedded_key_id, admitted.release) == ("embedded", ACME_ID, b"")

    def test_a_release_that_proves_nothing_is_refused_even_where_the_signature_inside_would_do(self) -> None:
        data = apr_bytes(linear(), signing=signer(ACME_SEED))

        assert refusal_of(admit, data, envelope_of(data, STRANGER_SEED)) is Reason.SIGNER_NOT_TRUSTED
        assert refusal_of(admit, data, forged(data)) is Reason.SIGNATURE_INVALID
        assert admit(data, envelope_of(data, ZETA_SEED, "zeta/iris@1")).proof.kind == "release"

    def test_the_policy_admits_what_nobody_trusted_signed_without_a_name(self) -> None:
        lenient = terms(allow_unsigned=True)

        for release in (b"", envelope_of(DATA, STRANGER_SEED)):
            admitted = admit(release=release, at=lenient)
            assert (admitted.proof.kind, admitted.proof.release, admitted.release) == ("policy", None, b"")

    def test_the_policy_forgives_nothing_else(self) -> None:
        lenient = terms(allow_unsigned=True, revoked=frozenset({ACME_ID}))

        assert refusal_of(admit, release=envelope_of(DATA), at=lenient) is Reason.KEY_REVOKED
        assert refusal_of(admit, release=envelope_of(DATA, ZETA_SEED), at=lenient) is Reason.NAME_NOT_ALLOWED

    def test_a_model_that_cannot_answer_is_not_taken(self) -> None:
        idle = apr_bytes(mixture(top_k=0))
        unfitted = apr_bytes(replace(linear(), coefficients=None))

        assert refusal_of(admit, idle, envelope_of(idle)) is Reason.NOT_SERVABLE
        assert refusal_of(admit, unfitted, envelope_of(unfitted)) is Reason.NOT_SERVABLE

    def test_a_licence_that_has_ended_is_a_matter_of_policy(self) -> None:
        licence = {"uuid": "u", "hash": "h", "tier": "Team", "expiry": "2026-05-31"}
        metadata = {"created_at": "0", "aprender_version": "0.11.0", "license": licence}
        data = apr_bytes(metadata=metadata)
        release = envelope_of(data)
        lenient = Terms(roots(), Policy(allow_expired_licences=True), frozenset())

        assert refusal_of(admit, data, release) is Reason.LICENCE_EXPIRED
        assert admit(data, release, lenient).release == release
        assert admit(data, release, now=NOW - timedelta(days=2)).release == release

    def test_more_columns_than_an_answer_has_are_not_taken(self) -> None:
        for count in (COLUMNS_MAX, COLUMNS_MAX + 1, 5000):
            model = KMeans(count, np.arange(count, dtype=np.float32).reshape(-1, 1))
            data = apr_bytes(model)
            shown = apr_bytes(model, labels=[*range(COLUMNS_MAX), *[None] * (count - COLUMNS_MAX)])
            assert model_of(admit(shown, envelope_of(shown))).output_columns == count
            if count == COLUMNS_MAX:
                assert model_of(admit(data, envelope_of(data))).output_columns == COLUMNS_MAX
                continue
            with pytest.raises(HocketError, match="fewer classes or clusters") as refusal:
                admit(data, envelope_of(data))
            assert refusal.value.reason is Reason.NOT_SERVABLE

    def test_an_adapter_is_admitted_under_its_own_name_and_version_alone(self) -> None:
        data = expert_package("expert-sql", "0.3.0")

        admitted = admit(data, envelope_of(data, name="acme/expert-sql@0.3.0", format="expert"))

        assert (admitted.facts.format, admitted.facts.name) == ("expert", "expert-sql")
        assert (admitted.embedded_key_id, admitted.mixture) == (None, None)
        for name in ("acme/sql@0.3.0", "acme/expert-sql@0.3.1"):
            release = envelope_of(data, name=name, format="expert")
            assert refusal_of(admit, data, release) is Reason.NAME_MISMATCH
        as_apr = envelope_of(data, name="acme/expert-sql@0.3.0", format="apr")
        assert refusal_of(admit, data, as_apr) is Reason.BAD_RELEASE

    @pytest.mark.parametrize(("name", "version"), [("Expert SQL", "1.0.0"), ("expert-sql", "one and a half")])
    def test_an_adapter_that_no_release_could_name_is_not_taken_by_policy_either(self, name: str, version: str) -> None:
        lenient = terms(allow_unsigned=True)

        assert refusal_of(admit, expert_package(name, version), at=lenient) is Reason.BAD_REQUEST
        assert admit(expert_package("expert-sql", "1.0.0"), at=lenient).proof.kind == "policy"

    def test_sizes_have_limits(self) -> None:
        small = replace(DEFAULT_LIMITS, package_bytes=len(DATA) - 1)
        enough = replace(DEFAULT_LIMITS, package_bytes=len(DATA))

        assert refusal_of(admit, release=envelope_of(DATA), limits=small) is Reason.TOO_LARGE
        assert admit(release=envelope_of(DATA), limits=enough).facts.size_bytes == len(DATA)


class TestOwnMixtures:
    def test_a_file_of_several_experts_is_a_mixture_by_itself(self) -> None:
        data = apr_bytes(mixture(top_k=9))
        digest = digest_of(data)

        own = admit(data, envelope_of(data)).mixture

        assert own is not None
        assert own.record.name == f"apr-{digest.removeprefix('sha256:')[:16]}"
        assert [str(member) for member in own.record.members] == [digest, f"{digest}#1"]
        assert (own.record.top_k, own.record.capacity_factor, own.record.labels) == (2, None, None)
        gate = own.record.gate
        assert isinstance(gate, SoftmaxGate)
        assert (gate.features, gate.experts, gate.temperature, gate.bias) == (2, 2, 0.5, None)
        check_gate(own.record, own.gate)

    def test_an_encrypted_file_is_none_for_its_gate_cannot_be_read(self) -> None:
        data = apr_bytes(mixture(), encryption=KEY.recipient)
        admitted = admit(data, envelope_of(data))

        assert admitted.mixture is None
        assert model_of(admitted).expert_count == 2


class TestEncryptedPackages:
    def test_an_encrypted_package_counts_as_what_it_declares(self) -> None:
        clear = apr_bytes(logistic(), labels=["a", "b"])
        data = apr_bytes(logistic(), labels=["a", "b"], encryption=KEY.recipient)
        facts, twin = model_of(admit(data, envelope_of(data))), model_of(admit(clear, envelope_of(clear)))

        assert facts.encrypted
        for name in ("layout", "labels", "n_features", "output_columns", "output_range", "parameter_bytes"):
            assert getattr(facts, name) == getattr(twin, name)

    def test_one_that_declares_nothing_is_not_taken(self) -> None:
        data = raw_apr(bytes(100), flags=Flag.ENCRYPTED)
        assert refusal_of(admit, data, envelope_of(data)) is Reason.ENCRYPTED
        assert refusal_of(admit, data) is Reason.UNSIGNED

    def test_what_it_declares_has_the_limits_of_what_is_read(self) -> None:
        model = KMeans(COLUMNS_MAX + 1, np.zeros((COLUMNS_MAX + 1, 1), np.float32))
        data = apr_bytes(model, encryption=KEY.recipient)
        assert refusal_of(admit, data, envelope_of(data)) is Reason.NOT_SERVABLE


class TestMixtures:
    RECORD = fixed("digits", DATA, OTHER)

    def admit(self, record: MixtureRecord, release: bytes, at: Terms | None = None) -> AdmittedMixture:
        return admit_mixture(record.body(), release, terms=at or terms(), now=NOW)

    def test_a_mixture_with_a_trusted_release_under_its_own_name_is_admitted(self) -> None:
        admitted = self.admit(self.RECORD, mixture_release(self.RECORD))

        assert admitted.record == self.RECORD
        assert admitted.subject.digest == self.RECORD.digest

    def test_a_release_under_another_name_is_refused(self) -> None:
        release = mixture_release(self.RECORD, name="acme/letters@1.0.0")

        assert refusal_of(self.admit, self.RECORD, release) is Reason.BAD_MIXTURE

    @pytest.mark.parametrize(
        ("release", "reason"),
        [
            (b"", Reason.UNSIGNED),
            (mixture_release(RECORD, STRANGER_SEED), Reason.SIGNER_NOT_TRUSTED),
            (mixture_release(RECORD, ZETA_SEED), Reason.NAME_NOT_ALLOWED),
            (mixture_release(fixed("digits", OTHER, DATA)), Reason.DIGEST_MISMATCH),
            (envelope_of(RECORD.body(), name="acme/digits@1.0.0", format="mixture"), Reason.BAD_RELEASE),
        ],
    )
    def test_a_mixture_without_a_proof_is_refused(self, release: bytes, reason: Reason) -> None:
        assert refusal_of(self.admit, self.RECORD, release) is reason

    def test_the_proof_is_looked_at_before_the_body(self) -> None:
        assert refusal_of(admit_mixture, b"{", b"", terms=terms(), now=NOW) is Reason.UNSIGNED
        lenient = terms(allow_unsigned=True)
        assert refusal_of(admit_mixture, b"{", b"", terms=lenient, now=NOW) is Reason.BAD_MIXTURE

    def test_names_of_packages_own_mixtures_are_kept_for_them(self) -> None:
        kept, free = fixed("apr-" + "0" * 16, DATA), fixed("apr-" + "0" * 15, DATA)

        assert refusal_of(self.admit, kept, mixture_release(kept)) is Reason.NAME_TAKEN
        assert self.admit(free, mixture_release(free)).record == free

    def test_the_policy_admits_an_unsigned_mixture(self) -> None:
        assert self.admit(self.RECORD, b"", terms(allow_unsigned=True)).proof.kind == "policy"

    def test_a_gate_has_its_tensor_or_none(self) -> None:
        record, tensor = gated("digits", DATA, OTHER)

        check_gate(record, tensor)
        check_gate(self.RECORD, b"")
        assert refusal_of(check_gate, record, tensor[:-4] + b"\0\0\0\0") is Reason.DIGEST_MISMATCH
        assert refusal_of(check_gate, self.RECORD, tensor) is Reason.BAD_MIXTURE


class TestJudging:
    SUBJECT = package_subject(digest_of(DATA), len(DATA), "apr")
    ACME = Dated(envelope_of(DATA), NOW)
    ZETA = Dated(envelope_of(DATA, ZETA_SEED, "zeta/iris@1"), NOW)

    def judge(self, *releases: Dated, embedded: str | None = None, at: Terms | None = None) -> tuple[State, bool]:
        standing = judge(self.SUBJECT, releases, embedded, NOW, at or terms())
        return standing.state, standing.by_policy

    def test_one_proof_is_enough(self) -> None:
        standing = judge(self.SUBJECT, (self.ACME, self.ZETA), STRANGER_ID, NOW, terms(revoked=frozenset({ACME_ID})))

        assert (standing.state, standing.by_policy) == (State.ACTIVE, False)
        assert standing.releases == (State.KEY_REVOKED, State.ACTIVE)
        assert not standing.embedded_trusted

    def test_without_a_proof_it_says_whether_a_key_was_revoked(self) -> None:
        assert self.judge(self.ACME, at=terms(revoked=frozenset({ACME_ID}))) == (State.KEY_REVOKED, False)
        assert self.judge(self.ACME, at=terms(TrustRoots())) == (State.UNTRUSTED, False)
        assert self.judge(embedded=STRANGER_ID) == (State.UNTRUSTED, False)
        assert self.judge(embedded=ACME_ID) == (State.ACTIVE, False)

    def test_the_policy_goes_on_admitting_what_nobody_trusts_but_not_what_is_revoked(self) -> None:
        lenient = terms(TrustRoots(), allow_unsigned=True)

        assert self.judge(at=lenient) == (State.ACTIVE, True)
        assert self.judge(self.ACME, at=lenient) == (State.ACTIVE, True)
        assert self.judge(self.ACME, embedded=STRANGER_ID, at=lenient) == (State.ACTIVE, True)
        revoked = replace(lenient, revoked=frozenset({ACME_ID}))
        assert self.judge(self.ACME, self.ZETA, at=revoked) == (State.KEY_REVOKED, False)
        assert self.judge(at=terms()) == (State.UNTRUSTED, False)

    def test_that_a_keys_time_runs_out_withdraws_nothing(self) -> None:
        ended = terms(roots(not_after=NOW + timedelta(seconds=1)))
        ended_before = terms(roots(not_after=NOW))

        assert self.judge(self.ACME, at=ended) == (State.ACTIVE, False)
        assert self.judge(self.ACME, at=ended_before) == (State.UNTRUSTED, False)

    def test_each_release_is_judged_as_of_the_moment_it_came(self) -> None:
        trust = TrustRoots.of([trusted(not_after=NOW), trusted(ZETA_SEED, "zeta", not_before=NOW)])
        earlier = replace(self.ACME, time=NOW - timedelta(days=1))

        standing = judge(self.SUBJECT, (earlier, self.ZETA), None, NOW, terms(trust))

        assert standing.releases == (State.ACTIVE, State.ACTIVE)

    @settings(max_examples=40, deadline=None)
    @given(
        sets=st.tuples(*[st.booleans()] * 3),
        revoked=st.sets(st.sampled_from([ACME_ID, ZETA_ID])),
        known=st.sets(st.sampled_from([(ACME_SEED, "acme"), (ZETA_SEED, "zeta")])),
        allow_unsigned=st.booleans(),
    )
    def test_it_serves_exactly_if_a_proof_holds_or_policy_steps_in(
        self,
        sets: tuple[bool, bool, bool],
        revoked: set[str],
        known: set[tuple[bytes, str]],
        allow_unsigned: bool,  # noqa: FBT001 - drawn by hypothesis
    ) -> None:
        acme, zeta, embedded = sets
        trust = TrustRoots.of([trusted(seed, publisher) for seed, publisher in sorted(known)])
        releases = [self.ACME] * acme + [self.ZETA] * zeta
        at = terms(trust, allow_unsigned=allow_unsigned, revoked=frozenset(revoked))

        standing = judge(self.SUBJECT, releases, ACME_ID if embedded else None, NOW, at)

        keys = {key for key, there in ((ACME_ID, acme or embedded), (ZETA_ID, zeta)) if there}
        proven = bool((keys & set(trust.keys)) - revoked)
        assert standing.by_policy == (allow_unsigned and not proven and not keys & revoked)
        assert (standing.state is State.ACTIVE) == (proven or standing.by_policy)


class TestAlignment:
    def align(self, record: MixtureRecord, *members: Shape) -> Shape:
        return align(record, members)

    def classifier(self, *labels: str | None, features: int | None = 2, least: int = 2) -> Shape:
        return expert_shape(features, least, labels, len(labels))

    def regressor(self, features: int | None = 2, least: int = 2, columns: int = 1) -> Shape:
        return expert_shape(features, least, None, columns)

    def record(self, count: int = 2, **changes: Any) -> MixtureRecord:
        return fixed("m", *[f"sha256:{'0' * 64}#{index + 1}" for index in range(count)], **changes)

    def gate(self, features: int) -> MixtureRecord:
        return self.record(gate=SoftmaxGate(features, 2, "sha256:" + "0" * 64))

    def test_labels_are_the_records_or_the_members_in_order(self) -> None:
        members = self.classifier("b", "a"), self.classifier("c", None)

        assert self.align(self.record(), *members).labels == ("b", "a", "c")
        listed = self.align(self.record(labels=("a", "b", "c", "d")), *members)
        assert (listed.labels, listed.column_count) == (("a", "b", "c", "d"), 4)

    def test_a_label_that_the_record_does_not_list_is_refused(self) -> None:
        members = self.classifier("a", "b"), self.classifier("c", None)

        reason = refusal_of(self.align, self.record(labels=("a", "b")), *members)

        assert reason is Reason.MEMBERS_NOT_ALIGNED
        assert self.align(self.record(labels=("a", "b", "c")), *members).labels == ("a", "b", "c")

    def test_labels_and_numbers_do_not_mix(self) -> None:
        reason = refusal_of(self.align, self.record(), self.classifier("a", "b"), self.regressor())

        assert reason is Reason.MEMBERS_NOT_ALIGNED
        assert self.align(self.record(), self.regressor(), self.regressor()).labels is None

    def test_numbers_have_no_labels_and_as_many_columns(self) -> None:
        pair = self.regressor(), self.regressor()

        assert refusal_of(self.align, self.record(labels=("a",)), *pair) is Reason.MEMBERS_NOT_ALIGNED
        uneven = self.regressor(), self.regressor(columns=2)
        assert refusal_of(self.align, self.record(), *uneven) is Reason.MEMBERS_NOT_ALIGNED

    def test_all_read_an_input_of_the_same_width(self) -> None:
        uneven = self.regressor(features=2), self.regressor(features=3, least=3)

        assert refusal_of(self.align, self.record(), *uneven) is Reason.MEMBERS_NOT_ALIGNED
        assert refusal_of(self.align, self.gate(3), self.regressor(), self.regressor()) is Reason.MEMBERS_NOT_ALIGNED
        assert self.align(self.gate(2), self.regressor(), self.regressor()).feature_count == 2

    def test_members_that_say_no_width_go_with_any_they_can_read(self) -> None:
        shy, shyer = self.regressor(features=None, least=2), self.regressor(features=None, least=3)

        assert self.align(self.gate(3), shy, shyer).feature_count == 3
        assert refusal_of(self.align, self.gate(2), shy, shyer) is Reason.MEMBERS_NOT_ALIGNED
        open_ended = self.align(self.record(), shy, shyer)
        assert (open_ended.feature_count, open_ended.feature_count_min) == (None, 3)

    def test_mixtures_nest_twice_and_no_deeper(self) -> None:
        inner = self.align(self.record(), self.regressor(), self.regressor())
        middle = self.align(self.record(), inner, self.regressor())

        assert (inner.depth, middle.depth) == (1, 2)
        assert (inner.expert_count, middle.expert_count) == (2, 3)
        assert refusal_of(self.align, self.record(), middle, self.regressor()) is Reason.BAD_MIXTURE

    def test_nesting_does_not_get_around_the_limit_on_experts(self) -> None:
        half, more = replace(self.regressor(), expert_count=5000), replace(self.regressor(), expert_count=5001)

        assert self.align(self.record(), half, half).expert_count == 10_000
        assert refusal_of(self.align, self.record(), half, more) is Reason.BAD_MIXTURE

    def test_labels_in_all_have_a_limit(self) -> None:
        many = self.classifier(*[f"l{index}" for index in range(4096)])

        assert len(self.align(self.record(), many, many).labels or ()) == 4096
        reason = refusal_of(self.align, self.record(), many, self.classifier("one", "more"))
        assert reason is Reason.MEMBERS_NOT_ALIGNED

    @pytest.mark.parametrize("labels", [None, ("a", "b")])
    def test_a_shape_survives_being_stored(self, labels: tuple[str, ...] | None) -> None:
        shape = expert_shape(2, 2, labels, 2)

        assert Shape.of_document(asdict(shape)) == shape
