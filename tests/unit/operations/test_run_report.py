"""The HTML page of runs: one file that needs nothing beside it."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from support.run_folders import RunFolder
from torch.utils.tensorboard import SummaryWriter

from kairos_train import cli
from kairos_train.operations.reports.curves import thinned
from kairos_train.operations.reports.tensorboard_samples import newest_samples
from kairos_train.training.samples import Samples, show

PICTURE = "data:image/"


class Page(HTMLParser):
    """What a page shows, and all that it would fetch."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.images, self.fetched, self.headings, self.words = [], [], [], [], []
        self._inside = ""
        self.feed(path.read_text())
        self.text = " ".join(self.words)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._inside = tag
        for name, value in attrs:
            if name in ("src", "href"):
                (self.images if value.startswith(PICTURE) else self.fetched).append(value)

    def handle_data(self, data):
        self.words.append(data)
        if self._inside in ("h1", "h2", "h3"):
            self.headings.append(data)

    def pictures(self):
        return [Image.open(io.BytesIO(base64.b64decode(image.split(",")[1]))) for image in self.images]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Killed once, with dropped steps, a changed setting and measurements that only some runs have."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "first")
    run.start()
    run.go(57)
    run.event("skipped", step=57, why="a loss spike", loss=9.0, grad_norm=3.0, samples=["a<b"])
    run.time += 100
    run.start()
    run.event("changed", setting="data.workers 2 -> 4")
    run.go(80)
    more = {"grad_norm/SWA": 0.5, "communication/tensor": 0.1, "decay/layer_03_median": 0.9, "unheard/of": 1.0}
    run.line("metrics.jsonl", {"step": 80, "time": run.time, **more})
    return run


def write_board(folder):
    """Samples of two steps in TensorBoard, scalars between them."""
    rng = np.random.default_rng(0)
    with SummaryWriter(str(folder)) as writer:
        for step in (20, 40):
            writer.add_scalar("loss/total", 1.0, step)
            frames = rng.integers(0, 255, (2, 3, 8, 16, 3), dtype=np.uint8)
            actions = rng.normal(size=(2, 2, 5, 2)).astype(np.float32)
            show(Samples(frames=frames, actions=actions, valid=np.ones((2, 5), bool)), writer, step)
            writer.add_text("curriculum/stages", "samples/ are not pictures here", step)
        writer.add_scalar("loss/total", 1.0, 60)
    return folder


@pytest.fixture
def board(tmp_path):
    return write_board(tmp_path / "tensorboard")


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    """The run's page, samples included."""
    write_board(run.folder / "tensorboard")
    return page_of(tmp_path_factory.mktemp("page"), run.folder)


def page_of(tmp_path, *folders, code=0):
    out = tmp_path / "page.html"
    assert cli.main(["report", *map(str, folders), "--out", str(out)]) == code
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    return Page(out)


def test_the_page_needs_nothing_beside_it(page):
    assert page.fetched == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(min(picture.size) > 1 for picture in page.pictures())


def test_the_page_shows_what_the_run_measured_and_what_happened_to_it(page):
    for heading in ("Lives", "Goodput", "Losses", "Validation", "Gradients and learning rate", "Speed and memory"):
        assert heading in page.headings
    for heading in ("Memory of the Gated DeltaNet layers", "Further measurements", "Newest samples", "What happened"):
        assert heading in page.headings
    assert "Settings that changed on resumption" in page.headings
    assert "Settings that differ" not in page.headings
    for text in ("40.0% of 200 steps", "data.workers 2 -> 4", "a loss spike", "1 killed", "steps done again"):
        assert text in page.text


def test_the_newest_samples_are_inside_and_move(page):
    assert "step 40" in page.headings
    assert "step 20" not in page.headings
    moving = [picture for picture in page.pictures() if picture.format == "GIF"]
    assert [picture.n_frames for picture in moving] == [3, 3]


def test_text_of_a_run_is_not_read_as_html(tmp_path):
    run = RunFolder(tmp_path / "run", config={"stage": {"name": "<b>bold</b>"}})
    run.start()
    run.event("skipped", step=1, why="<script>alert(1)</script>")
    run.go(20)
    run.stop("error", "<img src=x>")
    page = page_of(tmp_path, run.folder)
    assert "<b>bold</b>" in page.text
    assert "script" not in page.tags
    assert page.fetched == []


def test_runs_stand_side_by_side_with_the_settings_that_differ(run, tmp_path):
    other = RunFolder(tmp_path / "second", config={"guard": {"skips": 3}})
    other.start()
    other.go(200)
    other.stop("finished")
    page = page_of(tmp_path, run.folder, other.folder)
    assert "Settings that differ" in page.headings
    assert "guard.skips" in page.text
    assert "guard.window" not in page.text.partition("Settings that differ")[2].partition("All settings")[0]
    assert page.text.count("second") > 2


def test_a_run_without_a_step_and_one_of_before_have_a_page_too(tmp_path):
    fresh = RunFolder(tmp_path / "fresh")
    fresh.start()
    old = RunFolder(tmp_path / "old")
    old.start()
    old.go(40)
    (old.folder / "events.jsonl").unlink()
    page = page_of(tmp_path, fresh.folder, old.folder)
    assert "there is no report yet in metrics.jsonl" in page.text
    assert "the run wrote no events.jsonl" in page.text


def test_a_page_that_cannot_be_written_is_one_line(run, tmp_path, capsys):
    assert cli.main(["report", str(run.folder), "--out", str(tmp_path / "nowhere" / "page.html")]) == 2
    assert "--out" in capsys.readouterr().err


def test_samples_are_found_in_a_file_that_is_still_being_written(board):
    (file,) = board.iterdir()
    whole = file.read_bytes()
    found = newest_samples(board)
    assert [(sample.tag, sample.step, sample.kind) for sample in found] == [
        ("samples/actions_0", 40, "png"),
        ("samples/actions_1", 40, "png"),
        ("samples/video_0", 40, "gif"),
        ("samples/video_1", 40, "gif"),
    ]
    last, size = max((sample.place, sample.size) for sample in found)
    file.write_bytes(whole[: last + size - 10])
    assert [sample.tag for sample in newest_samples(board)] == [sample.tag for sample in found if sample.place != last]
    file.write_bytes(whole[:100])
    assert newest_samples(board) == []


def test_samples_of_a_later_life_come_first(board):
    with SummaryWriter(str(board)) as writer:
        writer.add_scalar("loss/total", 1.0, 30)
    assert newest_samples(board)[0].step == 40


def test_long_curves_are_averaged_and_keep_their_gaps():
    x, y = thinned(range(1000), [1.0] * 500 + [float("nan")] * 250 + [3.0] * 250, points=100)
    assert len(x) == 100
    assert (y[:50] == 1).all()
    assert np.isnan(y[50:75]).all()
    assert (y[75:] == 3).all()
    assert (np.diff(x) > 0).all()
