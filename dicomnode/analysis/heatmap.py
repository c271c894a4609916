"""Where in an image a classification looks: Grad-CAM where a network has gradients, occlusion where it has none.

Grad-CAM: R. R. Selvaraju et al., ICCV 2017. Occlusion: M. D. Zeiler and R. Fergus, ECCV 2014. A map says what moved the answer, not
where a disease ends, so nothing is measured on it.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

Activation = Literal["softmax", "sigmoid", "none"]

PATCHES = {2: 8, 3: 5}  # by dimensions: patches along each axis that are covered one after another
_BATCH = 8


def heat_map(network: torch.nn.Module, image: torch.Tensor, class_index: int, activation: Activation = "softmax") -> NDArray[np.float32]:
    """Return where the network finds the class, 0..1 on the image's own pixels; all zero where nothing moves its answer.

    `image` is (1, channels, *spatial), the result (*spatial). The network answers with (n, classes).
    """
    found = None if isinstance(network, torch.jit.ScriptModule) else _by_gradients(network, image, class_index)
    if found is None or not bool(found.max() > 0):
        found = _by_occlusion(network, image, class_index, activation)
    top = found.max()
    return np.asarray((found / top if bool(top > 0) else found).cpu().numpy(), dtype=np.float32)


def probabilities_of(logits: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Return (n, classes) probabilities of (n, classes, ...) raw numbers; axes of length one at the end are dropped."""
    flat = logits.float().flatten(1)
    return flat.softmax(dim=1) if activation == "softmax" else flat.sigmoid() if activation == "sigmoid" else flat


def _by_gradients(network: torch.nn.Module, image: torch.Tensor, class_index: int) -> torch.Tensor | None:
    """Grad-CAM at the last convolution whose result still has an extent; None where there is none or no gradient reaches it."""
    results: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, __: Any, result: Any) -> None:
        if isinstance(result, torch.Tensor) and result.ndim == image.ndim and max(result.shape[2:]) > 1 and result.requires_grad:
            results.append(result)

    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d)]
    handles = [module.register_forward_hook(keep) for module in convolutions]
    try:
        with torch.inference_mode(mode=False), torch.enable_grad():
            answer = network(image.detach().clone().requires_grad_())
            if not results or not answer.requires_grad:
                return None
            (slope,) = torch.autograd.grad(answer.flatten(1)[0, class_index], results[-1], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    if slope is None:
        return None
    spatial = tuple(range(2, slope.ndim))
    weighted = (slope.mean(dim=spatial, keepdim=True) * results[-1].detach()).sum(dim=1, keepdim=True).clamp_(min=0)
    return _enlarged(weighted, tuple(image.shape[2:]))


def _by_occlusion(network: torch.nn.Module, image: torch.Tensor, class_index: int, activation: Activation) -> torch.Tensor:
    """How much the class loses when a patch of the image is replaced by the image's mean."""
    spatial = tuple(image.shape[2:])
    patches = [min(PATCHES[len(spatial)], n) for n in spatial]
    edges = [np.linspace(0, n, p + 1).round().astype(int) for n, p in zip(spatial, patches, strict=True)]
    with torch.no_grad():
        whole = probabilities_of(network(image), activation)[0, class_index]
        mean = image.mean(dim=tuple(range(2, image.ndim)), keepdim=True)
        losses: list[torch.Tensor] = []
        covered: list[torch.Tensor] = []
        for place in np.ndindex(*patches):
            box = tuple(slice(int(e[i]), int(e[i + 1])) for e, i in zip(edges, place, strict=True))
            one = image.clone()
            one[(slice(None), slice(None), *box)] = mean
            covered.append(one)
            if len(covered) == _BATCH:
                losses.append(whole - probabilities_of(network(torch.cat(covered)), activation)[:, class_index])
                covered = []
        if covered:
            losses.append(whole - probabilities_of(network(torch.cat(covered)), activation)[:, class_index])
    return _enlarged(torch.cat(losses).reshape(1, 1, *patches).clamp_(min=0), spatial)


def _enlarged(coarse: torch.Tensor, spatial: tuple[int, ...]) -> torch.Tensor:
    mode = {2: "bilinear", 3: "trilinear"}.get(len(spatial), "nearest")
    fine: torch.Tensor = interpolate(coarse.float(), size=spatial, mode=mode, **({} if mode == "nearest" else {"align_corners": False}))
    return fine[0, 0]
