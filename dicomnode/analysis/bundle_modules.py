"""A bundle's own Python modules (its `scripts`), there while the bundle is loaded or run and gone from `sys.modules` afterwards.

Two bundles with a `scripts` each never see each other's. Must never be entered for a bundle that nobody consented to: importing its
modules runs them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage


class BundleModules:
    """The modules that a bundle in `root` brings, kept between its calls."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._own: dict[str, types.ModuleType] = {}

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Let the bundle's modules be importable within the block; its warnings are its own matter, and no byte code is written."""
        hidden = self._take()
        sys.modules.update(self._own)
        path, writes = list(sys.path), sys.dont_write_bytecode
        sys.path.insert(0, str(self._root))
        sys.dont_write_bytecode = True
        importlib.invalidate_caches()
        try:
            with stand_ins(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            sys.path[:], sys.dont_write_bytecode = path, writes
            self._own = self._take()
            sys.modules.update(hidden)

    @property
    def _names(self) -> set[str]:
        return {e.stem for e in self._root.iterdir() if e.suffix == ".py" or (e.is_dir() and any(e.glob("**/*.py")))}

    def _take(self) -> dict[str, types.ModuleType]:
        """Remove the modules of these names from `sys.modules` and return them."""
        names = self._names
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in names}


class _Layers(torch.nn.ModuleDict):
    """The children of a backbone up to the last layer wanted; gives what those in `return_layers` give, by their new names.

    What `torchvision.models._utils.IntermediateLayerGetter` does, with the same names of weights.
    """

    def __init__(self, model: torch.nn.Module, return_layers: dict[str, str]) -> None:
        names = [name for name, _ in model.named_children()]
        absent = [name for name in return_layers if name not in names]
        if absent:
            raise ValueError(f"return_layers names what the backbone hasn't: {', '.join(absent)}")
        last = max(names.index(name) for name in return_layers)
        super().__init__({name: getattr(model, name) for name in names[: last + 1]})
        self.return_layers = {str(name): str(new) for name, new in return_layers.items()}

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the layers one after another."""
        found: dict[str, torch.Tensor] = {}
        for name, layer in self.items():
            image = layer(image)
            if name in self.return_layers:
                found[self.return_layers[name]] = image
        return found


def _trainable_layers(is_trained: bool, layers: int | None, max_value: int, default_value: int) -> int:  # torchvision's
    if not is_trained:
        return max_value
    return default_value if layers is None else layers


def _label(mask: Any, connectivity: int | None = None, return_num: bool = False, **_: Any) -> Any:  # skimage's
    """Number the connected components of a mask as skimage.measure.label does."""
    array = np.asarray(mask)
    neighbours = ndimage.generate_binary_structure(array.ndim, connectivity or array.ndim)
    labels, count = ndimage.label(array, structure=neighbours)
    return (labels, count) if return_num else labels


class _Matcher:
    """In the place of torchvision's: MONAI's training asks whether its own is one."""


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Give MONAI the small things that it takes from torchvision and scikit-image, where those aren't installed.

    Its detection networks want a mapping of layers and a rule of three lines, its largest component wants connected components.
    """
    replaced: list[tuple[Any, str, Any]] = []
    if importlib.util.find_spec("torchvision") is None:
        models = types.SimpleNamespace(_utils=types.SimpleNamespace(IntermediateLayerGetter=_Layers))
        replaced.append((importlib.import_module("monai.networks.blocks.backbone_fpn_utils"), "torchvision_models", models))
        retina = importlib.import_module("monai.apps.detection.networks.retinanet_network")
        replaced.append((retina, "_validate_trainable_layers", _trainable_layers))
        replaced.append((importlib.import_module("monai.apps.detection.networks.retinanet_detector"), "Matcher", _Matcher))
    if importlib.util.find_spec("skimage") is None:
        transforms = importlib.import_module("monai.transforms.utils")
        replaced += [(transforms, "measure", types.SimpleNamespace(label=_label)), (transforms, "has_measure", True)]
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, value in replaced:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
