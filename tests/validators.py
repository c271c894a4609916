"""What independent programs say of a result object: dciodvfy, DCMTK's dsrdump and dcmpschk, PixelMed's SR templates, dcmqi's readers.

`complaints` returns what is left after the noise that each program is known to make; the reason stands beside each pattern.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydicom import dcmread

from pacs import program

PIXELMED = Path("/usr/share/java/pixelmed.jar")
# The checker's XPath expressions are larger than Java's default limits. It runs for seconds only: a second compiler and parallel
# garbage collectors cost as much again as the check itself.
PIXELMED_COMMAND = [
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Djdk.xml.xpathTotalOpLimit=0",
    "-Djdk.xml.xpathExprOpLimit=0",
    "-Djdk.xml.xpathExprGrpLimit=0",
    "-cp",
    str(PIXELMED),
    "com.pixelmed.validate.DicomSRValidator",
]
STRUCTURED_REPORTS = {"1.2.840.10008.5.1.4.1.1.88.33", "1.2.840.10008.5.1.4.1.1.88.34"}
KEY_OBJECTS = "1.2.840.10008.5.1.4.1.1.88.59"
PRESENTATION_STATE = "1.2.840.10008.5.1.4.1.1.11.1"
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"

DCIODVFY_NOISE = re.compile(r"needed to build DICOMDIR")  # an attribute that is empty in the source image and copied as it is
DCMPSCHK_NOISE = re.compile(r"ContributionDateTime \(0018,a002\)")  # it takes no time zone in a DT
PIXELMED_NOISE = re.compile(
    r"^Found |IOD validation complete|Root Template Validation Complete"  # progress
    r"|has different code meaning"  # 121233: its table has the older wording
    r'|\((111001|111003),DCM,"Algorithm (Name|Version)"\): Content Item not in template'  # TID 4019, which it doesn't know there
    r"|Template 141[01].*(Missing conditional content item|Conditional content item present)"  # where 1410 and 1411 share a report
    r'|43468-8,LN,"XR unspecified body region"\) not found in context group 100'  # its CID 100 is older than this code
    r'|125007,DCM,"Measurement Group"\)/CODE [^/]*: Content Item not in template'  # a qualitative evaluation of TID 1501
)


def complaints(file: Path, folder: Path, *, templates: bool = True) -> list[str]:
    """Return what the validators find wrong with a result object, known noise left out; `folder` is for what dcmqi writes."""
    header = dcmread(file, stop_before_pixels=True)
    sop_class = header.SOPClassUID
    found = [f"dciodvfy: {line}" for line in _dciodvfy(file)]
    if sop_class == SEGMENTATION and "FrameOfReferenceUID" in header:  # of a projection: dcmqi 1.5.7 reads none without directions
        found += _reads(
            file, "segimage2itkimage", "--inputDICOM", file, "--outputDirectory", folder, "--outputType", "nrrd", "--prefix", "v"
        )
    if sop_class in STRUCTURED_REPORTS:
        found += _reads(file, program("dsrdump", "dcmtk"), "-q", file)
        found += [f"PixelMed: {line}" for line in _pixelmed(file)] if templates else []
        found += _reads(file, "tid1500reader", "--inputDICOM", file, "--outputMetadata", folder / "sr.json")
    if sop_class == PRESENTATION_STATE:
        found += [f"dcmpschk: {line}" for line in _dcmpschk(file)]
    if sop_class == KEY_OBJECTS:
        found += _reads(file, program("dsrdump", "dcmtk"), "-q", file)
    return found


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    beside = Path(sys.executable).parent / command[0]  # from the test extra, else from the system
    words = [str(beside if beside.exists() else command[0]), *map(str, command[1:])]
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=600, check=False)


def _reads(file: Path, *command: str | Path) -> list[str]:
    done = _run(*command)
    return [] if done.returncode == 0 else [f"{Path(command[0]).name} cannot read {file.name}: {done.stderr[-300:]}"]


def _dciodvfy(file: Path) -> list[str]:
    lines = _run("dciodvfy", "-new", file).stderr.splitlines()
    return [line for line in lines if line.startswith(("Error", "Warning")) and not DCIODVFY_NOISE.search(line)]


def _dcmpschk(file: Path) -> list[str]:
    """Its exit code is always 0; of an error the attribute stands in the line after it."""
    lines = _run(program("dcmpschk", "dcmtk"), file).stderr.splitlines()
    named = [f"{line} {after}" for line, after in zip(lines, [*lines[1:], ""], strict=True) if line.startswith("E: Error")]
    return [line for line in named if not DCMPSCHK_NOISE.search(line)]


def _pixelmed(file: Path) -> list[str]:
    java = program("java", "pixelmed-apps")
    if not PIXELMED.exists():
        pytest.skip(f"{PIXELMED} is not installed (apt-get install pixelmed-apps)")
    done = _run(java, *PIXELMED_COMMAND, file)
    return [line for line in (done.stdout + done.stderr).splitlines() if line.strip() and not PIXELMED_NOISE.search(line)]
