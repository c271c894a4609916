"""What the site's rules let go: nothing by default, the old ones by age, the oldest by quota, and none that is still needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from held_studies import PACS, create_job, hold, receive

from dicomnode.cli import run
from dicomnode.config import RetentionSection
from dicomnode.retention import remove_due, verdicts
from storage import Storage, open_storage, prepare_storage

LATER = timedelta(days=40)
BY_AGE = RetentionSection(days=30, priors=0)


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    url = f"sqlite:///{tmp_path / 'dicomnode.sqlite'}"
    prepare_storage(url, tmp_path)
    opened = open_storage(url, tmp_path)
    yield opened
    opened.database.close()


def goes(storage: Storage, settings: RetentionSection, after: timedelta = LATER) -> dict[str, str]:
    """Which studies would go, and why."""
    found = verdicts(storage, settings, datetime.now(UTC) + after, all_studies=False)
    return {each.holding.study_instance_uid: each.why for each in found if each.goes}


def kept(storage: Storage, settings: RetentionSection, after: timedelta = LATER) -> dict[str, str]:
    """Which would stay, and why."""
    found = verdicts(storage, settings, datetime.now(UTC) + after, all_studies=True)
    return {each.holding.study_instance_uid: each.why for each in found if not each.goes}


def test_without_a_rule_everything_stays_for_ever(storage: Storage) -> None:
    study = hold(storage)
    assert goes(storage, RetentionSection(), timedelta(days=10_000)) == {}
    assert kept(storage, RetentionSection(), timedelta(days=10_000)) == {study: "no rule asks for its space"}
    assert remove_due(storage, RetentionSection(), datetime.now(UTC) + timedelta(days=10_000)) == []


def test_by_age_goes_what_nothing_happened_to_for_so_long(storage: Storage) -> None:
    study = hold(storage)
    assert goes(storage, BY_AGE, timedelta(days=29)) == {}
    assert goes(storage, BY_AGE) == {study: "nothing happened to it for 30 days"}
    assert [each.holding.study_instance_uid for each in remove_due(storage, BY_AGE, datetime.now(UTC) + LATER)] == [study]
    assert storage.counters.all() == {"studies removed": 1, "objects removed": 3, "bytes removed": 14}
    assert remove_due(storage, BY_AGE, datetime.now(UTC) + LATER) == []


@pytest.mark.parametrize(
    ("about", "why", "unless"),
    [
        ({"analysis": "queued"}, "isn't finished", None),
        ({"analysis": "running"}, "isn't finished", None),
        ({"analysis": "failed"}, "no analysis of it has ended", {"unanalysed_days": 30}),
        ({"analysis": "cancelled"}, "no analysis of it has ended", {"unanalysed_days": 30}),
        ({"analysis": None}, "no analysis of it has ended", {"unanalysed_days": 30}),
        ({"priority": "stat"}, "urgent", {"keep_stat": False}),
        ({"delivery": "waiting", "deliver_state": "queued"}, "isn't finished", None),
        ({"delivery": "failed", "deliver_state": "failed"}, "PACS: not all of its results are delivered", {"undelivered_days": 30}),
        ({"delivery": "sent"}, "PACS: not committed", {"until_committed": False}),
        ({"delivery": "sent"}, "PACS: not committed", {"undelivered_days": 30}),
    ],
)
def test_what_is_still_needed_stays_whatever_its_age_and_the_quota(
    storage: Storage, about: dict[str, Any], why: str, unless: dict[str, Any] | None
) -> None:
    storage.registry.add_peer(replace(PACS, commits=True))
    study = hold(storage, **{"delivery": "committed", **about})
    for rule in (BY_AGE, RetentionSection(quota_bytes=1, priors=0)):
        assert why in kept(storage, rule)[study]
        assert remove_due(storage, rule, datetime.now(UTC) + LATER) == []
        if unless is not None:
            assert list(goes(storage, rule.model_copy(update=unless))) == [study]


@pytest.mark.parametrize(("analysis", "delivery"), [("refused", None), ("done", None), ("done", "committed")])
def test_a_study_that_has_ended_well_goes(storage: Storage, analysis: Any, delivery: Any) -> None:
    storage.registry.add_peer(replace(PACS, commits=True))
    study = hold(storage, analysis=analysis, delivery=delivery)
    assert list(goes(storage, BY_AGE)) == [study]


def receiving_again(storage: Storage, study: str) -> None:
    receive(storage, study, 77, patient="P")


def next_study(storage: Storage, study: str) -> None:
    receive(storage, f"{study}.5", 1, patient="P")


def again(storage: Storage, study: str) -> None:
    create_job(storage, study, kind="again")


@pytest.mark.parametrize(
    ("happens", "why"), [(receiving_again, "images came"), (next_study, "another study of the patient"), (again, "isn't finished")]
)
def test_a_study_at_which_something_is_going_on_stays(storage: Storage, happens: Callable[[Storage, str], None], why: str) -> None:
    study = hold(storage, patient="P")
    assert list(goes(storage, BY_AGE)) == [study]
    happens(storage, study)
    assert goes(storage, BY_AGE) == {}
    assert why in kept(storage, BY_AGE)[study]


def test_the_last_studies_of_a_patient_stay_to_be_compared_with_for_a_time(storage: Storage) -> None:
    first, second, third = (hold(storage, patient="P") for _ in range(3))
    other, unknown = hold(storage), hold(storage, patient=" ")
    rule = RetentionSection(days=30, priors=2, prior_days=100)
    assert list(goes(storage, rule)) == [first, unknown]
    assert set(kept(storage, rule).values()) == {"it is what a later study of the patient would be compared with"}
    assert set(kept(storage, rule)) == {second, third, other}
    assert list(goes(storage, rule, timedelta(days=101))) == [first, second, third, other, unknown]


def test_a_quota_takes_the_oldest_of_many_and_no_more_than_it_must(storage: Storage, tmp_path: Path) -> None:
    studies = [hold(storage, images=1, content=b"x" * 94, delivery="sent" if n % 10 else None) for n in range(60)]
    urgent = hold(storage, images=1, content=b"x" * 94, priority="stat")
    held = storage.retention.held_bytes()
    assert held == 61 * 94 + 55 * 6
    rule = RetentionSection(quota_bytes=held // 2, priors=0)
    assert goes(storage, rule, timedelta(hours=23)) == {}  # none is a day old
    removed = remove_due(storage, rule, datetime.now(UTC) + LATER)
    oldest = [each.holding.study_instance_uid for each in removed]
    assert oldest == studies[: len(oldest)]
    assert held // 2 - 100 < storage.retention.held_bytes() <= held // 2
    assert len(list(tmp_path.rglob("*.dcm"))) == sum(each.objects for each in storage.retention.holdings())
    everything = RetentionSection(quota_bytes=1, priors=0)
    remove_due(storage, everything, datetime.now(UTC) + LATER)
    assert [each.study_instance_uid for each in storage.retention.holdings()] == [urgent]


def test_for_a_quota_the_studies_to_compare_with_go_last(storage: Storage) -> None:
    prior, alone = hold(storage, patient="P"), hold(storage, analysis="refused", delivery=None)
    assert list(goes(storage, RetentionSection(quota_bytes=14))) == [alone]
    assert list(goes(storage, RetentionSection(quota_bytes=1))) == [alone, prior]


def test_a_share_of_the_disk_is_a_quota_too(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    studies = [hold(storage) for _ in range(4)]
    monkeypatch.setattr(storage.objects, "total_bytes", lambda: 100)
    monkeypatch.setattr(storage.objects, "free_bytes", lambda: 20)
    rule = RetentionSection(priors=0)
    assert goes(storage, rule.model_copy(update={"disk_share": 0.8})) == {}
    assert list(goes(storage, rule.model_copy(update={"disk_share": 0.6}))) == studies[:2]  # 20 bytes, of 14 each


def test_the_command_shows_what_would_go_and_why_and_removes_it_when_told(
    storage: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, urgent = hold(storage), hold(storage, priority="stat")
    config, file = ["--config", str(tmp_path / "dicomnode.toml")], tmp_path / "dicomnode.toml"
    file.write_text(f'[node]\ndata = "{tmp_path}"\n')
    assert run(["retention", *config]) == 0
    assert run(["retention", "--apply", *config]) == 2
    assert "set days, quota_bytes or disk_share" in capsys.readouterr().err
    file.write_text(f'[node]\ndata = "{tmp_path}"\n[retention]\nquota_bytes = 1\nminimum_days = 0\n')
    assert run(["retention", "--apply", "--kept", *config]) == 2
    capsys.readouterr()
    assert run(["retention", "--kept", "--json", *config]) == 0
    shown = {row["study_instance_uid"]: row for row in json.loads(capsys.readouterr().out)}
    assert {uid: row["goes"] for uid, row in shown.items()} == {study: True, urgent: False}
    assert (shown[study]["objects"], shown[study]["bytes"], shown[urgent]["why"]) == (3, 14, "it was urgent (STAT)")
    assert run(["retention", "--apply", *config]) == 0
    assert study in capsys.readouterr().out
    assert [each.study_instance_uid for each in storage.retention.holdings()] == [urgent]
    (job,) = storage.jobs.jobs(study_instance_uid=study, kind="analyse")
    for words in (["study", "reanalyse", study], ["job", "retry", job.key]):
        assert run([*words, *config]) == 2
        assert "send the study again" in capsys.readouterr().err
    assert run(["metrics", *config]) == 0
    metrics = capsys.readouterr().out
    assert "dicomnode_studies_removed_total 1\n" in metrics
    assert "dicomnode_intake_stopped_now 0\n" in metrics
