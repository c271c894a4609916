"""OHIF on the node's own DICOMweb: study, SEG and SR straight from the node, without a PACS between them."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_ohif import key_image_is_right, report_is_in_its_place, segment_is_in_its_place

from dicomnode.results.profile import PROFILES
from dicomweb_site import keep_as_results, serving
from ohif import Viewer, chromium, ohif_or_skip, screenshots, served
from shown_studies import chest_ct

pytestmark = pytest.mark.system


def test_ohif_reads_study_seg_and_sr_from_the_node(tmp_path: Path) -> None:
    dist, study = ohif_or_skip(), chest_ct(tmp_path / "study")
    results = study.results(PROFILES["ohif"])
    assert sorted(one.modality for one in results) == ["OT", "SEG", "SR"]
    (picture,) = (one for one in results if one.modality == "OT")
    with serving(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}") as site:
        assert site.stow(*(file.read_bytes() for file in study.files))[0] == 200
        keep_as_results(site.storage, study.study_instance_uid, *(bytes(one.data) for one in results))
        with served(dist, site.web.port) as address, chromium() as browser:
            viewer = Viewer(browser, address, screenshots(tmp_path / "screenshots") / "from-the-node")
            viewer.open(study.study_instance_uid)
            report_is_in_its_place(viewer, study)
            segment_is_in_its_place(viewer, study)
            key_image_is_right(viewer, study, picture)
            assert viewer.errors == []
