"""NIfTI and NRRD files with a bright box and its label map, for tests of data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import nrrd
import numpy as np
from numpy.typing import NDArray

# (i, j, k) to RAS mm: the axes run to the left, to the back and to the head
RAS = np.array([[-0.8, 0, 0, 30], [0, -0.9, 0, 40], [0, 0, 2.0, -20], [0, 0, 0, 1]], dtype=np.float64)
SHAPE = (20, 24, 10)
BOX = (slice(4, 9), slice(6, 12), slice(2, 5))
LAYOUT = """
modality = "MR"
terms = "made here"
patient = "(p[0-9]+).*"

[channels]
flair = "{case}/flair.nii.gz"

[labels."Tumour"]
file = "{case}/labels.nii.gz"
values = [1, 4]

[labels."Core"]
file = "{case}/labels.nii.gz"
values = [4]
"""


def layout(folder: Path, text: str = LAYOUT) -> Path:
    file = folder / "layout.toml"
    file.write_text(text, encoding="utf-8")
    return file


def image(seed: int) -> NDArray[np.int16]:
    """Noise with a bright box in it, (i, j, k)."""
    values = np.random.default_rng(seed).integers(100, 200, SHAPE).astype(np.int16)
    values[BOX] += 500
    return values


def label_map() -> NDArray[np.uint8]:
    """The box is 1, its last slice 4."""
    values = np.zeros(SHAPE, dtype=np.uint8)
    values[BOX] = 1
    values[BOX[0], BOX[1], 4] = 4
    return values


def write_nifti(file: Path, values: NDArray[Any], affine: NDArray[np.float64] = RAS) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    written = nibabel.Nifti1Image(values, affine)
    written.header.set_xyzt_units("mm")
    nibabel.save(written, file)


def write_nrrd(file: Path, values: NDArray[Any], lps: NDArray[np.float64], space: str = "left-posterior-superior") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    header = {"space": space, "space directions": lps[:3, :3].T, "space origin": lps[:3, 3]}
    nrrd.write(str(file), values, header)


def write_case(folder: Path, case: str, seed: int, labels: NDArray[Any] | None = None, affine: NDArray[np.float64] = RAS) -> None:
    """A case as LAYOUT describes it."""
    write_nifti(folder / case / "flair.nii.gz", image(seed))
    write_nifti(folder / case / "labels.nii.gz", label_map() if labels is None else labels, affine)
