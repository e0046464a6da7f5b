"""The picture: what is drawn for which report, and that a file is whole or not there."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from headwise.errors import CacheStateError, ConfigurationError, InputError
from headwise.policies import FastGen
from headwise.report import picture
from headwise.report.layer_report import LayerReport
from headwise.report.report import Report

RUNGS = tuple(rung.label for rung in FastGen(0.9).rungs)
SEEN = 200


def layer(choice, kept):
    """A layer of one batch: per sequence and head, the index of its rung and its kept tokens."""
    kept = torch.tensor(kept)
    full = SEEN * kept.numel() * 64
    return LayerReport(int(kept.sum()) * 64, int(kept.sum()) * 66, full, kept, np.array(RUNGS)[choice], RUNGS)


def report(*layers):
    return Report(str(FastGen(0.9)), SEEN, list(layers), 100, "reference", 0.5, 0.1)


@pytest.fixture
def mixed():
    """Two sequences, two heads; the middle layer is not headwise's."""
    return report(
        layer([[0, 4], [3, 3]], [[2, 200], [120, 122]]),
        LayerReport(5000, 5000, 5000),
        layer([[3, 3], [4, 4]], [[100, 150], [200, 200]]),
    )


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    return figures


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def legend(figure):
    return [text.get_text().replace("\n", "") for text in figure.legends[0].get_texts()]


def cell_colours(figure):
    # Ours have a white edge; the layer that is not compressed is hatched.
    return [patch.get_facecolor() for patch in figure.axes[0].patches if not patch.get_hatch()]


def test_file_is_a_png_with_the_permissions_of_any_file(mixed, tmp_path):
    target = tmp_path / "map.png"
    picture.save_map(mixed, target)
    assert target.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
    (tmp_path / "other").touch()
    assert target.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_every_head_shows_its_share_and_rule(mixed, tmp_path, drawn):
    picture.save_map(mixed, tmp_path / "map.png")
    (figure,) = drawn
    assert texts(figure) == ["1%", "100%", "50%", "75%"]
    special, full, local, same = cell_colours(figure)
    assert len({special, full, local}) == 3
    assert local == same
    assert legend(figure) == [
        "special  (1)",
        "special+punctuation  (0)",
        "special+punctuation+frequent  (0)",
        "special+punctuation+frequent+local  (2)",
        "full  (1)",
        "not compressed(1 layer)",
    ]


def test_another_sequence(mixed, tmp_path, drawn):
    picture.save_map(mixed, tmp_path / "map.png", sequence=1)
    assert texts(drawn[0]) == ["60%", "61%", "100%", "100%"]
    assert "full  (2)" in legend(drawn[0])


def test_layers_of_transformers_are_hatched_over_their_whole_width(mixed, tmp_path, drawn):
    picture.save_map(mixed, tmp_path / "map.png")
    (stock,) = [patch for patch in drawn[0].axes[0].patches if patch.get_hatch()]
    assert (stock.get_y(), stock.get_width(), stock.get_height()) == (1, 2, 1)


def test_title_says_what_was_kept_and_saved(mixed, tmp_path, drawn):
    picture.save_map(mixed, tmp_path / "map.png")
    title, summary = (text.get_text() for text in drawn[0].texts)
    assert title == "FastGen(recovery=0.9)"
    assert f"{SEEN} tokens" in summary
    assert f"{mixed.kept_ratio:.1%} kept" in summary
    assert f"{mixed.saved_bytes / mixed.full_bytes:.0%} of" in summary


def test_a_model_without_compressed_layers(tmp_path):
    picture.save_map(report(LayerReport(10, 10, 10)), tmp_path / "map.png")
    assert (tmp_path / "map.png").is_file()


@pytest.mark.parametrize("sequence", [-1, 2])
def test_no_such_sequence(mixed, tmp_path, sequence):
    with pytest.raises(ConfigurationError, match="batch of 2"):
        picture.save_map(mixed, tmp_path / "map.png", sequence)
    assert list(tmp_path.iterdir()) == []


def test_nothing_seen(tmp_path):
    with pytest.raises(CacheStateError, match="nothing to draw"):
        picture.save_map(report(LayerReport(0, 0, 0)), tmp_path / "map.png")


def test_a_failed_write_leaves_the_old_picture(mixed, tmp_path, monkeypatch):
    target = tmp_path / "map.png"
    target.write_bytes(b"old")

    def fail(self, file, **_):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(InputError, match="No space left"):
        picture.save_map(mixed, target)
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]


def test_a_link_stays_a_link(mixed, tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "map.png")
    picture.save_map(mixed, tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "map.png").is_file()


def test_without_matplotlib(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'headwise\[plot\]'"):
        picture.save_map(mixed, tmp_path / "map.png")


@pytest.mark.parametrize("target", ["nowhere/map.png", ".", "-"])
def test_bad_targets(tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="picture"):
        picture.check_target(target)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_is_not_writable(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="not writable"):
        picture.check_target(tmp_path / "map.png")


def test_folder_on_a_system_that_is_not_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="not writable"):
        picture.check_target(tmp_path / "map.png")


@pytest.mark.parametrize("colour", [*picture._COLOURS, picture._FULL])
def test_text_can_be_read_on_every_colour(colour):
    def luminance(code):
        parts = [int(code[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    ink = {"white": "#FFFFFF"}.get(picture._ink_on(colour), picture._ink_on(colour))
    light, dark = sorted((luminance(colour), luminance(ink)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.0
