"""Light that changes slowly across an organ is made even, and a tumour stays as bright as it is."""

from __future__ import annotations

import torch

from dicomnode.analysis.even_light import evened

SHAPE = (40, 48, 40)


def test_slow_changes_go_and_a_tumour_and_what_is_outside_stay() -> None:
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    organ = sum(axis**2 for axis in axes) < 0.9
    tumour = sum((axis - 0.3) ** 2 for axis in axes) < 0.06
    noise = 0.3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    flat = torch.where(tumour, 4.0, 1.0) + noise
    bent = flat + 2.0 * axes[2] - 1.5 * axes[0] ** 2
    even = evened(bent, organ)
    assert torch.equal(even[~organ], bent[~organ])
    healthy = organ & ~tumour
    assert float(bent[healthy].std()) > 0.8
    assert float(even[healthy].std()) < 0.35
    assert abs(float(even[tumour].mean() - even[healthy].mean()) - 3.0) < 0.2
    assert abs(float(even[organ].mean() - bent[organ].mean())) < 1e-3
    assert evened(bent, None) is bent
