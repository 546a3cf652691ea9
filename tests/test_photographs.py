"""Photographs of known dimension: what is read, and what R^2 says of latents."""

import numpy as np
import pytest
from PIL import Image

from vaebal.errors import InputError
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
    rows = [row | {"dimension": count} for count in (1, 2, 3)]
    face = row | {"kind": "face", "counts": [2], "factor_r2": [0.9, 0.5]}
    page = photographs.table([*rows, face | {"dimension": 2}])
    assert "**2 of 3 turntable films have a count that the topology allows.**" in page
    assert "The others: 3 latents in 1." in page
    assert "**1 of 1 persons under moving light" in page
    assert "medians: 0.90, 0.50 with 2 latents." in page
    assert "| a | 300 | 3 | 1 or 2 | yes | 1.00 | 0.020 | 0.99, 1.00 | 10 |" in page


def test_what_cannot_be_used_is_one_sentence(folder, tmp_path, monkeypatch, capsys):
    (folder / "a" / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"notes\.txt cannot be used .*move it out"):
        photographs.films(folder)
    with pytest.raises(InputError, match=r"^--films=.*nowhere is no folder"):
        photographs.films(tmp_path / "nowhere")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(InputError, match=r"^--faces=.*other\.npz cannot be used .*subject"):
        photographs.faces(tmp_path / "other.npz")
    monkeypatch.setattr("sys.argv", ["photographs"])
    with pytest.raises(SystemExit) as left:
        photographs.main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: Give --films=FOLDER")


def test_a_second_start_draws_the_films_of_the_first(folder, tmp_path_factory, monkeypatch):
    """And not again what is finished."""
    fitted = []

    def made(of):
        fitted.append(of.name)
        row = {
            "kind": "film", "name": of.name, "images": 4, "counts": [1, 2], "settled": True,
            "error": 1.0, "variance": 50.0, "factor_r2": [0.99, 1.0], "seconds": 10.0,
            "dimension": 1,
        }  # fmt: skip
        if of.name == "b" and len(fitted) == 2:
            raise KeyboardInterrupt
        return row, {"z": np.zeros((4, 1)), "traversals": np.zeros((1, 9, 8, 8, 3))}

    drawn = []
    draw = photographs.draw
    monkeypatch.setattr(photographs, "fitted", made)
    monkeypatch.setattr(photographs, "draw", lambda shown: drawn.append([*shown]) or draw(shown))
    out = tmp_path_factory.mktemp("out")
    monkeypatch.setattr("sys.argv", ["photographs", f"--films={folder}", f"--out={out}"])
    with pytest.raises(KeyboardInterrupt):
        photographs.main()
    photographs.main()
    assert (fitted, drawn) == (["a", "b", "b"], [["a", "b"]])
    assert "](films.png)" in (out / "table.md").read_text()
