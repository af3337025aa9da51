import dataclasses
import io
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from lrurec import report
from lrurec.bundle import make_bundle
from lrurec.errors import ReportError
from lrurec.report import draw, require_drawable, write_report

CURVE = [
    {
        "step": step,
        "loss": 5 - step / 100,
        "learning_rate": 1e-3,
        "validation": {"recall@10": recall, "ndcg@10": recall / 2, "recall@20": recall * 1.5, "ndcg@20": recall / 1.5},
    }
    for step, recall in ((20, 0.1), (40, 0.3), (60, 0.2))
]


@pytest.fixture
def trained(small_bundle):
    return with_metadata(small_bundle, curve=CURVE, best_step=40)


def with_metadata(bundle, **metadata):
    return dataclasses.replace(bundle, metadata=metadata)


def lines(axis):
    return {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}


def test_the_curves_are_those_of_the_metadata(trained):
    loss, validation, *_ = draw(trained, "shop").axes
    assert lines(loss)["loss, a running mean"] == [[20, 4.8], [40, 4.6], [60, 4.4]]
    drawn = lines(validation)
    for name in ("recall@10", "ndcg@10", "recall@20", "ndcg@20"):
        assert drawn[name] == [[point["step"], point["validation"][name]] for point in CURVE]


def test_the_best_step_is_marked(trained):
    validation = draw(trained, "shop").axes[1]
    assert [40, 0.3] in [point for points in lines(validation).values() for point in points]
    assert "best recall@10 0.3000 at step 40" in validation.get_title(loc="left")


def test_every_channel_of_every_block_is_counted(trained):
    memory, phase = draw(trained, "shop").axes[2:4]
    for axis in (memory, phase):
        counts = [patch.get_data().values.sum() for patch in axis.patches]
        assert counts == [trained.config.state_channels] * 2 * trained.config.num_blocks
    sizes = trained.model.blocks[1].lru.eigenvalues().abs()
    label = f"block 2: median {np.median(sizes.numpy()):.3f}, max {sizes.max():.4f}"
    assert label in [text.get_text() for text in memory.get_legend().get_texts()]


def test_a_channel_that_forgets_nothing_or_all_can_be_drawn(small_bundle):
    weights = {name: value.clone() for name, value in small_bundle.model.state_dict().items()}
    weights["blocks.0.lru.nu_log"][:] = torch.tensor([-100.0, 100.0]).repeat(8)  # |λ| = 1 and 0
    bundle = make_bundle(small_bundle.config, weights, small_bundle.catalogue)
    memory = draw(bundle, "shop").axes[0]
    assert memory.get_xlim() == (0, 1)
    assert memory.patches[0].get_data().values.tolist() == [8, *[0] * (report.BINS - 2), 8]


def test_a_converted_bundle_has_no_curve_to_draw(small_bundle):
    assert len(draw(small_bundle, "shop").axes) == 2


def test_a_picture_is_one_that_can_be_seen(trained, tmp_path):
    write_report(tmp_path / "r.png", trained, "shop")
    pixels = imread(io.BytesIO((tmp_path / "r.png").read_bytes()))
    assert min(pixels.shape[:2]) > 800
    assert pixels[..., :3].std() > 0.05


def test_a_page_needs_nothing_from_elsewhere(trained, tmp_path):
    write_report(tmp_path / "r.html", trained, "shop")
    page = (tmp_path / "r.html").read_text()
    assert not re.search(r"<(script|link|iframe|object)|@import|url\((?!#)|(src|href)=\"(?!#)", page)
    ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + len("</svg>")])  # noqa: S314 - our own


def test_names_and_metadata_are_text_and_never_markup(trained, tmp_path):
    evil = "<script>alert('&')</script>"
    bundle = with_metadata(trained, curve=CURVE, best_step=40, versions={evil: evil}, note=evil)
    write_report(tmp_path / "r.html", bundle, evil)
    assert "<script" not in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("name", ["a$_b$^{", "店", "a\\b"])
def test_a_name_is_never_a_formula_and_may_be_in_any_script(trained, tmp_path, name):
    write_report(tmp_path / "r.png", trained, name)
    assert draw(trained, name).get_suptitle() == f"{name}, version {trained.version}"


@pytest.mark.parametrize("name", ["r.html", "r.svg", "r.png"])
def test_an_equal_bundle_gives_equal_bytes(trained, tmp_path, name):
    write_report(tmp_path / name, trained, "shop")
    first = (tmp_path / name).read_bytes()
    write_report(tmp_path / name, trained, "shop")
    assert (tmp_path / name).read_bytes() == first


FOREIGN = {
    "no list": 7,
    "no points": ["a"],
    "no metrics": [{"step": 1, "loss": 1.0, "learning_rate": 0.1, "validation": {}}],
    "text": [CURVE[0] | {"loss": "low"}],
    "numbers as text": [CURVE[0] | {"loss": "4.5"}],
    "lists of numbers": [
        {"step": [1], "loss": [1], "learning_rate": [1], "validation": {name: [1] for name in report.METRICS}}
    ],
    "NaN": [CURVE[0] | {"loss": float("nan")}],
}


@pytest.mark.parametrize("curve", FOREIGN.values(), ids=FOREIGN)
def test_a_curve_of_another_program_is_refused_in_one_line(small_bundle, tmp_path, curve):
    with pytest.raises(ReportError, match="none of ours"):
        write_report(tmp_path / "r.html", with_metadata(small_bundle, curve=curve, best_step=1), "shop")
    assert not (tmp_path / "r.html").exists()


def test_half_a_character_in_the_metadata_does_not_keep_a_report_from_being_drawn(small_bundle, tmp_path):
    write_report(tmp_path / "r.html", with_metadata(small_bundle, versions={"torch\ud800": "\ud800"}), "shop")
    assert "torch?" in (tmp_path / "r.html").read_text()


def test_a_curve_without_a_best_step_is_drawn_unmarked(small_bundle):
    validation = draw(with_metadata(small_bundle, curve=CURVE), "shop").axes[1]
    assert validation.get_title(loc="left") == "Validation"


def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match=r"pip install 'stream-app\[report\]'"):
        require_drawable(tmp_path / "r.html", tmp_path / "shop.bundle")


@pytest.mark.parametrize("place", ["shop.html", "shop.html/r.html", "shop.html/deep/r.png"])
def test_a_report_does_not_go_into_the_bundle_that_it_is_on(tmp_path, place):
    with pytest.raises(ReportError, match="in the folder of the bundle"):
        require_drawable(tmp_path / place, tmp_path / "shop.html")
