"""Run a package once, on an admin's word, in a child process without network and under limits.

A bundle's configuration is code in disguise: the parent never loads it, and this module never imports torch. The child gives
up the network before anything heavy is imported, then runs `inference.check_package` and leaves a report.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.isolation import leave_network
from dicomnode.analysis.package import digest_of, load_package
from dicomnode.errors import NodeError, PackageError
from dicomnode.findings import Volume

MEMORY_BYTES = 8 * 2**30
SECONDS = 600.0
REPORT_BYTES = 2**20

_INHERITED = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "SYSTEMROOT")  # nothing secret goes along
_TEXTS = ("series_instance_uid", "study_instance_uid", "modality", "calibration")


def check_in_child(
    folder: Path,
    volumes: Mapping[str, Volume],
    *,
    digest: str | None = None,
    device: str = "auto",
    memory_bytes: int = MEMORY_BYTES,
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Run the package in `folder` in a child process and return what `inference.check_package` reports.

    `volumes` are what it runs on, one for each input of its manifest by its name.
    The report also says whether the kernel took the network from the child ("network_isolated"). `memory_bytes` limits the
    child's private memory, `seconds` its wall clock and its CPU time; with `digest` nothing is loaded that differs from it.

    Raises:
        PackageError: the package is refused, fails, or passes a limit; one sentence says which.
    """
    name = load_package(folder).manifest.name
    if digest is not None and digest_of(folder) != digest:
        raise PackageError(f"The package {name} is not the one with the digest {digest}: it is not run.")
    with tempfile.TemporaryDirectory(prefix="dicomnode-check-") as scratch:
        place = Path(scratch)
        for input_name, volume in volumes.items():
            _save(place / f"{input_name}.npz", volume)
        words = [str(folder.absolute()), scratch, digest or "", device, str(memory_bytes), str(seconds)]
        environment = {key: os.environ[key] for key in _INHERITED if key in os.environ}
        home = place / "home"
        home.mkdir(mode=0o500)  # nothing is left there, and nothing of the admin's own is found there
        environment |= {"HOME": str(home), "TMPDIR": scratch, "PYTHONPATH": os.pathsep.join(str(Path(p).absolute()) for p in sys.path)}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # unshare wants one thread
        with (place / "errors").open("wb") as errors:
            child = subprocess.Popen(  # noqa: S603  # our own interpreter and module; the words are paths and numbers, no shell
                [sys.executable, "-m", "dicomnode.analysis.check", *words],
                cwd=scratch, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
            )  # fmt: skip
            try:
                code = child.wait(timeout=seconds)
            except subprocess.TimeoutExpired as error:
                raise PackageError(
                    f"The check of the package {name} took longer than {seconds:g} s and was ended; --minutes allows more."
                ) from error
            finally:
                _end(child)
        return _report(place, name, code, seconds)


def _report(place: Path, name: str, code: int, seconds: float) -> dict[str, Any]:
    file = place / "report.json"
    if code == -signal.SIGXCPU:
        raise PackageError(
            f"The check of the package {name} used more than {seconds:g} s of CPU time and was ended; --minutes allows more."
        )
    if code != 0 or not file.is_file() or file.stat().st_size > REPORT_BYTES:
        lines = (place / "errors").read_text(errors="replace")[-4000:].splitlines() or ["it said nothing"]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise PackageError(f"The check of the package {name} died with {how}: {lines[-1][:300]}.")
    try:
        report = json.loads(file.read_bytes())
    except ValueError as error:
        raise PackageError(f"The check of the package {name} left no readable report.") from error
    if not isinstance(report, dict) or "refused" in report:
        raise PackageError(str(report["refused"]) if isinstance(report, dict) else f"The check of the package {name} left no report.")
    return report


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of the child's own session, also what it may have started."""
    with contextlib.suppress(ProcessLookupError):  # all of it has ended by itself
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _save(file: Path, volume: Volume) -> None:
    texts = {key: np.array(getattr(volume, key)) for key in _TEXTS}
    frame = np.array(volume.frame_of_reference_uid or "")
    np.savez(
        file, allow_pickle=False, voxels=volume.voxels, affine=volume.affine, sop_instance_uids=np.array(volume.sop_instance_uids),
        frame_of_reference_uid=frame, **texts,
    )  # fmt: skip


def _load(file: Path) -> Volume:
    with np.load(file, allow_pickle=False) as saved:
        return Volume(
            voxels=saved["voxels"],
            affine=saved["affine"],
            sop_instance_uids=tuple(str(uid) for uid in saved["sop_instance_uids"]),
            frame_of_reference_uid=str(saved["frame_of_reference_uid"]) or None,
            **{key: str(saved[key]) for key in _TEXTS},  # type: ignore[arg-type]  # one of them is a Literal
        )


def _limit(folder: Path, memory_bytes: int, seconds: float) -> None:
    written = REPORT_BYTES + max((file.stat().st_size for file in folder.rglob("*") if file.is_file()), default=0)  # a bundle is copied
    whole_seconds = int(seconds) + 1
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))  # not RLIMIT_AS: torch and CUDA reserve far more than they use
    resource.setrlimit(resource.RLIMIT_CPU, (whole_seconds, whole_seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (written, written))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _child(folder: str, scratch: str, digest: str, device: str, memory_bytes: str, seconds: str) -> None:
    isolated = leave_network()
    _limit(Path(folder), int(memory_bytes), float(seconds))
    volumes = {file.stem: _load(file) for file in Path(scratch).glob("*.npz")}
    inference = importlib.import_module("dicomnode.analysis.inference")  # not before the network is gone: it brings torch
    name = load_package(Path(folder)).manifest.name
    try:
        report = inference.check_package(Path(folder), volumes, digest=digest or None, device=device)
        report["network_isolated"] = isolated
    except NotEligible as refusal:
        report = {"refused": f"The package {name} doesn't accept the volume it is checked with: {refusal.reason}"}
    except NodeError as error:
        limited = f" The check may use {int(memory_bytes) // 2**20} MiB; --memory allows more." if "out of memory" in str(error) else ""
        report = {"refused": f"{error}{limited}"}
    except MemoryError:
        report = {"refused": f"The package {name} needs more than {int(memory_bytes) // 2**20} MiB of memory."}
    (Path(scratch) / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    _child(*sys.argv[1:])
