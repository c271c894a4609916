"""A MONAI Bundle's metadata becomes a manifest that is sound, with codes that are right and a list of what is open."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydicom.sr._concepts_dict import concepts

import zoo_bundles
from dicomnode.analysis.draft import draft_manifest
from dicomnode.analysis.manifest import Manifest, parse_manifest
from dicomnode.analysis.terms import find_abnormal, term_of, terms
from dicomnode.errors import PackageError

# Codes of SNOMED CT that PS3.16 doesn't list; they are those of the mappings that TotalSegmentator and AAPM TG-263 publish.
NOT_IN_DICOM = {
    "Deep muscle of back", "Gluteus maximus muscle", "Gluteus medius muscle", "Gluteus minimus muscle", "Iliopsoas muscle", "Myocardium",
    "Portal vein and splenic vein", "Renal cortex", "S1 vertebra", "First rib", "Second rib", "Third rib", "Fourth rib", "Fifth rib",
    "Sixth rib", "Seventh rib", "Eighth rib", "Ninth rib", "Tenth rib", "Eleventh rib", "Twelfth rib",
}  # fmt: skip

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("zoo")
    return {name: zoo_bundles.write_bundle(folder, name) for name in zoo_bundles.BUNDLES}


def manifest_of(bundle: Path) -> Manifest:
    return draft_manifest(bundle).manifest


def changed(folder: Path, bundle: Path, change: Change) -> Path:
    """A bundle's configurations with one change to its metadata."""
    copy = folder / bundle.name
    (copy / "configs").mkdir(parents=True)
    metadata = json.loads((bundle / "configs/metadata.json").read_text())
    change(metadata)
    (copy / "configs/metadata.json").write_text(json.dumps(metadata))
    (copy / "configs/inference.json").write_bytes((bundle / "configs/inference.json").read_bytes())
    return copy


@pytest.mark.parametrize("name", zoo_bundles.BUNDLES)
def test_the_text_of_a_draft_is_the_manifest_that_it_was_made_of(bundles: dict[str, Path], name: str) -> None:
    draft = draft_manifest(bundles[name])
    assert parse_manifest(draft.text.encode(), bundles[name]) == draft.manifest
    assert draft.manifest.intended_use.startswith("RESEARCH USE ONLY")
    assert draft.manifest.decide
    assert draft.manifest.licence == "Apache-2.0"
    assert draft.text == draft_manifest(bundles[name]).text


def test_name_and_version_are_the_bundles_made_to_fit(bundles: dict[str, Path]) -> None:
    assert {(m.name, m.version) for m in map(manifest_of, bundles.values())} >= {
        ("spleen_ct_segmentation", "0.5.8"),
        ("wholebody_ct_segmentation", "0.2.7"),
        ("renalstructures_unest_segmentation", "0.2.5"),
    }


def test_spleen_is_one_ct_and_one_organ_without_its_background(bundles: dict[str, Path]) -> None:
    manifest = manifest_of(bundles["spleen_ct_segmentation"])
    assert [accepts.modalities for accepts in manifest.inputs] == [("CT",)]
    assert [(o.channel, o.activation, o.components, o.type.value) for o in manifest.outputs] == [(1, "softmax", "one", "78961009")]


def test_brats_wants_four_weightings_in_the_order_of_the_bundle_and_finds_overlapping_lesions(bundles: dict[str, Path]) -> None:
    manifest = manifest_of(bundles["brats_mri_segmentation"])
    assert [(accepts.name, accepts.mr_contrasts) for accepts in manifest.inputs] == [
        ("t1c", ("t1c",)),
        ("t1", ("t1",)),
        ("t2", ("t2",)),
        ("flair", ("flair",)),
    ]
    assert [(o.channel, o.activation, o.components) for o in manifest.outputs] == [(n, "sigmoid", "each") for n in range(3)]
    assert {o.site.value for o in manifest.outputs if o.site} == {"12738006"}
    assert any("Tumor core" in line for line in manifest.decide)


def test_all_104_structures_of_the_whole_body_have_a_code_of_their_own(bundles: dict[str, Path]) -> None:
    manifest = manifest_of(bundles["wholeBody_ct_segmentation"])
    assert [o.label for o in manifest.outputs] == zoo_bundles.TOTAL
    assert len({(o.type.value, o.side) for o in manifest.outputs}) == 104
    assert all(term_of(label).exact for label in zoo_bundles.TOTAL)
    sides = {o.label: o.side for o in manifest.outputs}
    assert sides["kidney_left"] == "left"
    assert sides["rib_right_7"] == "right"
    assert sides["heart_ventricle_left"] is None  # no side of the body
    assert all(
        side is not None for label, side in sides.items() if label.endswith(("_left", "_right")) and label[:5] not in ("heart", "lung_")
    )
    assert any("maximum_findings" in line for line in manifest.decide)


def test_a_detection_names_its_boxes_after_what_it_is_for(bundles: dict[str, Path]) -> None:
    manifest = manifest_of(bundles["lung_nodule_ct_detection"])
    assert manifest.kind == "detection"
    [output] = manifest.outputs
    assert (output.channel, output.label, output.type.value, output.minimum_score) == (0, "Lung nodule", "27925004", 0.02)
    assert any("minimum_score" in line for line in manifest.decide)


def test_classes_of_a_classification_are_findings_but_for_the_normal_one(bundles: dict[str, Path]) -> None:
    chest, breast = manifest_of(bundles["cxr_densenet_classification"]), manifest_of(bundles["breast_density_classification"])
    assert chest.kind == breast.kind == "classification"
    assert [(o.label, o.finding, o.activation) for o in chest.outputs] == [("normal", False, "softmax"), ("pneumonia", True, "softmax")]
    assert (chest.inputs[0].modalities, chest.inputs[0].dimensions) == (("CR", "DX"), 2)
    assert (breast.inputs[0].modalities, breast.inputs[0].dimensions) == (("MG",), 2)
    assert [o.type.value for o in breast.outputs] == ["129716005", "129717001", "129718006", "129719003"]  # CID 6000


def test_a_yaml_configuration_is_read_as_data(bundles: dict[str, Path]) -> None:
    manifest = manifest_of(bundles["segmentation_template"])
    assert manifest.bundle is not None
    assert manifest.bundle.config == "configs/inference.yaml"
    assert [(o.label, o.components) for o in manifest.outputs] == [("liver", "one"), ("spleen", "one"), ("hepatic tumor", "each")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["network_data_format"]["inputs"]["image"].update(modality="endoscopy"), "CT, MR and X-ray"),
        (lambda m: m["network_data_format"]["outputs"]["pred"].update(format="image"), "segmentations, detections"),
        (lambda m: m["network_data_format"]["outputs"]["pred"].update(channel_def={"0": "background"}), "no output but background"),
        (lambda m: m["network_data_format"]["inputs"]["image"].update(num_channels=3), "wants 3 channels of CT"),
        (lambda m: m.pop("network_data_format"), "no network_data_format"),
    ],
)
def test_what_no_manifest_can_be_made_of_is_refused_with_the_reason(
    bundles: dict[str, Path], tmp_path: Path, change: Change, said: str
) -> None:
    def without_words(metadata: dict[str, Any]) -> None:
        for key in ("task", "name", "description"):
            metadata[key] = "A model"
        change(metadata)

    with pytest.raises(PackageError, match=said):
        draft_manifest(changed(tmp_path, bundles["spleen_ct_segmentation"], without_words))


def test_a_weighting_that_the_description_names_alone_is_asked_for(bundles: dict[str, Path], tmp_path: Path) -> None:
    prostate = bundles["prostate_mri_anatomy"]
    assert manifest_of(prostate).inputs[0].mr_contrasts == ()
    told = changed(tmp_path, prostate, lambda m: m.update(description="Whole brain segmentation from T1W MRI image"))
    assert manifest_of(told).inputs[0].mr_contrasts == ("t1",)


def test_a_label_that_nobody_knows_is_tissue_and_says_so(bundles: dict[str, Path], tmp_path: Path) -> None:
    labels = {"0": "background", "1": "left flurb"}
    bundle = changed(
        tmp_path, bundles["spleen_ct_segmentation"], lambda m: m["network_data_format"]["outputs"]["pred"].update(channel_def=labels)
    )
    manifest = manifest_of(bundle)
    assert (manifest.outputs[0].type.value, manifest.outputs[0].side) == ("85756007", "left")
    assert any("left flurb" in line for line in manifest.decide)


def test_words_with_quotes_controls_and_other_scripts_come_back_from_the_toml(bundles: dict[str, Path], tmp_path: Path) -> None:
    words = 'a "quoted" \\ back\nslash \x7f\x00 𝒵 ü ]] = #'
    bundle = changed(tmp_path, bundles["spleen_ct_segmentation"], lambda m: m.update(data_source=words, authors=words, version=words))
    draft = draft_manifest(bundle)
    assert parse_manifest(draft.text.encode(), bundle) == draft.manifest
    assert draft.manifest.training_data == 'a "quoted" \\ back slash 𝒵 ü ]] = #'


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'{"a": ' * 100_000])
def test_metadata_that_is_no_table_is_one_sentence(bundles: dict[str, Path], tmp_path: Path, content: bytes) -> None:
    bundle = changed(tmp_path, bundles["spleen_ct_segmentation"], lambda m: m)
    (bundle / "configs/metadata.json").write_bytes(content)
    with pytest.raises(PackageError, match=r"metadata\.json of the bundle"):
        draft_manifest(bundle)


def test_yaml_that_doubles_itself_is_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = changed(tmp_path, bundles["spleen_ct_segmentation"], lambda m: m)
    (bundle / "configs/inference.json").unlink()
    lines = ["a0: &a0 [lol]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30))]
    (bundle / "configs/inference.yaml").write_text("\n".join(lines))
    with pytest.raises(PackageError, match="aliases"):
        draft_manifest(bundle)


def test_a_class_named_in_yaml_is_not_made(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = changed(tmp_path, bundles["spleen_ct_segmentation"], lambda m: m)
    (bundle / "configs/inference.json").unlink()
    made = tmp_path / "made"
    (bundle / "configs/inference.yaml").write_text(f"a: !!python/object/apply:os.mkdir ['{made}']")
    with pytest.raises(PackageError, match="cannot be read"):
        draft_manifest(bundle)
    assert not made.exists()


def test_every_code_of_the_table_is_as_the_standard_prints_it() -> None:
    printed: dict[tuple[str, str], set[str]] = {}
    for scheme, words in concepts.items():
        for meanings in words.values():
            for value, (meaning, _) in meanings.items():
                printed.setdefault((scheme, value), set()).add(meaning)
    codes = {code for _, term in terms() for code in (term.category, term.type, term.site) if code is not None}
    assert {code.meaning for code in codes if (code.scheme, code.value) not in printed} == NOT_IN_DICOM
    wrong = [code for code in codes if code.meaning not in printed.get((code.scheme, code.value), {code.meaning})]
    assert not wrong


def test_no_name_of_the_table_stands_for_two_codes() -> None:
    meant: dict[frozenset[str], set[str]] = {}
    for name, term in terms():
        meant.setdefault(frozenset(name.split()), set()).add(term.type.value)
    assert not {name: values for name, values in meant.items() if len(values) > 1}


@pytest.mark.parametrize(
    ("label", "code", "side"),
    [
        ("Right Kidney", "64033007", "right"),
        ("kidney_l", "64033007", "left"),
        ("left lung upper lobe", "45653009", "left"),
        ("lung_upper_lobe_left", "45653009", "left"),
        ("Portal and Splenic Veins", "110765007", None),
        ("IVC", "64131007", None),
        ("vertebrae_L5", "49668003", None),
        ("left heart ventricle", "87878005", None),
        ("Enhancing tumour", "C113842", None),
        ("Left-Thalamus-Proper", "42695009", "left"),
        ("peripheral zone", "279706003", None),
    ],
)
def test_a_label_is_known_in_whatever_order_and_spelling(label: str, code: str, side: str | None) -> None:
    found = term_of(label)
    assert (found.type.value, found.side) == (code, side)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("CT lung nodule detection", "lung nodule"),
        ("detection of the lung lesion from CT image", "lung lesion"),
        ("Breast Density Classification", None),
    ],
)
def test_what_a_detector_looks_for_is_read_from_its_task(text: str, found: str | None) -> None:
    assert find_abnormal(text) == found


def test_channels_for_clicks_are_the_bundles_own_and_a_network_of_slices_may_go_through_a_volume(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    bundle = changed(
        tmp_path, bundles["spleen_ct_segmentation"], lambda m: m["network_data_format"]["inputs"]["image"].update(num_channels=3)
    )
    file = bundle / "configs/inference.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"clicks": [{"_target_": "AddGuidanceSignalDeepEditd", "keys": "image"}]}))
    (accepts,) = manifest_of(bundle).inputs
    assert (accepts.name, accepts.dimensions) == ("image", 3)
    assert any("clicks" in line for line in manifest_of(bundle).decide)
    slices = {**config, "inferer": {"_target_": "SliceInferer", "roi_size": [256, 256], "spatial_dim": 2}}
    slices["network_def"]["spatial_dims"] = 2
    flat = changed(
        tmp_path / "flat",
        bundles["spleen_ct_segmentation"],
        lambda m: m["network_data_format"]["inputs"]["image"].update(spatial_shape=[9, 9]),
    )
    (flat / "configs/inference.json").write_text(json.dumps(slices))
    assert manifest_of(flat).inputs[0].dimensions == 3


def test_a_bundle_that_resamples_nothing_says_for_which_grid_it_was_made(bundles: dict[str, Path], tmp_path: Path) -> None:
    def stated(m: dict[str, Any]) -> None:
        m.update(image_classes="1 channel data, CT at 0.703125 x 0.703125 x 1.25 mm")

    nodule = changed(tmp_path / "a", bundles["lung_nodule_ct_detection"], stated)
    assert any("0.703125 x 0.703125 x 1.25 mm" in line for line in manifest_of(nodule).decide)
    spleen = changed(tmp_path / "b", bundles["spleen_ct_segmentation"], stated)
    assert not any("0.703125" in line for line in manifest_of(spleen).decide)


def test_a_gyrus_is_cortex_which_says_less_and_only_in_a_brain() -> None:
    gyrus = term_of("Right-FuG---fusiform-gyrus ", context="whole brain")
    assert (gyrus.type.value, gyrus.side, gyrus.exact) == ("40146001", "right", False)
    assert term_of("Cerebellar-Vermal-Lobules-I-V", context="whole brain").type.meaning == "Cerebellum"
    assert term_of("Left-Hippocampus", context="whole brain").exact
    assert term_of("greater pole", context="kidney").type.meaning == "Tissue"
