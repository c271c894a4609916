"""Windows over an image: whatever their size and overlap, what is local stays where it is, and nothing is counted twice."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from dicomnode.analysis.networks import go_on
from dicomnode.analysis.sliding import Sliding, slide

CPU = torch.device("cpu")


def how(window: tuple[int, int, int], *, overlap: float = 0.25, batch: int = 2, outputs: int = 1) -> Sliding:
    return Sliding(window=window, overlap=overlap, batch=batch, outputs=outputs, stitch_on=CPU)


def same(windows: torch.Tensor) -> torch.Tensor:
    return windows[:, :1]


@given(
    shape=st.tuples(*[st.integers(1, 23)] * 3), window=st.tuples(*[st.integers(1, 12)] * 3), overlap=st.sampled_from([0.0, 0.25, 0.5, 0.8])
)
@settings(max_examples=60, deadline=None)
def test_a_network_that_changes_nothing_gives_the_image_back(
    shape: tuple[int, int, int], window: tuple[int, int, int], overlap: float
) -> None:
    image = torch.rand((1, *shape), generator=torch.Generator().manual_seed(sum(shape)))
    result = slide(image, same, how(window, overlap=overlap), where=None, between=go_on)
    assert result.shape == image.shape
    torch.testing.assert_close(result, image, atol=1e-6, rtol=1e-5)


def test_the_middle_of_a_window_counts_more_than_its_edge() -> None:
    calls = iter((0.0, 1.0))
    result = slide(
        torch.zeros(1, 1, 1, 24), lambda windows: windows + next(calls), how((1, 1, 16), overlap=0.5, batch=1), where=None, between=go_on
    )
    row = result[0, 0, 0]
    assert row[:8].eq(0).all()  # the first window alone
    assert (row[8:16].diff() > 0).all()  # both: from the first to the second
    assert row[16:].allclose(torch.tensor(1.0))


def test_windows_without_region_never_reach_the_network_and_the_region_sees_all_of_its_windows() -> None:
    image = torch.rand(1, 8, 40, 40)
    where = np.zeros((8, 40, 40), dtype=np.bool_)
    where[2:4, 5:9, 5:9] = True
    seen = []

    def predict(windows: torch.Tensor) -> torch.Tensor:
        seen.append(len(windows))
        return windows

    whole = slide(image, same, how((8, 16, 16)), where=None, between=go_on)
    part = slide(image, predict, how((8, 16, 16)), where=where, between=go_on)
    assert sum(seen) == 1
    assert torch.equal(part[0][torch.from_numpy(where)], whole[0][torch.from_numpy(where)])


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_how_many_windows_go_at_a_time_changes_nothing(batch: int) -> None:
    image = torch.rand(2, 10, 30, 30)
    kernel = torch.nn.Conv3d(2, 3, 3, padding=1).eval().requires_grad_(requires_grad=False)
    one = slide(image, kernel, how((8, 16, 16), batch=1, outputs=3), where=None, between=go_on)
    several = slide(image, kernel, how((8, 16, 16), batch=batch, outputs=3), where=None, between=go_on)
    torch.testing.assert_close(one, several, atol=1e-6, rtol=1e-5)


def test_between_windows_the_share_that_is_done_grows_from_zero() -> None:
    shares: list[float] = []
    slide(torch.rand(1, 8, 40, 40), same, how((8, 16, 16), batch=1), where=None, between=shares.append)
    assert shares == [i / 9 for i in range(9)]
