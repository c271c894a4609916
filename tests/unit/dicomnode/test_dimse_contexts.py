"""The table of SOP classes and transfer syntaxes holds what PS3.6 names."""

import pydicom.uid
import pynetdicom  # its import completes pydicom's dictionary of transfer syntaxes
import pytest
from pynetdicom.sop_class import _STORAGE_CLASSES

from dicomnode.dimse.contexts import (
    EXCLUDED_TRANSFER_SYNTAXES,
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    STORAGE_CLASSES,
    TRANSFER_SYNTAXES,
    offered_syntaxes,
    storage_class,
    transfer_syntax,
)
from dicomnode.dimse.scp import is_uid


def test_every_transfer_syntax_of_the_standard_is_accepted_or_excluded_with_a_reason():
    assert pynetdicom.__version__ == "3.0.4"
    known = {uid for uid, entry in pydicom.uid.UID_dictionary.items() if entry[1] == "Transfer Syntax"}
    accepted = [row.uid for row in offered_syntaxes(accept_deflated=True)]
    excluded = [uid for uid, _, _ in EXCLUDED_TRANSFER_SYNTAXES]
    assert len(accepted) == len(set(accepted))
    assert set(accepted).isdisjoint(excluded)
    assert set(accepted) | set(excluded) == known


def test_names_are_those_of_the_standard():
    for row in (*TRANSFER_SYNTAXES, *STORAGE_CLASSES):
        if row.uid in pydicom.uid.UID_dictionary:
            assert row.name.removesuffix(" (Retired)") == pydicom.uid.UID_dictionary[row.uid][0]


def test_storage_classes_are_distinct_and_cover_what_the_network_library_calls_storage():
    uids = [row.uid for row in STORAGE_CLASSES]
    assert len(uids) == len(set(uids))
    missing = set(_STORAGE_CLASSES.values()) - set(uids)
    assert all(uid.startswith("1.2.840.10008.5.1.4.1.1.9.100.") for uid in missing)  # real-time video and audio: not for C-STORE


@pytest.mark.parametrize("uid", ["2", "2.1", "4", "1", "1.1", "1.2.1", "128", "20", "6.1", "3.1", "12.1", "13.1.3", "7", "77.1.6", "481.1"])
def test_acquisitions_are_images(uid):
    assert storage_class(f"1.2.840.10008.5.1.4.1.1.{uid}").kind == "image"


@pytest.mark.parametrize("uid", ["66.4", "66.7", "30", "88.34", "88.59", "11.1", "481.3", "481.2", "104.1", "66", "66.1", "67", "4.2"])
def test_results_and_documents_are_no_images(uid):
    assert storage_class(f"1.2.840.10008.5.1.4.1.1.{uid}").kind == "other"


def test_encodings():
    assert [(s.explicit_vr, s.little_endian) for s in TRANSFER_SYNTAXES[:1]] == [(False, True)]
    assert not transfer_syntax("1.2.840.10008.1.2.2").little_endian
    assert transfer_syntax("1.2.840.10008.1.2.4.107").pixels == "video"
    assert transfer_syntax("1.2.840.10008.1.2.1.98").pixels == "frames"
    assert transfer_syntax("1.2.840.10008.1.2.1.98").deflated is False
    assert transfer_syntax("1.2.840.10008.1.2.4.94") is None


def test_deflated_data_sets_are_accepted_only_where_the_installer_says_so():
    deflated = transfer_syntax("1.2.840.10008.1.2.1.99")
    assert (deflated.deflated, deflated.explicit_vr, deflated.little_endian, deflated.pixels) == (True, True, True, "native")
    assert deflated not in offered_syntaxes(accept_deflated=False)
    assert set(offered_syntaxes(accept_deflated=True)) == {*offered_syntaxes(accept_deflated=False), deflated}


def test_the_node_names_itself_within_the_limits_of_the_standard():
    assert is_uid(IMPLEMENTATION_CLASS_UID)
    assert len(IMPLEMENTATION_VERSION_NAME) <= 16
