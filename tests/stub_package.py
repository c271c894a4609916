"""A package whose manifest is real and whose model is none: what it is given is chosen by rule, what it finds is the test's."""

from __future__ import annotations

from dicomnode.analysis.package import digest_of
from storage.registry import Registry

MANIFEST = """
schema = 1
name = "stub"
version = "1"
title = "Bright things"
manufacturer = "dicomnode"
algorithm_name = "stub"
licence = "Apache-2.0"
intended_use = "RESEARCH USE ONLY"
training_data = "none"
kind = "segmentation"
[input]
modality = "CT"
sop_classes = ["1.2.840.10008.5.1.4.1.1.2"]
minimum_slices = 4
slice_spacing_mm = [0.4, 5.5]
pixel_spacing_mm = [0.3, 3.5]
[preprocessing]
spacing_mm = [2.0, 1.5, 1.5]
window = [-1000.0, 400.0]
[inference]
window = [16, 32, 32]
[[outputs]]
channel = 0
label = "Bright thing"
category = { value = "49755003", scheme = "SCT", meaning = "Morphologically Abnormal Structure" }
type = { value = "27925004", scheme = "SCT", meaning = "Nodule" }
"""


def enable_stub_package(registry: Registry) -> None:
    """Add the package `stub` and enable it."""
    folder = registry.package_folder("stub", "1")
    (folder / "bundle" / "configs").mkdir(parents=True)
    (folder / "bundle" / "configs" / "inference.json").write_text("{}", encoding="utf-8")
    (folder / "bundle" / "models").mkdir()
    (folder / "bundle" / "models" / "model.safetensors").write_bytes(b"never read: the model is a stub")
    (folder / "manifest.toml").write_text(MANIFEST, encoding="utf-8")
    digest = digest_of(folder)
    registry.add_package("stub", "1", digest)
    registry.set_check("stub", "1", digest, {}, passed=True)
    registry.enable("stub", "1")
