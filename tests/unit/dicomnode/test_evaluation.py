"""Evaluation: findings meet what is known by rules, figures follow from them, and what is written says no more than was measured."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.manifest import CodeEntry, Manifest, parse_manifest
from dicomnode.analysis.package import load_package
from dicomnode.errors import AnalysisFailed, UsageError
from dicomnode.findings import Code, Finding, Findings, LongAxis, Score, Segment, Volume
from dicomnode.training.card import write_model_card
from dicomnode.training.cases import Case, Known, case_from_masks, dataset_cases, real_cases
from dicomnode.training.dataset import DataSet, write_case, write_dataset
from dicomnode.training.evaluate import evaluate, measure, with_any_score
from dicomnode.training.evaluation.matching import match, reported, shared_voxels
from dicomnode.training.evaluation.report import write_report
from dicomnode.training.evaluation.summary import plain, summary
from dicomnode.training.unseen_phantoms import unseen_phantoms

PACKAGES = Path(__file__).parents[3] / "dicomnode" / "packages"
CODE = Code(value="1", scheme="99", meaning="x")
AFFINE = np.diag([1.0, 1.0, 1.0, 1.0])[[2, 1, 0, 3]]
SHAPE = (10, 20, 20)


def manifest_of(**changes: Any) -> Manifest:
    """Of a package that looks for nodules, whose findings need a score of 0.8, or with other outputs."""
    text = """
    schema = 1
    name = "p"
    version = "1"
    title = "t"
    manufacturer = "m"
    algorithm_name = "a"
    licence = "l"
    intended_use = "RESEARCH USE ONLY."
    training_data = "d"
    kind = "segmentation"
    [input]
    modality = "CT"
    sop_classes = ["1.2.840.10008.5.1.4.1.1.2"]
    [preprocessing]
    spacing_mm = [1, 1, 1]
    window = [-1000, 400]
    [inference]
    window = [8, 16, 16]
    [[outputs]]
    channel = 0
    label = "x"
    minimum_score = 0.8
    category = { value = "49755003", scheme = "SCT", meaning = "Morphologically Abnormal Structure" }
    type = { value = "27925004", scheme = "SCT", meaning = "Nodule" }
    """
    manifest = parse_manifest(text.encode(), Path("p"))
    output = manifest.outputs[0].model_copy(update=changes)
    return manifest.model_copy(update={"outputs": (output,)})


def volume(**changes: Any) -> Volume:
    made = Volume(
        voxels=np.zeros(SHAPE, dtype=np.float32), affine=AFFINE, sop_instance_uids=(), series_instance_uid="1.2",
        study_instance_uid="1", frame_of_reference_uid="1", modality="CT",
    )  # fmt: skip
    return replace(made, **changes)


def cube(k: int, r: int, c: int, edge: int = 4) -> Segment:
    return Segment(mask=np.ones((edge, edge, edge), dtype=np.bool_), origin=(k, r, c))


def finding(number: int, segment: Segment, probability: float = 0.9, **changes: Any) -> Finding:
    centre = np.asarray(segment.origin) + (np.asarray(segment.mask.shape) - 1) / 2
    axis = LongAxis(slice_index=0, points_lps_mm=((0, 0, 0), (0, 0, 0)), points_px=((0, 0), (0, 0)), length_mm=1)
    made = Finding(
        number=number, label="x", probability=probability, category=CODE, type=CODE, site=None, side=None,
        centre_lps_mm=(centre[2], centre[1], centre[0]), segment=segment, long_axis=axis, measurements=(), colour_cielab=(0, 0, 0),
    )  # fmt: skip
    return replace(made, **changes)


def findings(*each: Finding, scores: tuple[Score, ...] = ()) -> Findings:
    return Findings(
        package="p", version="1", digest="d", algorithm_name="a", manufacturer="m", series_instance_uid="1.2", findings=each, device="cpu",
        scores=scores,
    )  # fmt: skip


def mask(*segments: Segment) -> NDArray[np.bool_]:
    filled = np.zeros(SHAPE, dtype=np.bool_)
    for segment in segments:
        filled[tuple(slice(o, o + n) for o, n in zip(segment.origin, segment.mask.shape, strict=True))] = True
    return filled


@dataclass(frozen=True, kw_only=True)
class Says:
    """A model whose answers are written down, by the series; those below the score it was told are left out."""

    manifest: Manifest
    answers: Mapping[str, Findings | Exception]
    network: Any = None
    device: Any = field(default=None)

    def __call__(self, volumes: Mapping[str, Volume], between: Any = None) -> Findings:
        answer = self.answers[next(iter(volumes.values())).series_instance_uid]
        if isinstance(answer, Exception):
            raise answer
        return replace(answer, findings=reported(answer.findings, self.manifest))


def cases(*each: Case) -> Iterator[tuple[str, Any]]:
    for case in each:
        yield case.name, lambda case=case: case


def case(name: str, *lesions: Segment, **others: Any) -> Case:
    made = volume(series_instance_uid=name)
    return case_from_masks(name, {"image": made}, {"x": mask(*lesions)}, manifest_of(), **others)


def test_voxels_in_common_are_counted() -> None:
    assert shared_voxels(cube(0, 0, 0), cube(2, 2, 2)) == 8
    assert shared_voxels(cube(0, 0, 0), cube(4, 0, 0)) == 0


def test_a_finding_that_meets_nothing_is_false_and_the_most_probable_one_counts() -> None:
    known = Known(label="x", centre_lps_mm=(5.5, 5.5, 3.5), diameter_mm=5.0, truth=cube(2, 4, 4))
    near, better, away = finding(1, cube(3, 4, 4), 0.6), finding(2, cube(2, 4, 4), 0.8), finding(3, cube(2, 14, 14), 0.7)
    result = match((near, better, away), (known,))
    assert [(pair.known, pair.finding) for pair in result.pairs] == [(known, better)]
    assert result.false == (away,)


def test_without_voxels_a_centre_in_the_nodule_is_a_hit() -> None:
    known = Known(label="x", centre_lps_mm=(5.5, 5.5, 3.5), diameter_mm=12.0)
    far = replace(known, centre_lps_mm=(5.5, 5.5, 40.0))
    hit = finding(1, cube(2, 7, 4))
    assert [pair.finding for pair in match((hit,), (known, far)).pairs] == [hit, None]


def test_a_lesion_of_less_than_five_millimetres_is_neither_missed_nor_false() -> None:
    small = Known(label="x", centre_lps_mm=(5.5, 5.5, 3.5), diameter_mm=4.0, truth=cube(2, 4, 4, 3))
    result = match((finding(1, cube(2, 4, 4, 3)),), (small,))
    assert (result.pairs, result.false, result.small) == ((), (), 1)


def test_a_box_meets_the_lesion_whose_centre_it_holds() -> None:
    known = Known(label="x", centre_lps_mm=(5.5, 5.5, 3.5), diameter_mm=5.0, truth=cube(3, 4, 4))
    box = finding(1, Segment(mask=np.ones((10, 18, 18), dtype=np.bool_), origin=(0, 0, 0)), shape="box")
    assert match((box,), (known,)).pairs[0].finding is box
    assert match((replace(box, shape="outline"),), (known,)).pairs[0].finding is None  # it is a fiftieth of their union


def test_what_is_reported_of_findings_of_any_score_is_what_the_model_reports() -> None:
    every = (finding(1, cube(0, 0, 0), 0.95), finding(2, cube(0, 8, 0), 0.85), finding(3, cube(0, 0, 8), 0.6))
    model = Says(manifest=manifest_of(maximum_findings=1), answers={"1.2": findings(*every)})
    loose = with_any_score(model)({"image": volume()})
    assert len(loose.findings) == 3
    assert reported(loose.findings, model.manifest) == model({"image": volume()}).findings == every[:1]


def test_figures_of_four_cases_are_those_counted_by_hand() -> None:
    hit, off, away = cube(2, 4, 4, 6), cube(2, 4, 7, 6), cube(2, 14, 14)
    answers: dict[str, Findings | Exception] = {
        "one": findings(finding(1, hit, 0.95), finding(2, away, 0.9), finding(3, cube(6, 0, 0), 0.5)),
        "two": findings(finding(1, off, 0.85)),
        "three": findings(finding(1, hit, 0.6)),  # below the score that is reported
        "clear": findings(),
        "no chest": NotEligible("no-lung", "There is no lung."),
        "broken": AnalysisFailed("The network failed."),
    }
    model = Says(manifest=manifest_of(), answers=answers)
    results, worst, _ = measure(
        model,
        cases(
            case("one", hit, attributes={"scanner": "A", "slice_thickness_mm": "1.0"}), case("two", hit, attributes={"scanner": "A"}),
            case("three", hit, attributes={"scanner": "B"}), case("clear", attributes={"scanner": "B"}),
            replace(case("no chest"), of_its_kind=False), case("broken", hit),
        ),
    )  # fmt: skip
    figures = plain(summary(results, model.manifest))
    assert (figures["scans"], figures["analysed"], figures["wrongly_refused"], figures["wrongly_accepted"]) == (6, 4, 0, 0)
    assert figures["refused"] == [{"case": "no chest", "code": "no-lung", "of_its_kind": False}]
    assert figures["failed"] == [{"case": "broken", "reason": "The network failed."}]

    (lesions,) = figures["lesions"]
    # 216 voxels are a sphere of 7.4 mm; "two" shares 108 of 324 voxels, more than a tenth; "three" isn't certain enough
    assert (lesions["lesions"], lesions["found"], lesions["false_findings_per_scan"], lesions["clear_scans"]) == (3, 2, 0.25, 1)
    assert [(row["lesions"], row["found"]) for row in lesions["by_size"][:2]] == [(0, 0), (3, 2)]
    # any score: lesions 0.95, 0.85, 0.6; false 0.9, 0.5 in four scans. None allowed: above 0.9 one; one allowed (1/4): above 0.5 all
    assert lesions["froc"]["sensitivity"] == [0.3333, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert {row["minimum_score"]: row["found"] for row in lesions["by_minimum_score"]}[0.9] == 1

    (outline,) = figures["segmentation"]
    one = 2 * 216 / (216 + 216 + 64)
    assert (outline["cases"], outline["nothing_marked"], outline["empty_references"], outline["marked_though_empty"]) == (3, 1, 1, 0)
    assert outline["dice"]["mean"] == pytest.approx((one + 0.5 + 0.0) / 3, abs=1e-4)
    assert outline["hd95_mm"]["n"] == 2  # nothing was marked in the third

    (called,) = figures["scores"]
    assert (called["positive"], called["negative"], called["auc"], called["specificity"]) == (3, 1, 1.0, 1.0)
    assert called["sensitivity"] == pytest.approx(2 / 3, abs=1e-4)

    groups = {(row["attribute"], row["value"]): row for row in figures["subgroups"]}
    assert groups["scanner", "A"]["labels"][0] | {"interval": None} == {
        "label": "x", "outlines": 2, "median_dice": pytest.approx((one + 0.5) / 2, abs=1e-4), "lesions": 2, "found": 2, "interval": None,
        "false_findings_per_scan": 0.5, "auc": None, "auc_interval": None,
    }  # fmt: skip
    assert groups["slice_thickness_mm", "0 to 1.5 mm"]["scans"] == 1

    assert [(failure.case, failure.kind) for failure in worst[:4]] == [
        ("three", "missed"), ("one", "false finding"), ("two", "outline"), ("one", "outline"),
    ]  # fmt: skip
    json.dumps(figures, allow_nan=False)


def test_a_classification_is_measured_by_its_own_scores() -> None:
    manifest = manifest_of()
    score = Score(label="x", type=CODE, probability=0.7, threshold=0.5, positive=True)
    low = replace(score, probability=0.2, positive=False)
    model = Says(
        manifest=manifest, answers={"sick": findings(scores=(score,)), "well": findings(scores=(low,)), "odd": findings(scores=(score,))}
    )
    made = [Case(name=name, volumes={"image": volume(series_instance_uid=name)}, positive={"x": name == "sick"}) for name in model.answers]
    results, worst, _ = measure(model, cases(*made))
    (row,) = summary(results, manifest)["scores"]
    assert (row["auc"], row["sensitivity"], row["specificity"], row["threshold"]) == (0.75, 1.0, 0.5, 0.5)
    assert [(failure.case, failure.kind) for failure in worst] == [("odd", "false alarm")]


def test_an_organ_s_outline_is_no_false_finding() -> None:
    category = CodeEntry(value="123037004", scheme="SCT", meaning="Anatomical Structure")
    manifest = manifest_of(category=category)
    model = Says(manifest=manifest, answers={"one": findings(finding(1, cube(2, 4, 4, 6)))})
    results, worst, _ = measure(model, cases(replace(case("one", cube(2, 4, 4, 6)), known=(), positive={})))
    figures = summary(results, manifest)
    assert (figures["lesions"], figures["scores"], figures["segmentation"][0]["dice"]["median"]) == ([], [], 1.0)
    assert [failure.kind for failure in worst] == ["outline"]


def test_a_box_has_no_outline_to_measure() -> None:
    model = Says(manifest=manifest_of(shape="box"), answers={"one": findings(finding(1, cube(2, 4, 4, 6), shape="box"))})
    results, _, _ = measure(model, cases(case("one", cube(2, 4, 4, 6))))
    figures = summary(results, model.manifest)
    assert (figures["segmentation"], figures["lesions"][0]["found"]) == ([], 1)


def test_findings_of_a_case_of_which_not_all_is_known_are_not_called_false() -> None:
    known = Known(label="x", centre_lps_mm=(5.5, 5.5, 3.5), diameter_mm=12.0)
    made = Case(name="one", volumes={"image": volume(series_instance_uid="one")}, known=(known,), complete=False)
    model = Says(manifest=manifest_of(), answers={"one": findings(finding(1, cube(2, 4, 4)), finding(2, cube(2, 14, 14)))})
    results, worst, _ = measure(model, cases(made))
    (row,) = summary(results, model.manifest)["lesions"]
    assert (row["found"], row["complete_scans"], row["false_findings_per_scan"], row["froc"]) == (1, 0, None, None)
    assert [failure.kind for failure in worst] == ["other finding"]
    picture = np.frombuffer(worst[0].picture(), dtype=np.uint8)
    assert picture[:4].tobytes() == b"\x89PNG"


def dataset(folder: Path, label: str = "x", **states: str) -> DataSet:
    rows = []
    for number, (name, state) in enumerate(states.items()):
        lesion = cube(2, 4, 4)
        there = mask(lesion) if state == "present" else mask()
        image = volume(voxels=np.where(there, 100, 0).astype(np.int16) + np.int16(number))
        row = {"case": name, "patient": f"p{number // 2}", "study": name, "split": "test", "source": "made", "attributes": {"sex": "F"}}
        rows.append(write_case(folder, row, {"image": image}, there[None], {label: state}))  # type: ignore[dict-item]  # a state
    return write_dataset(
        DataSet(folder=folder, name="d", modality="CT", channels=("image",), labels=(label,), terms="t", seed=1, cases=tuple(rows))
    )


def test_a_case_of_a_data_set_knows_what_somebody_looked_for(tmp_path: Path) -> None:
    made = dataset(tmp_path, a="present", b="absent", c="unlabelled")
    read = {name: reader() for name, reader in dataset_cases(made, "test", manifest_of())}
    assert [(len(c.known), dict(c.positive), sorted(c.truth)) for c in read.values()] == [
        (1, {"x": True}, ["x"]), (0, {"x": False}, ["x"]), (0, {}, []),
    ]  # fmt: skip
    assert [c.patient for c in read.values()] == ["p0", "p0", "p1"]
    assert read["a"].attributes == {"sex": "F"}


def test_a_data_set_that_doesn_t_fit_the_package_is_wrong_use(tmp_path: Path) -> None:
    made = dataset(tmp_path, a="present")
    with pytest.raises(UsageError, match="no case in its split validation"):
        list(dataset_cases(made, "validation", manifest_of()))
    with pytest.raises(UsageError, match="looks for none"):
        list(dataset_cases(made, "test", manifest_of(label="y")))
    flair = manifest_of().inputs[0].model_copy(update={"name": "flair"})
    with pytest.raises(UsageError, match="needs flair"):
        list(dataset_cases(made, "test", manifest_of().model_copy(update={"inputs": (flair,)})))


def test_a_data_set_whose_splits_share_a_patient_is_not_measured_on(tmp_path: Path) -> None:
    made = dataset(tmp_path, a="present", b="absent")
    write_dataset(replace(made, cases=(made.cases[0].model_copy(update={"split": "train"}), made.cases[1])))
    with pytest.raises(UsageError, match="the same patient in two splits"):
        evaluate(PACKAGES / "brain-mr" / "0.1.0", tmp_path, device="cpu")


def test_a_package_that_was_trained_on_another_state_of_a_data_set_is_not_measured_on_it(tmp_path: Path) -> None:
    shutil.copytree(PACKAGES / "brain-mr" / "0.1.0", tmp_path / "package")
    dataset(tmp_path / "d", a="present")
    record = {"dataset": {"name": "d", "sha256": "0" * 64}}
    (tmp_path / "package" / "training.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UsageError, match="another state of the data set d"):
        evaluate(tmp_path / "package", tmp_path / "d", device="cpu")


def test_figures_stand_in_the_package_beside_those_of_other_sets_of_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "package"
    shutil.copytree(PACKAGES / "brain-mr" / "0.1.0", folder)
    package = load_package(folder)
    dataset(tmp_path / "d", "Brain", a="present")
    answers: dict[str, Findings | Exception] = {"a.image": findings(finding(1, cube(2, 4, 4), label="Brain"))}
    monkeypatch.setattr("dicomnode.training.evaluate.load_model", lambda *_, **__: Says(manifest=package.manifest, answers=answers))
    earlier = {
        "schema": 2,
        "digest": package.digest,
        "sets": {"phantoms": plain({"name": "phantoms", "kind": "phantoms", **summary([], package.manifest)})},
    }
    kept = folder / "evaluation.json"
    kept.write_text(json.dumps(earlier), encoding="utf-8")
    figures = evaluate(folder, tmp_path / "d", out=tmp_path / "out")
    assert figures["segmentation"][0]["dice"]["median"] == 1
    content = json.loads(kept.read_text(encoding="utf-8"))
    assert (content["schema"], list(content["sets"])) == (2, ["phantoms", "d"])
    assert (tmp_path / "out" / "report.html").is_file()
    assert "### d: 1 cases of a data set" in (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert load_package(folder).digest == package.digest  # papers change nothing that runs
    kept.write_text(json.dumps({**earlier, "digest": "0"}), encoding="utf-8")
    evaluate(folder, tmp_path / "d")
    assert list(json.loads(kept.read_text(encoding="utf-8"))["sets"]) == ["d"]


def test_a_folder_without_cases_has_none(tmp_path: Path) -> None:
    assert list(real_cases(tmp_path, manifest_of())) == []


def test_what_has_no_phantoms_needs_cases() -> None:
    with pytest.raises(UsageError, match="no phantoms"):
        next(unseen_phantoms(manifest_of(), first_seed=1, scans=1))


def test_the_model_card_tells_what_was_measured_and_drops_what_is_of_another_digest(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    shutil.copytree(PACKAGES / "brain-mr" / "0.1.0", folder)
    hit = cube(2, 4, 4, 6)
    model = Says(manifest=manifest_of(), answers={"one": findings(finding(1, hit, 0.95)), "two": NotEligible("no-lung", "No lung.")})
    results, _, _ = measure(model, cases(case("one", hit), case("two", hit)))
    figures = plain({"name": "few", "kind": "cases", "terms": "CC BY 4.0", **summary(results, model.manifest)})
    written = {"schema": 2, "digest": load_package(folder).digest, "sets": {"few": figures}}
    (folder / "evaluation.json").write_text(json.dumps(written), encoding="utf-8")
    write_model_card(folder)
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    for fact in (
        "RESEARCH USE ONLY", "few: 2 real cases", "CC BY 4.0", "1 of 1 [0.21 to 1.00] found", "two: not analysed (no-lung)",
        "Wrongly refused: two (no-lung)", "one: the known x of 7.4 mm was found", "Fewer than 30 cases are examples",
    ):  # fmt: skip
        assert fact in card
    (folder / "evaluation.json").write_text(json.dumps({**written, "digest": "0"}), encoding="utf-8")
    write_model_card(folder)
    assert "Not evaluated yet" in (folder / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_a_report_shows_everything_and_needs_nothing_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    answers: dict[str, Findings | Exception] = {"gone": NotEligible("no-lung", "There is no lung.")}
    made = [case("gone")]
    for number in range(12):
        name, lesion = f"<b>{number}</b>", cube(2, 4, 4, 6)
        there = [lesion] if number % 3 else []
        said = [finding(1, cube(2 + number % 2, 4, 5, 6), float(rng.uniform(0.6, 1)))] if there else []
        said += [finding(2, cube(2, 14, 14), float(rng.uniform(0.5, 0.95)))] if number % 2 else []
        answers[name] = findings(*sorted(said, key=lambda f: -f.probability))
        made.append(case(name, *there, attributes={"sex": "F" if number % 2 else "M"}))
    model = Says(manifest=manifest_of(), answers=answers)
    results, worst, _ = measure(model, cases(*made))
    package = load_package(PACKAGES / "brain-mr" / "0.1.0")
    package = replace(package, manifest=model.manifest.model_copy(update={"limits": ("Sees <nothing> else.",)}))
    about = {"name": "made", "kind": "dataset", "split": "test", "terms": "CC BY 4.0", "device": "cpu"}
    file = write_report(tmp_path, package, plain({**about, **summary(results, model.manifest)}), worst)
    page = file.read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml;base64,") == 7  # Dice, size, FROC, by size, scores of findings, ROC, scores of studies
    assert page.count("data:image/png;base64,") == len(worst) == len(list(tmp_path.glob("worst_*.png"))) > 3
    for fact in (
        "RESEARCH USE ONLY",
        "CC BY 4.0",
        "refused: no-lung",
        "&lt;b&gt;5&lt;/b&gt;",
        "Sees &lt;nothing&gt; else.",
        "sex",
        package.digest,
    ):
        assert fact in page
    assert not re.search(r"<b>|<script|https?://|url\(|@import", page)
    assert set(re.findall(r'src="([a-z]+:)', page)) == {"data:"}
