"""A whole evaluation in its folder, its page, and several side by side."""

import base64
import dataclasses
import io
import json
import shutil
from html.parser import HTMLParser

import pytest
from PIL import Image
from support.tiny_export import tiny_config, write_tiny_checkpoint

from dataloaders.config import ClipConfig
from dataloaders.shards import read_index
from evaluation.compare import compare
from evaluation.held_out import open_shards
from evaluation.report import write_page
from evaluation.run import Settings, evaluate, obstacles
from evaluation.video import DriftSettings
from kairos_train import cli
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import write_json
from kairos_train.inference.load import load
from kairos_train.weights.export import export

SETTINGS = Settings(samples=6, steps=2, guidance=1.0, seed=3, drift=DriftSettings(videos=2, chunks=2))
PLAYED = {
    "env": "push2d",
    "policies": {
        "model": {
            "tasks": {"red": {"successes": 7, "episodes": 10, "rate": 0.7, "interval95": [0.3968, 0.8922]}},
            "all": {"successes": 7, "episodes": 10, "rate": 0.7, "interval95": [0.3968, 0.8922]},
        },
        "<random>": {
            "tasks": {"red": {"successes": 0, "episodes": 10, "rate": 0.0, "interval95": [0.0, 0.2775]}},
            "all": {"successes": 0, "episodes": 10, "rate": 0.0, "interval95": [0.0, 0.2775]},
        },
    },
    "seed_start": 10000,
    "episodes_per_task": 10,
}


class Page(HTMLParser):
    """What a page shows, and all that it would fetch."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.images, self.fetched, self.rows = [], [], [], []
        self.feed(path.read_text())
        self.text = " ".join(" ".join(row) for row in self.rows)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                head = "data:image/png;base64,"
                (self.images if value.startswith(head) else self.fetched).append(value.removeprefix(head))
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        if self.rows and self.lasttag in ("td", "th"):
            self.rows[-1].append(data)

    def row(self, first):
        return next(row for row in self.rows if row and row[0] == first)


@pytest.fixture(scope="module")
def evaluated(exported, shards, tmp_path_factory):
    """Folder and result of a whole evaluation. Read only."""
    out = tmp_path_factory.mktemp("evaluations") / "first"
    return out, evaluate(exported, shards=shards, out=out, settings=SETTINGS)


def only(result, *parts):
    """A copy of some of a result's parts."""
    return json.loads(json.dumps({part: result["parts"][part] for part in parts}))


def changed(folder, out, **changes):
    """A copy of an evaluation whose JSON differs in some top-level entries."""
    shutil.copytree(folder, out)
    found = json.loads((folder / "evaluation.json").read_text())
    (out / "evaluation.json").write_text(json.dumps(found | changes))
    return out


# --- one evaluation ---


def test_everything_that_a_model_can_do_is_measured_and_written(evaluated):
    out, result = evaluated
    assert set(result["parts"]) == {"open_loop", "losses", "video", "memory"}
    assert result["left_out"] == {}
    assert json.loads((out / "evaluation.json").read_text()) == result
    assert json.loads((out / "open_loop.json").read_text()) == result["parts"]["open_loop"]
    pictures = ("open_loop.png", "losses.png", "video_drift.png", "video_000.png", "video_001.png", "memory.png")
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "open_loop.json", "report.html", *pictures}
    assert all(Image.open(out / name).size[0] > 100 for name in pictures)


def test_the_page_holds_numbers_and_pictures_and_fetches_nothing(evaluated):
    out, result = evaluated
    page = Page(out / "report.html")
    assert page.fetched == []
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "http" not in (out / "report.html").read_text()
    assert len(page.images) == 6
    assert all(Image.open(io.BytesIO(base64.b64decode(content))).size[0] > 100 for content in page.images)
    row = result["parts"]["open_loop"]["rows"]["model"]
    assert page.row("model")[1:4] == [f"{row[k]:.4g}" for k in ("mse", "mse_ci95", "mae")]
    assert page.row("weights") == ["weights", "toy, ema of step 40, fp32"]
    assert f"{result['parts']['losses']['streams']['video']['loss']:.4g}" in page.row("video")
    assert f"{result['parts']['video']['chunks'][1]['psnr']['model']:.4g}" in page.row("2")
    horizon = result["parts"]["memory"]["layers"][0]["heads"][1]["horizon_frames"]["median"]
    assert page.row("3, 1")[1] == f"{horizon:.4g}"


def test_what_an_evaluation_says_of_itself_is_no_html(evaluated, tmp_path):
    out, result = evaluated
    text, parts = "<script>alert(1)</script>", json.loads(json.dumps(result["parts"]))
    names = {"open_loop": ("windows", "episodes", "steps"), "losses": ("windows", "draws", "weighting")}
    names |= {"memory": ("windows", "frames", "tokens_per_frame"), "video": ("beats_copy_frames",)}
    for part, keys in names.items():
        parts[part] |= dict.fromkeys(keys, text)
    about = {"experiment": text, "model_name": text, "seed": text, "left_out": {text: text}}
    page = Page(write_page(changed(out, tmp_path / "hostile", parts=parts, **about)))
    assert not {"script", "link", "iframe"} & set(page.tags)
    parts = json.loads(json.dumps(result["parts"]))
    parts["video"]["pictures"] = ["../secret.png"]
    with pytest.raises(UserError, match=r"the picture '\.\./secret\.png' is not a file of this folder"):
        write_page(changed(out, tmp_path / "other", parts=parts))


def test_closed_loop_results_that_lie_in_the_folder_are_shown(evaluated, tmp_path):
    folder = changed(evaluated[0], tmp_path / "played")
    (folder / "closed_loop.json").write_text(json.dumps(PLAYED))
    page = Page(write_page(folder))
    assert page.row("model") == ["model", "7/10 [0.40, 0.89]", "7/10 [0.40, 0.89]"]
    assert page.row("<random>") == ["<random>", "0/10 [0.00, 0.28]", "0/10 [0.00, 0.28]"]
    assert page.row("blind"), "beside the rest"
    (tmp_path / "alone").mkdir()
    with pytest.raises(UserError, match=r"holds no evaluation\.json and no closed_loop\.json"):
        write_page(tmp_path / "alone")
    (tmp_path / "alone" / "closed_loop.json").write_text(json.dumps(PLAYED))
    assert Page(write_page(tmp_path / "alone")).row("model")[1] == "7/10 [0.40, 0.89]"
    (tmp_path / "alone" / "closed_loop.json").write_text("{}")
    with pytest.raises(UserError, match="has no policies"):
        write_page(tmp_path / "alone")


def test_parts_beyond_a_model_are_left_out_with_the_reason_and_refused_when_asked_for(shards, tmp_path):
    config = tiny_config(streams="video", actions=False, conditions={"t2v": 1.0})
    export(write_tiny_checkpoint(tmp_path / "run", None, config=config), tmp_path / "export", dtype="fp32")
    result = evaluate(tmp_path / "export", shards=shards, out=tmp_path / "out", settings=SETTINGS)
    assert set(result["parts"]) == {"losses", "memory"}
    assert "without actions" in result["left_out"]["open_loop"]
    assert "follows no recording" in result["left_out"]["video"]
    assert result["left_out"]["video"] in Page(tmp_path / "out" / "report.html").text
    asked = dataclasses.replace(SETTINGS, parts=("losses", "open_loop"))
    with pytest.raises(UserError, match="parts=open_loop: the model was trained without actions"):
        evaluate(tmp_path / "export", shards=shards, out=tmp_path / "other", settings=asked)
    assert not (tmp_path / "other").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(exported, shards, tmp_path, evaluated):
    drift = SETTINGS.drift
    for changes, match in (
        ({"parts": ("openloop",)}, "parts=openloop: is unknown; choose from open_loop, losses, video, memory"),
        ({"parts": ()}, "parts: none given"),
        ({"samples": 0}, "samples=0: must be at least 1"),
        ({"drift": dataclasses.replace(drift, chunks=0)}, "chunks=0: must be at least 1"),
        ({"drift": dataclasses.replace(drift, carried=True)}, "history_causal=false"),
        ({"drift": dataclasses.replace(drift, history=2)}, "history=2: a chunk of 2 latent frames goes on from 1"),
        ({"lpips": tmp_path / "none.pt"}, r"lpips=.*none\.pt: not found"),
        ({"parts": ("losses",), "fvd": tmp_path / "none.pt"}, "judge pictures of the part video"),
    ):
        with pytest.raises(UserError, match=match):
            evaluate(exported, shards=shards, out=tmp_path / "out", settings=dataclasses.replace(SETTINGS, **changes))
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="holds an evaluation already"):
        evaluate(exported, shards=shards, out=evaluated[0], settings=SETTINGS)


def test_clips_are_no_recordings_and_must_have_the_windows_size(exported, shards, tmp_path):
    policy, index = load(exported), read_index(shards)
    assert obstacles(policy, index) == {}
    clips = dataclasses.replace(index, clips=ClipConfig())
    assert "no windows of episodes" in obstacles(policy, clips)["video"]
    shape = {"frames": 9, "height": 32, "width": 32, "samples": index.samples}
    write_json(tmp_path / "index.json", dataclasses.replace(clips, shapes=[shape]).to_dict())
    with pytest.raises(UserError, match="holds clips of 9 frames of 32×32 pixels, windows are of 5 frames"):
        open_shards(tmp_path, policy)


# --- several ---


def test_evaluations_on_the_same_stand_side_by_side_with_differences(evaluated, tmp_path):
    folder, result = evaluated
    parts = only(result, *result["parts"])
    parts["open_loop"]["rows"]["model"]["mse"] += 0.25
    parts["video"]["chunks"][0]["ssim"]["model"] -= 0.125
    other = changed(folder, tmp_path / "second", parts=parts)
    found = compare([folder, other], out=tmp_path / "page" / "both.html")
    assert (found["runs"], found["unlike"]) == (["first", "second"], {})
    page = Page(tmp_path / "page" / "both.html")
    assert page.row("MSE, model ↓")[-1] == "+0.25"
    assert page.row("SSIM, chunk 1, model ↑")[-1] == "-0.125"
    assert page.row("MSE, mean ↓")[-1] == "+0"
    assert len(page.images) == 4
    assert page.fetched == []
    before, after = found["parts"]["open_loop"]["MSE, model"]
    assert after - before == pytest.approx(0.25)


@pytest.mark.parametrize("what", ["shards", "seed", "windows"])
def test_numbers_of_other_data_or_noise_are_refused_or_marked(evaluated, tmp_path, what):
    _, result = evaluated
    folder = changed(evaluated[0], tmp_path / "first", parts=only(result, "losses", "open_loop"))
    parts, elsewhere = only(result, "losses", "open_loop"), result["shards"] | {"fingerprint": "elsewhere"}
    if what == "shards":
        other = changed(folder, tmp_path / "other", shards=elsewhere)
    else:
        parts["losses"][what] += 1
        other = changed(folder, tmp_path / "other", parts=parts)
    with pytest.raises(UserError, match=rf"other: \w+ was measured on something else than in first: {what}=.* --mixed"):
        compare([folder, other], out=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    found = compare([folder, other], out=tmp_path / "page.html", mixed=True)
    assert set(found["unlike"]) == ({"losses", "open_loop"} if what == "shards" else {"losses"})
    row = Page(tmp_path / "page.html").row("video ↓")
    assert row[2].startswith("≠ ")
    assert not any(cell.startswith(("+", "-")) for cell in row)


def test_other_videos_are_another_measurement_other_steps_are_not(evaluated, tmp_path):
    folder, parts = evaluated[0], only(evaluated[1], "video")
    parts["video"]["steps"] = 9
    compare([folder, changed(folder, tmp_path / "steps", parts=parts)], out=tmp_path / "page.html")
    assert Page(tmp_path / "page.html").row("sampling steps") == ["sampling steps", "2", "9"]
    parts["video"]["videos"][0]["key"] = "another"
    with pytest.raises(UserError, match="video was measured on something else than in first: videos differ"):
        compare([folder, changed(folder, tmp_path / "videos", parts=parts)], out=tmp_path / "page.html")


def test_closed_loops_are_compared_on_the_same_episodes(tmp_path):
    for name, changes in (("a", {}), ("b", {}), ("c", {"seed_start": 0})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "closed_loop.json").write_text(json.dumps(PLAYED | changes))
    found = compare([tmp_path / "a", tmp_path / "b"], out=tmp_path / "page.html")
    assert found["parts"]["closed_loop"]["model, red"] == [0.7, 0.7]
    shown = Page(tmp_path / "page.html").row("model, all ↑")
    assert shown == ["model, all ↑", "7/10 [0.40, 0.89]", "7/10 [0.40, 0.89]", "+0"]
    with pytest.raises(UserError, match="seed_start=0, not 10000"):
        compare([tmp_path / "a", tmp_path / "c"], out=tmp_path / "page.html")


def test_folders_that_cannot_be_compared_are_refused(evaluated, tmp_path):
    folder, page = evaluated[0], tmp_path / "page.html"
    with pytest.raises(UserError, match="one folder is given"):
        compare([folder], out=page)
    with pytest.raises(UserError, match="given twice"):
        compare([folder, folder / ".." / folder.name], out=page)
    with pytest.raises(UserError, match="holds no evaluation"):
        compare([folder, tmp_path], out=page)
    empty = changed(folder, tmp_path / "empty", parts={})
    with pytest.raises(UserError, match="no part was measured in two of first, empty"):
        compare([folder, empty], out=page)
    older = changed(folder, tmp_path / "older", format="kairos-evaluation-0")
    with pytest.raises(UserError, match="format is 'kairos-evaluation-0'"):
        compare([folder, older], out=page)
    same = changed(folder, tmp_path / "first", parts=only(evaluated[1], "losses"))
    parting = [f"{folder.parent.name}/first", f"{tmp_path.name}/first"]
    assert compare([folder, same], out=page)["runs"] == parting, "folders of one name"


def test_the_commands_evaluate_and_compare(exported, shards, tmp_path, capsys):
    common = ["--input", str(shards), "--samples", "4", "--steps", "1", "--parts", "open_loop,losses"]
    for name, seed in (("a", "0"), ("b", "1")):
        assert cli.main(["evaluate", str(exported), *common, "--seed", seed, "--out", str(tmp_path / name)]) == 0
    printed = json.loads(capsys.readouterr().out.split("\n}\n")[0] + "}")
    assert set(printed["parts"]) == {"open_loop", "losses"}
    assert printed["left_out"] == {"video": "not asked for", "memory": "not asked for"}
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert cli.main(["compare", *folders, "--out", str(tmp_path / "page.html")]) == 2
    assert "seed=1, not 0" in capsys.readouterr().err
    assert cli.main(["compare", *folders, "--mixed", "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file()
    assert cli.main(["evaluate", str(exported), *common[:-1], "dreams", "--out", str(tmp_path / "c")]) == 2
    assert "parts=dreams: is unknown" in capsys.readouterr().err
