"""Masks and strength maps on other grids, against the definition: means over areas, in whole fine cells."""

import math

import numpy as np
import pytest
import torch

from diffusers_sae.resizing import average_areas, resize_map


def means_over_areas(line, new):
    """The definition in one dimension: cut every cell into as many parts as make new cells of whole numbers of them."""
    parts = np.repeat(np.asarray(line, float), math.lcm(len(line), new) // len(line))
    return parts.reshape(new, -1).mean(1)


SIZES = [(8, 8), (16, 8), (64, 8), (8, 16), (10, 8), (8, 10), (3, 8), (12, 5), (7, 1), (1, 7), (513, 64)]


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_every_cell_is_the_mean_of_the_area_it_covers(old, new):
    maps = torch.rand(2, 3, old, old, generator=torch.Generator().manual_seed(0))
    expected = np.apply_along_axis(means_over_areas, -1, maps.numpy(), new)
    expected = np.apply_along_axis(means_over_areas, -2, expected, new)
    np.testing.assert_allclose(average_areas(maps, (new, new)).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (10, 6), (4, 16)])
def test_a_finer_map_is_averaged_and_none_of_it_is_lost(size):
    """Of single points, which samples would miss."""
    for row, column in ((0, 0), (13, 7), (63, 63)):
        points = torch.zeros(1, 1, 64, 64)
        points[..., row, column] = 1.0
        averaged = resize_map(points, size)
        torch.testing.assert_close(averaged.sum(), torch.tensor(size[0] * size[1] / 64**2))
        torch.testing.assert_close(averaged, average_areas(points, size))


def test_a_coarser_map_is_interpolated():
    line = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)
    assert resize_map(line, (1, 4)).flatten().tolist() == [1.0, 1.5, 2.5, 3.0]


def test_a_map_that_is_finer_in_height_and_coarser_in_width():
    maps = torch.tensor([[0.0, 2.0], [2.0, 4.0], [5.0, 7.0], [7.0, 9.0]])[None, None]  # (1, 1, 4, 2)
    expected = torch.tensor([[1.0, 1.5, 2.5, 3.0], [6.0, 6.5, 7.5, 8.0]])
    torch.testing.assert_close(resize_map(maps, (2, 4))[0, 0], expected)


def test_a_map_of_the_size_of_the_grid_stays_as_it_is():
    maps = torch.randn(1, 2, 5, 7)
    assert torch.equal(resize_map(maps, (5, 7)), maps) and torch.equal(average_areas(maps, (5, 7)), maps)
