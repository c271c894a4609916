"""An open storage on each database, and what a received image looks like to it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage import Storage, open_storage, prepare_storage
from storage.records import InstanceHeader, Revision, StoredObject

STUDY_UID = "1.2.826.0.1.3680043.8.498.1"

HEADER = InstanceHeader(
    sop_instance_uid="1.2.826.0.1.3680043.8.498.1.1.1",
    sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
    transfer_syntax_uid="1.2.840.10008.1.2.1",
    series_instance_uid="1.2.826.0.1.3680043.8.498.1.1",
    study_instance_uid=STUDY_UID,
    dataset_sha256=hashlib.sha256(b"DICM").hexdigest(),
    kind="image",
    modality="CT",
    instance_number=1,
    patient_id="P1",
    patient_name="Doe^Jane",
    study_date="20261122",
    study_description="Chest",
    accession_number="A1",
    series_number=2,
    series_description="Lung",
    requested_priority="routine",
    calling_ae_title="SCANNER",
    called_ae_title="NODE",
)


@pytest.fixture
def storage(database_url: str, tmp_path: Path) -> Iterator[Storage]:
    prepare_storage(database_url, tmp_path)
    opened = open_storage(database_url, tmp_path)
    yield opened
    opened.database.close()


@pytest.fixture
def header() -> Callable[..., InstanceHeader]:
    """Makes the header of one CT slice of one study, with what the test changes."""
    return lambda number=1, **changes: dataclasses.replace(
        HEADER, **{"sop_instance_uid": f"{HEADER.series_instance_uid}.{number}", "instance_number": number, **changes}
    )


@pytest.fixture
def receive(storage: Storage, header: Callable[..., InstanceHeader]) -> Callable[..., str]:
    """Stores an object and adds its row, as the receiver does."""
    return lambda number=1, **changes: storage.index.add_instance(header(number, **changes), storage.objects.put(b"DICM"))


@pytest.fixture
def close(storage: Storage) -> Callable[..., Revision | None]:
    """Closes a revision of the study as it is now."""

    def close_now(study_uid: str = STUDY_UID) -> Revision | None:
        study = storage.index.study(study_uid)
        assert study is not None
        with storage.database.writing() as connection:
            return storage.index.close_revision(
                connection, study_uid, seen_last_received_at=study.last_received_at, evidence="quiet for 30 s", outcome="jobs"
            )

    return close_now


@pytest.fixture
def stored() -> Callable[[int], StoredObject]:
    """Makes the record of an object whose file no test looks at."""
    return lambda number: StoredObject(object_id=f"{number:032x}", sha256=hashlib.sha256(str(number).encode()).hexdigest(), size=4)
