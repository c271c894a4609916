"""What the demo shows at its end: summary.json (schema 1), the table, and a preview of each finding in its place."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dicomnode.analysis.eligibility import REASONS
from dicomnode.demo.scanner import ScannedStudy
from dicomnode.logs import printable
from dicomnode.results.keyimage import draw_plain, draw_result
from storage import Storage
from storage.records import Job

PROGRESS = {code: number for number, code in enumerate(REASONS)}  # how far a package came with a study
FAILED = {"failed", "cancelled", "queued", "running"}


def summarise(studies: Sequence[ScannedStudy], not_sent: list[dict[str, str]], storage: Storage, *, finished: bool) -> dict[str, Any]:
    """Return the summary as specified for `summary.json`, schema 1."""
    rows = [_study(study, storage) for study in studies]
    failed = not finished or any(row["outcome"] == "failed" for row in rows)
    return {"schema": 1, "exit": int(failed), "not_sent": not_sent, "studies": rows}


def write_summary(summary: dict[str, Any], out: Path) -> None:
    """Write `summary.json`."""
    (out / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_previews(studies: Sequence[ScannedStudy], storage: Storage, out: Path) -> None:
    """Draw each segment that the PACS received on its source image; of a study without one its middle image, with the reason."""
    for study in studies:
        for number, picture in enumerate(_pictures(study, storage, out), start=1):
            (out / "preview" / f"{study.study_instance_uid}_{number}.png").write_bytes(picture)


def _pictures(study: ScannedStudy, storage: Storage, out: Path) -> list[bytes]:
    pictures = []
    for result in storage.jobs.results(study_instance_uid=study.study_instance_uid):
        received = out / "pacs" / f"{result.sop_instance_uid}.dcm"
        if result.modality == "SEG" and received.exists():
            try:
                pictures += draw_result(study.files, received)
            except KeyError:  # the image that it names was sent to the node by somebody else
                continue
    if pictures:
        return pictures
    jobs = _last(storage, study, "analyse")
    used, caption = None, "not analysed (no-images): no image of this study was accepted by the node"
    analysed = [job for job in jobs if job.state == "done"]
    if analysed:
        used, caption = analysed[0].detail["series_instance_uid"], "no finding"
        scores = [f"{score['label']} {100 * score['probability']:.0f} %" for score in analysed[0].detail.get("scores", [])]
        caption += f": {', '.join(scores)}" if scores else ""
    elif jobs:
        closest = max(jobs, key=lambda job: PROGRESS.get(job.reason_code or "", 0))
        caption = f"not analysed ({closest.reason_code}): {closest.reason}"
    if used not in study.series:
        sizes = Counter(study.series_of.values())
        used = max(sizes, key=lambda uid: (study.series[uid] not in ("SR", "SEG", "PR", "KO"), sizes[uid], uid))
    files = [item.path for item in study.outgoing if study.series_of[item.sop_instance_uid] == used]
    try:
        return [draw_plain(files, caption=caption)]
    except ValueError:  # nothing in the study is an image
        return []


def show_summary(summary: dict[str, Any], out: Path, console: Console) -> None:
    """Print the summary as a table."""
    table = Table("study", "series", "outcome", "packages", "findings", "at the PACS", "seconds")
    for column, share in zip(table.columns, (2, 2, 2, 4, 5, 1, 1), strict=True):
        column.ratio = share
    for study in summary["studies"]:
        cells = (
            f"…{study['study_instance_uid'][-12:]} rev {study['revision']}",
            "\n".join(f"{series['modality']} {series['instances']} images" for series in study["series"]),
            study["outcome"],
            "\n".join(_package_lines(study["packages"])) or "none",
            "\n".join([*map(_finding_line, study["findings"]), *map(_score_line, study["scores"])]) or "none",
            "\n".join(f"{made['modality']}" for made in study["objects"]) or "none",
            f"{study['seconds']['total']:.1f}",
        )
        table.add_row(*(Text("\n".join(map(printable, cell.split("\n")))) for cell in cells))  # Text: words from the wire are no markup
    console.print(table)
    for missing in summary["not_sent"]:
        console.print(printable(f"not sent: {missing['file']}: {missing['reason']}"), markup=False)
    console.print(f"PACS: {out / 'pacs'}  previews: {out / 'preview'}  summary: {out / 'summary.json'}", markup=False, soft_wrap=True)
    console.print("RESEARCH USE ONLY. Not for diagnosis.")


def _package_lines(packages: Sequence[dict[str, Any]]) -> list[str]:
    """Who read the study; or the reason of whoever came closest to it. The others' codes stand on one line."""
    ordered = sorted(packages, key=lambda p: (not p["accepted"], -PROGRESS.get(p["reason_code"], 0)))
    lines = [f"{p['name']} {p['version']}: {'accepted' if p['accepted'] else p['reason']}" for p in ordered if p["accepted"]]
    others = [p for p in ordered if not p["accepted"]]
    if others and not lines:
        lines.append(f"{others[0]['name']} {others[0]['version']}: {others[0]['reason']}")
        others = others[1:]
    codes = ", ".join(f"{p['name']} ({p['reason_code']})" for p in others)
    return [*lines, f"not {codes}"] if codes else lines


def _finding_line(finding: dict[str, Any]) -> str:
    said = [f"{finding['label']} ({finding['side'] or 'side unknown'})", f"p {finding['probability']:.2f}"]
    if finding["long_axis_mm"] is not None:
        said.append(f"{finding['long_axis_mm']:.1f} mm")
    if finding["volume_ml"]:
        said.append(f"{finding['volume_ml']:.2f} ml")
    if finding["centre_lps_mm"] is not None:
        said.append(f"at LPS ({', '.join(f'{value:.1f}' for value in finding['centre_lps_mm'])}) mm")
    elif finding["box_px"] is not None:
        left, top, right, bottom = finding["box_px"]
        said.append(f"in columns {left:.0f} to {right:.0f}, rows {top:.0f} to {bottom:.0f}")
    if finding.get("change") is not None:
        said.append(finding["change"]["words"])
    return ", ".join(said)


def _score_line(score: dict[str, Any]) -> str:
    return f"{score['label']}: p {score['probability']:.2f} ({'positive' if score['positive'] else 'negative'})"


def _last(storage: Storage, study: ScannedStudy, kind: str) -> list[Job]:
    """The jobs of the study's last revision."""
    jobs = storage.jobs.jobs(study_instance_uid=study.study_instance_uid)
    newest = max((job.revision for job in jobs), default=0)
    return [job for job in jobs if job.kind == kind and job.revision == newest]


def _study(study: ScannedStudy, storage: Storage) -> dict[str, Any]:
    uid = study.study_instance_uid
    known = storage.index.study(uid)
    analyses, deliveries = _last(storage, study, "analyse"), _last(storage, study, "deliver")
    results = {result.sop_instance_uid: result for result in storage.jobs.results(study_instance_uid=uid)}
    arrived = [d.sop_instance_uid for d in storage.jobs.deliveries(study_instance_uid=uid) if d.state in {"sent", "committed"}]
    if any(job.state in FAILED for job in [*analyses, *deliveries]) or (
        study.images_accepted and known is not None and known.state != "closed"
    ):
        outcome = "failed"
    else:
        outcome = "analysed" if any(job.state == "done" for job in analyses) else "refused"
    counts = study.instances_sent
    return {
        "study_instance_uid": uid,
        "revision": known.revision if known else 0,
        "outcome": outcome,
        "series": [{"series_instance_uid": s, "modality": modality, "instances": counts[s]} for s, modality in study.series.items()],
        "packages": _packages(study, storage, analyses),
        "findings": [{"package": job.package, **finding} for job in analyses for finding in job.detail.get("findings", [])],
        "scores": [{"package": job.package, **score} for job in analyses for score in job.detail.get("scores", [])],
        "comparisons": [{"package": job.package, **job.detail["comparison"]} for job in analyses if "comparison" in job.detail],
        "objects": [
            {
                "file": f"pacs/{s}.dcm",
                "modality": results[s].modality,
                "sop_class_uid": results[s].sop_class_uid,
                "sop_instance_uid": s,
            }
            for s in arrived
        ],
        "seconds": _seconds(study, storage, analyses, deliveries),
    }


def _packages(study: ScannedStudy, storage: Storage, analyses: Sequence[Job]) -> list[dict[str, Any]]:
    if not study.images_accepted:
        refusal = {"accepted": False, "reason_code": "no-images", "reason": "no image of this study was accepted by the node"}
        return [{"name": package.name, "version": package.version, **refusal} for package in storage.registry.packages()]
    return [
        {
            "name": job.package,
            "version": job.version,
            "accepted": job.state != "refused",
            "reason_code": job.reason_code,
            "reason": job.reason,
        }
        for job in analyses
    ]


def _seconds(study: ScannedStudy, storage: Storage, analyses: Sequence[Job], deliveries: Sequence[Job]) -> dict[str, float]:
    known = storage.index.study(study.study_instance_uid)
    revisions = storage.index.revisions(study.study_instance_uid)
    closed = revisions[-1].closed_at if revisions else None
    stages = {stage: sum(job.detail.get("seconds", {}).get(stage, 0.0) for job in analyses) for stage in ("volume", "inference", "results")}
    waited = _between(known.last_received_at, closed) if known else 0.0
    return {
        "receive": round(study.receive_seconds, 3),
        "complete": round(waited, 3),
        **{stage: round(value, 3) for stage, value in stages.items()},
        "deliver": round(sum(_between(job.created_at, job.ended_at) for job in deliveries), 3),
        "total": round(_between(study.sent_at, study.settled_at), 3),
    }


def _between(first: datetime | None, last: datetime | None) -> float:
    return max(0.0, (last - first).total_seconds()) if first and last else 0.0
