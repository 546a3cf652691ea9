"""Photographs of known dimension: what is read, and what R^2 says of latents."""

import numpy as np
import pytest
from PIL import Image

from vaebal.estimator import photographs


@pytest.fixture
def folder(tmp_path):
    """Two films of four photographs, a spot that moves down one and along the other."""
    for film in ("b", "a"):
        (tmp_path / film).mkdir()
        for frame in range(4):
            x = np.zeros((64, 64, 3), np.uint8)
            spot = (slice(16 * frame, 16 * frame + 16), slice(None))
            x[spot if film == "a" else spot[::-1]] = 255
            Image.fromarray(x).save(tmp_path / film / f"{frame}.png")
    (tmp_path / "LICENSE").write_text("")
    return tmp_path


def test_films_are_read_in_the_order_of_names_and_angles(folder):
    films = photographs.films(folder)
    assert [film.name for film in films] == ["a", "b"]
    x = films[0].images
    assert x.shape == (4, 32, 32, 3)
    for frame in range(4):
        rows = x[frame].mean((1, 2))
        assert rows.argmax() // 8 == frame
    np.testing.assert_allclose(films[0].factors, [[1, 0], [0, 1], [-1, 0], [0, -1]], atol=1e-12)


def test_faces_are_grouped_by_person_with_sines_of_the_light(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (6, 40, 36, 1)).astype(np.uint8)
    held = {
        "images": images, "subject": np.array([2, 1, 2, 1, 2, 1]),
        "light_azimuth": np.array([0, 30, 90, -30, 0, 0]), "light_elevation": np.full(6, 30),
    }  # fmt: skip
    np.savez(tmp_path / "faces.npz", **held)
    first, second = photographs.faces(tmp_path / "faces.npz")
    assert (first.name, second.name) == ("person 1", "person 2")
    assert first.images.shape == (3, 32, 32, 1)
    np.testing.assert_allclose(first.factors, [[0.5, 0.5], [-0.5, 0.5], [0, 0.5]], atol=1e-12)


def test_r2_of_factors_is_one_on_a_closed_curve_and_none_of_noise():
    angle = 2 * np.pi * np.arange(300) / 300
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    bent = np.stack([circle[:, 0] ** 3, np.sinh(circle[:, 1])], 1)
    assert min(photographs.held_out_r2(bent, circle)) > 0.99
    noise = np.random.default_rng(0).normal(size=(300, 2))
    assert max(photographs.held_out_r2(noise, circle)) < 0.1
    assert photographs.held_out_r2(np.zeros((300, 0)), circle) == [0.0, 0.0]


def test_the_table_counts_what_the_topology_allows():
    row = {
        "kind": "film", "name": "a", "images": 300, "counts": [1, 2], "settled": True, "error": 1.0,
        "variance": 50.0, "factor_r2": [0.99, 1.0], "seconds": 10.0,
    }  # fmt: skip
    page = photographs.table([row | {"dimension": count} for count in (1, 2, 3)])
    assert "allows in 2 of 3 sets" in page
    assert "| a | 300 | 3 | 1 or 2 | yes | 1.00 | 0.020 | 0.99, 1.00 | 10 |" in page
