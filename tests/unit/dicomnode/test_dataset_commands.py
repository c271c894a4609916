"""`dicomnode dataset`: what each command prints, and exit code 2 with one sentence for each wrong use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from labelled_files import layout, write_case
from labelled_studies import CENTRES, write_seg, write_study

from dicomnode.cli import run

pytestmark = pytest.mark.usefixtures("logs_restored")


class Shell:
    """Runs commands in this process."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *words: str | Path) -> tuple[int, str, str]:
        self._capture.readouterr()
        code = run([str(word) for word in words])
        return (code, *self._capture.readouterr())

    def listing(self, *words: str | Path) -> list[dict[str, Any]]:
        code, output, errors = self(*words, "--json")
        assert code == 0, errors
        rows: list[dict[str, Any]] = json.loads(output)
        return rows

    def complaint(self, *words: str | Path) -> str:
        """Run a command that must end with exit code 2 and one sentence."""
        code, output, errors = self(*words)
        assert (code, output) == (2, ""), errors
        assert errors.startswith("dicomnode: ")
        assert "Traceback" not in errors
        assert len(errors.splitlines()) == 1
        return errors


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    """Three patients as NIfTI, and `layout.toml` beside them."""
    for number, case in enumerate(("p1_a", "p2_a", "p3_a")):
        write_case(tmp_path / "maps", case, number)
    layout(tmp_path)
    return tmp_path


def test_a_data_set_is_built_and_checked(shell: Shell, maps: Path) -> None:
    words = ("dataset", "build", maps / "out", maps / "maps", "--layout", maps / "layout.toml", "--shares", "0.34,0.33,0.33")
    rows = shell.listing(*words, "--split", "p2=test", "--label", "Core", "--name", "tumours", "--terms", "free")
    assert [row["labels"] for row in rows] == [{"Core": "present"}] * 3
    assert sorted(row["split"] for row in rows) == ["test", "train", "validation"]
    assert next(row["split"] for row in rows if "p2_a" in row["origin"]) == "test"
    content = json.loads((maps / "out" / "dataset.json").read_text())
    assert (content["name"], content["terms"], content["labels"]) == ("tumours", "free", ["Core"])
    checked = shell.listing("dataset", "check", maps / "out")
    assert [(row["split"], row["cases"], row["present"]) for row in checked] == [
        (split, 1, {"Core": 1}) for split in ("train", "validation", "test")
    ]
    code, output, _ = shell("dataset", "check", maps / "out")
    assert code == 0
    assert "Core 1" in output


def test_what_no_model_would_be_given_is_left_out_and_said(shell: Shell, tmp_path: Path) -> None:
    write_seg(write_study(tmp_path / "in" / "a", "a"), CENTRES)
    study = write_study(tmp_path / "b", "b", patient_id="P2")
    write_seg(study, CENTRES[:1])
    for file in sorted(study.glob("02-*.dcm"))[4:7]:
        file.unlink()
    for file in study.glob("*.dcm"):
        file.rename(tmp_path / "in" / f"b-{file.name}")
    code, output, errors = shell("dataset", "build", tmp_path / "out", tmp_path / "in", "--json")
    assert code == 0, errors
    assert len(json.loads(output)) == 1
    assert errors.startswith("left out: ")
    assert "gap" in errors


def test_a_planted_overlap_ends_the_check_with_2_and_names_the_cases(shell: Shell, maps: Path) -> None:
    shell.listing("dataset", "build", maps / "out", maps / "maps", "--layout", maps / "layout.toml", "--shares", "0.5,0.5,0")
    file = maps / "out" / "dataset.json"
    content = json.loads(file.read_text())
    train, other = (next(row for row in content["cases"] if row["split"] == split) for split in ("train", "validation"))
    other["patient"] = train["patient"]
    file.write_text(json.dumps(content))
    sentence = shell.complaint("dataset", "check", maps / "out")
    assert "the same patient in two splits" in sentence
    assert train["case"] in sentence
    assert other["case"] in sentence


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "there is nothing to build from"),
        (["{maps}"], "holds no DICOM file"),
        (["--layout", "{layout}"], "--layout says how a SOURCE is laid out"),
        (["{maps}", "--layout", "{maps}/p1_a/flair.nii.gz"], "is not TOML"),
        (["{absent}"], "does not exist"),
        (["{maps}", "--layout", "{layout}", "--shares", "0.5,0.5"], "--shares '0.5,0.5' isn't three numbers"),
        (["{maps}", "--layout", "{layout}", "--shares", "0.5,0.4,0.3"], "must add up to 1"),
        (["{maps}", "--layout", "{layout}", "--shares", "nan,0.4,0.3"], "must add up to 1"),
        (["{maps}", "--layout", "{layout}", "--split", "p1"], "--split 'p1' isn't PATIENT=train"),
        (["{maps}", "--layout", "{layout}", "--split", "p9=test"], "no source is of the patient p9"),
        (["{maps}", "--layout", "{layout}", "--label", "Cyst"], "no source has the label Cyst; there is Tumour, Core"),
        (["{maps}", "--layout", "{layout}", "--label", "Core", "--label", "Core"], "a name of its own"),
        (["{maps}", "--layout", "{layout}", "--missing", "ignore"], "Invalid value for '--missing'"),
        (["{maps}", "--layout", "{layout}", "--phantoms", "1"], "one data set has one modality and the same channels"),
        (["{maps}", "--model", "{layout}"], "mistake"),
        (["--study", "1.2.3", "--config", "{config}"], "there is no study '1.2.3'"),
        (["--results-of", "nothing", "--config", "{config}"], "no study of this node has a SEG of the package nothing"),
    ],
)
def test_a_wrong_build_is_one_sentence(shell: Shell, maps: Path, words: list[str], sentence: str) -> None:
    assert run(["init", str(maps / "node")]) == 0
    places = {"maps": maps / "maps", "layout": maps / "layout.toml", "absent": maps / "absent", "config": maps / "node" / "dicomnode.toml"}
    filled = [word.format(**places) for word in words]
    assert sentence in shell.complaint("dataset", "build", maps / "out", *filled)
    assert not (maps / "out").exists()


def test_a_folder_that_is_no_data_set_is_refused(shell: Shell, maps: Path) -> None:
    assert "is no data set" in shell.complaint("dataset", "check", maps)
    assert "does not exist" in shell.complaint("dataset", "check", maps / "absent")
    assert "holds something already" in shell.complaint("dataset", "build", maps, maps / "maps", "--layout", maps / "layout.toml")


def test_training_begins_with_the_check(shell: Shell, maps: Path) -> None:
    from test_dataset_patches import RECIPE

    shell.listing("dataset", "build", maps / "out", maps / "maps", "--layout", maps / "layout.toml")
    text = RECIPE.replace('["flair", "t1c"]', '["flair"]')
    start, end = text.index('[[package.inputs]]\nname = "t1c"'), text.index("[package.preprocessing]")
    (maps / "recipe.toml").write_text(text[:start] + text[end:])
    row = json.loads((maps / "out" / "dataset.json").read_text())["cases"][0]
    (maps / "out" / row["file"]).unlink()
    sentence = shell.complaint("train", maps / "recipe.toml", "--data", maps / "out", "--out", maps / "run")
    assert f"{row['case']}.npz is missing" in sentence
    assert "need a data set: --data" in shell.complaint("train", maps / "recipe.toml", "--out", maps / "run")
    assert not (maps / "run" / "checkpoints").exists()
