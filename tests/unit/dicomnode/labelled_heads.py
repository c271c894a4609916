"""Synthetic heads with a glioma as a data set of patients, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dicomnode.findings import Volume
from dicomnode.phantoms.head import CONTRASTS, head_scene, receive, render_head, signal
from dicomnode.phantoms.shapes import Grid
from dicomnode.training.dataset import DataSet, write_case, write_dataset
from dicomnode.training.glioma_patients import CHANNELS, LABELS


def write_patients(folder: Path, count: int, *, labels: tuple[str, ...] = LABELS, cores: Sequence[float] = ()) -> DataSet:
    """Heads with a glioma as a data set, 4 mm; with `cores` what is above these quantiles of a glioma's T1c is labelled as its core."""
    grid = Grid(origin_lps_mm=(-100.0, -126.0, -126.0), spacing_mm=(4.0, 4.0, 4.0), shape=(57, 62, 50))
    rows = []
    for number in range(count):
        shares, _ = render_head(head_scene(number, glioma_mm=60.0), grid)
        rng = np.random.default_rng(number)
        volumes = {}
        for channel in CHANNELS:
            voxels = np.round(1000 * receive(signal(shares, CONTRASTS[channel]), rng, bias=0.1)).astype(np.int16)
            volumes[channel] = Volume(
                voxels=voxels, affine=grid.affine, sop_instance_uids=tuple(f"{number}.{channel}.{k}" for k in range(len(voxels))),
                series_instance_uid=f"{number}.{channel}", study_instance_uid=f"{number}",
                frame_of_reference_uid=f"{number}", modality="MR",
            )  # fmt: skip
        truth = np.stack([shares["oedema"] + shares["rim"] + shares["necrosis"], shares["rim"]]) > 0.5
        if cores:
            t1c = np.asarray(volumes["t1c"].voxels)
            truth[1] = truth[0] & (t1c > np.quantile(t1c[truth[0]], cores[number]))
        row = {"case": f"head-{number}", "patient": f"p{number}", "study": f"s{number}", "split": "train", "source": "phantom"}
        rows.append(write_case(folder, row, volumes, truth, dict.fromkeys(labels, "present")))
    return write_dataset(
        DataSet(
            folder=folder, name="heads", modality="MR", channels=CHANNELS, labels=labels, terms="none", seed=0, cases=tuple(rows)
        )
    )  # fmt: skip
