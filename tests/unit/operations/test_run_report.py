"""The HTML page of runs: one file that needs nothing beside it."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from support.run_folders import RunFolder

from kairos_train import cli
from kairos_train.operations.reports.curves import thinned
from kairos_train.operations.samples import drop_later_samples, newest_samples, write_samples
from kairos_train.training.samples import Samples, images_of

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


def write_images(folder):
    """Samples of two steps, as a run writes them."""
    rng = np.random.default_rng(0)
    for step in (20, 40):
        frames = rng.integers(0, 255, (2, 3, 8, 16, 3), dtype=np.uint8)
        actions = rng.normal(size=(2, 2, 5, 2)).astype(np.float32)
        samples = Samples(frames=frames, actions=actions, valid=np.ones((2, 5), bool))
        write_samples(folder, step, images_of(samples))
    return folder


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    """The run's page, samples included."""
    write_images(run.folder)
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


def test_the_images_of_the_last_sampled_step_are_found_while_the_next_are_being_written(tmp_path):
    assert newest_samples(tmp_path) == []
    write_images(tmp_path)
    unfinished = tmp_path / "samples" / "step-00000060"
    unfinished.mkdir()
    (unfinished / ".video_0.gif.7.tmp").write_bytes(b"GIF8")
    (tmp_path / "samples" / "rank-00000.jsonl").write_text("{}\n")
    found = newest_samples(tmp_path)
    assert [(sample.path.name, sample.step, sample.kind) for sample in found] == [
        ("actions_0.png", 40, "png"),
        ("actions_1.png", 40, "png"),
        ("video_0.gif", 40, "gif"),
        ("video_1.gif", 40, "gif"),
    ]


def test_images_of_steps_that_are_done_again_are_dropped(tmp_path):
    write_images(tmp_path)
    (tmp_path / "samples" / "rank-00000.jsonl").write_text("{}\n")
    drop_later_samples(tmp_path, 40)
    assert {sample.step for sample in newest_samples(tmp_path)} == {40}
    drop_later_samples(tmp_path, 39)
    assert {sample.step for sample in newest_samples(tmp_path)} == {20}
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["rank-00000.jsonl", "step-00000020"]


def test_a_run_that_should_have_images_and_has_none_says_so(tmp_path):
    old = RunFolder(tmp_path / "old", config={"train": {"sample_every": 20}, "data": {"validation_shards": "held_out"}})
    old.start()
    old.go(40)
    page = page_of(tmp_path, old.folder)
    assert "Newest samples" in page.headings
    assert "by an earlier version, into TensorBoard alone" in page.text
    write_images(old.folder)
    assert "into TensorBoard alone" not in page_of(tmp_path, old.folder).text


def test_long_curves_are_averaged_and_keep_their_gaps():
    x, y = thinned(range(1000), [1.0] * 500 + [float("nan")] * 250 + [3.0] * 250, points=100)
    assert len(x) == 100
    assert (y[:50] == 1).all()
    assert np.isnan(y[50:75]).all()
    assert (y[75:] == 3).all()
    assert (np.diff(x) > 0).all()
