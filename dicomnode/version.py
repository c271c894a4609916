"""The node's version, read from the first release heading of CHANGELOG.md. Imports nothing of the node."""

from pathlib import Path

VERSION = next(
    line.split()[1].strip("[]")
    for line in (Path(__file__).parent / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("## ")
)
