"""Videos for others' benchmarks: generated, resumed, checked, judged."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from support.serving_exports import config_of, write_export

from dataloaders.files.video import decode_mp4
from dataloaders.files.video_encoder import encode_mp4
from evaluation.benchmarks.completeness import MANIFEST, check
from evaluation.benchmarks.generate import first_frame, write
from evaluation.benchmarks.registry import VIDEO_BENCHMARKS
from evaluation.benchmarks.results import judge
from kairos_train.basics.errors import UserError
from kairos_train.cli import main

WORLD, DREAM, PAI = (VIDEO_BENCHMARKS[name] for name in ("worldmodelbench", "dreamgen", "pai"))
VIDEOS = ("a.mp4", "b.mp4", "c.mp4")


def save_image(path, seed=0, size=(48, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def world_prompts(folder, names=("a", "b", "c")):
    """As WorldModelBench's own list; all entries show and say the same."""
    for name in names:
        save_image(folder / f"images/{name}.png")
    entries = [
        {
            "domain": "robotics" if name == "a" else "driving",
            "subdomain": "x",
            "text_first_frame": "A table.",
            "text_instruction": "The arm moves left.",
            "first_frame": f"images/{name}.png",
        }
        for name in names
    ]
    (folder / "worldmodelbench.json").write_text(json.dumps(entries))
    return folder / "worldmodelbench.json"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return world_prompts(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def generated(exported, prompts, tmp_path_factory):
    """A complete folder. Read only; `made` is a copy."""
    out = tmp_path_factory.mktemp("generated") / "videos"
    summary = write(WORLD, export=exported, prompts=prompts, out=out, fps=5, steps=1)
    assert (summary["videos"], summary["written"], summary["kept"]) == (3, 3, 0)
    return out


@pytest.fixture
def made(generated, tmp_path):
    return shutil.copytree(generated, tmp_path / "videos")


# --- first frames ---


@pytest.mark.parametrize("size", [(32, 64), (64, 128)], ids=["as high", "twice as high"])
def test_a_wide_first_frame_is_cropped_not_stretched(tmp_path, size):
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[:, size[1] // 4 : -size[1] // 4] = (10, 200, 30)  # the middle half is what a square sees
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    seen = first_frame(tmp_path / "wide.png", 32, 32)
    assert seen.shape == (32, 32, 3)
    assert (seen[:, 4:-4] == (10, 200, 30)).all()  # resampling blurs the edges


def test_a_photo_taken_sideways_is_turned_upright(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    rotated = Image.Exif()
    rotated[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=rotated)
    seen = first_frame(tmp_path / "photo.png", 32, 32)
    assert (seen[:, 16:] == 255).all()
    assert (seen[:, :16] == 0).all()


# --- write ---


def test_videos_have_the_models_frames_and_noise_of_their_own(generated):
    clips = {name: decode_mp4(generated / name) for name in VIDEOS}
    assert {clip.shape for clip in clips.values()} == {(5, 32, 32, 3)}
    # One picture and one instruction: only the noise can differ.
    assert not np.array_equal(clips["a.mp4"], clips["b.mp4"])
    assert sorted(path.name for path in generated.iterdir()) == [*VIDEOS, MANIFEST]


def test_a_second_call_writes_what_is_missing_or_damaged_the_same_again(exported, prompts, generated, made):
    (made / "a.mp4").unlink()
    (made / "b.mp4").write_bytes((made / "b.mp4").read_bytes()[:-200])
    before = (made / "c.mp4").stat().st_mtime_ns
    summary = write(WORLD, export=exported, prompts=prompts, out=made, fps=5, steps=1)
    assert (summary["written"], summary["kept"]) == (2, 1)
    assert (made / "c.mp4").stat().st_mtime_ns == before
    for name in VIDEOS:
        assert (made / name).read_bytes() == (generated / name).read_bytes()


def test_videos_of_other_settings_are_not_mixed(exported, prompts, made):
    with pytest.raises(UserError, match=r"other settings .seed 0, now 1"):
        write(WORLD, export=exported, prompts=prompts, out=made, fps=5, steps=1, seed=1)
    (made / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"without a kairos_benchmark.json"):
        write(WORLD, export=exported, prompts=prompts, out=made, fps=5, steps=1)


def test_several_chunks_make_longer_videos(exported, tmp_path):
    prompts = world_prompts(tmp_path, ["a"])
    write(WORLD, export=exported, prompts=prompts, out=tmp_path / "out", fps=5, steps=1, chunks=2)
    assert decode_mp4(tmp_path / "out/a.mp4").shape == (9, 32, 32, 3)
    assert check(WORLD, prompts=prompts, videos=tmp_path / "out")["complete"]


def test_a_missing_first_frame_is_named_before_the_model_is_loaded(tmp_path):
    prompts = world_prompts(tmp_path)
    (tmp_path / "images/b.png").unlink()
    with pytest.raises(UserError, match=r"1 first frames are not there: .*images/b.png"):
        write(WORLD, export=tmp_path / "nowhere", prompts=prompts, out=tmp_path / "out", fps=5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"history_frames": 2, "frames": 9}, "is given 2 history latent frames"),
        ({"cameras": ["left", "right"]}, "trained on 2 cameras"),
    ],
    ids=["history", "cameras"],
)
def test_a_model_that_does_not_start_from_one_picture_is_refused(tmp_path, prompts, settings, message):
    export = write_export(tmp_path / "model", config_of(**settings))
    with pytest.raises(UserError, match=message):
        write(WORLD, export=export, prompts=prompts, out=tmp_path / "out", fps=5, steps=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "heading"), [("videophy", "videopath,caption"), ("videophy2", "caption,videopath")])
def test_videophy_has_a_table_of_videos_in_its_own_order(exported, tmp_path, name, heading):
    benchmark, out = VIDEO_BENCHMARKS[name], tmp_path / "out"
    save_image(tmp_path / "cup.png")
    table = tmp_path / "captions.csv"
    table.write_text(
        'caption,image,model\n"Tea, hot, is poured.",cup.png,x\nA cup falls.,cup.png,x\nA cup falls.,cup.png,y\n'
    )
    write(benchmark, export=exported, prompts=table, out=out, fps=5, steps=1)
    assert (out / "videos.csv").read_text().splitlines()[0] == heading
    with (out / "videos.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["caption"] for row in rows] == ["Tea, hot, is poured.", "A cup falls."]
    assert [row["videopath"] for row in rows] == [str(out / "00000.mp4"), str(out / "00001.mp4")]
    assert check(benchmark, prompts=table, videos=out)["complete"]
    moved = shutil.move(out, tmp_path / "moved")
    assert list(check(benchmark, prompts=table, videos=moved)["unreadable"]) == ["videos.csv"]


def test_a_caption_without_picture_needs_a_model_that_starts_from_none(exported, tmp_path):
    (tmp_path / "captions.csv").write_text("caption\nA cup falls.\n")
    with pytest.raises(UserError, match="starts from a first frame, and 00000 of 1 has none"):
        write(
            VIDEO_BENCHMARKS["videophy"],
            export=exported,
            prompts=tmp_path / "captions.csv",
            out=tmp_path / "out",
            fps=5,
            steps=1,
        )


# --- names ---


def test_dreamgen_names_files_by_index_and_instruction(tmp_path):
    texts = {
        "10_Close_the_box": ("10_Close_the_box.txt", "Close the box"),
        "2_Pick_up_the_swan.": ("2_Pick_up_the_swan..txt", "Pick up the swan."),
    }
    for stem, (file, text) in texts.items():
        save_image(tmp_path / f"{stem}.png")
        (tmp_path / file).write_text(text + "\n")
    jobs = DREAM.jobs(tmp_path, images=None, samples=1)
    assert [(job.name, job.instruction) for job in jobs] == [
        ("2_Pick_up_the_swan..mp4", "Pick up the swan."),
        ("10_Close_the_box.mp4", "Close the box"),
    ]


@pytest.mark.parametrize("word", ["wan", "hunyuan", "cogvideo", "CogVideoX", "swans"])
def test_dreamgen_refuses_words_in_the_path_that_its_judges_parse_by(tmp_path, word):
    save_image(tmp_path / "set/0_Go.png")
    (tmp_path / "set/0_Go.txt").write_text("Go")
    videos = tmp_path / f"my_{word}" / "videos"
    with pytest.raises(UserError, match="whole path holds none of cogvideo, hunyuan, wan"):
        write(DREAM, export=tmp_path, prompts=tmp_path / "set", out=videos, fps=5)
    videos.mkdir(parents=True)
    with pytest.raises(UserError, match="whole path holds none of"):
        check(DREAM, prompts=tmp_path / "set", videos=videos)


def test_pai_has_a_video_per_prompt_and_seed(tmp_path):
    entries = [{"video_id": "robot_7", "prompt_en": "It turns.", "image_name": "robot_7.jpg"}]
    (tmp_path / "info.json").write_text(json.dumps(entries))
    jobs = PAI.jobs(tmp_path / "info.json", images=None, samples=2)
    assert [(job.name, job.group) for job in jobs] == [("robot_7__0.mp4", "robot"), ("robot_7__1.mp4", "robot")]
    assert jobs[0].image == tmp_path / "condition_image/robot_7.jpg"
    with pytest.raises(UserError, match="samples=6"):  # the official code looks for seeds 0 to 4
        PAI.jobs(tmp_path / "info.json", images=None, samples=6)


def test_two_prompts_that_share_a_file_name_are_refused(tmp_path):
    prompts = world_prompts(tmp_path, ["a", "b"])
    prompts.write_text(prompts.read_text().replace("images/b.png", "others/a.png"))
    with pytest.raises(UserError, match=r"a\.mp4 would be written twice"):
        WORLD.jobs(prompts, images=None, samples=1)


# --- check ---


def test_a_complete_folder_is_complete(prompts, generated):
    assert check(WORLD, prompts=prompts, videos=generated)["complete"]


def test_every_missing_unreadable_and_unexpected_file_is_named(prompts, made, capsys):
    (made / "a.mp4").unlink()
    (made / "b.mp4").write_bytes((made / "b.mp4").read_bytes()[:-200])
    encode_mp4(made / "c.mp4", decode_mp4(made / "c.mp4"), 5, codec="av1")
    (made / "d.mp4").write_bytes(b"x")
    assert main(["benchmark", "check", "worldmodelbench", str(made), "--prompts", str(prompts)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["complete"], report["expected"], report["missing"]) == (False, 3, ["a.mp4"])
    assert "cannot be decoded" in report["unreadable"]["b.mp4"]
    assert "not H.264" in report["unreadable"]["c.mp4"]
    assert report["unexpected"] == ["d.mp4"]


def test_a_shorter_video_than_the_manifest_says_is_found(prompts, made):
    encode_mp4(made / "a.mp4", decode_mp4(made / "a.mp4")[:3], 5)
    assert check(WORLD, prompts=prompts, videos=made)["unreadable"] == {
        "a.mp4": "has 3 frames of 32×32; the manifest says 5 frames of 32×32"
    }


def test_the_command_line_writes_and_finds_it_complete(exported, tmp_path, capsys):
    prompts, out = world_prompts(tmp_path, ["a"]), str(tmp_path / "out")
    command = ["benchmark", "write", "worldmodelbench", str(exported), "--prompts", str(prompts), "--out", out]
    assert main([*command, "--fps", "5", "--steps", "1", "--device", "cpu"]) == 0
    assert main(["benchmark", "check", "worldmodelbench", out, "--prompts", str(prompts)]) == 0
    assert '"written": 1' in capsys.readouterr().out
    assert main([*command, "--fps", "5", "--samples", "2"]) == 2  # not a setting of this benchmark
    assert "--samples" in capsys.readouterr().err


# --- judges ---

JUDGE = """
import av
def look(video, job):
    with av.open(str(video)) as file:
        frames = file.streams.video[0].frames
    return {"moves": job.key != "b", "frames": frames}
def uneven(video, job):
    return {job.key: 1}
def words(video, job):
    return {"score": "good"}
"""


@pytest.fixture
def judges(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    import sys

    sys.modules.pop("my_judges", None)


def test_a_judge_of_ones_own_scores_every_video(prompts, generated, tmp_path, judges):
    out = tmp_path / "judged.json"
    content = judge(WORLD, prompts=prompts, videos=generated, entry="my_judges:look", out=out)
    assert content == json.loads(out.read_text())
    moves, frames = content["scores"]["moves"], content["scores"]["frames"]
    assert (moves["total"]["kind"], moves["total"]["successes"], moves["total"]["n"]) == ("rate", 2, 3)
    assert (moves["driving"]["n"], moves["robotics"]["n"]) == (2, 1)
    assert (frames["total"]["kind"], frames["total"]["value"]) == ("mean", 5)
    assert content["videos"]["b.mp4"] == {"moves": False, "frames": 5}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("my_judges", "must be module:function"),
        ("my_judges:nobody", "has no function nobody"),
        ("no_such_module:f", "no module no_such_module"),
        ("my_judges:uneven", "by other names than the rest"),
        ("my_judges:words", "scores are bools and finite numbers"),
    ],
    ids=["form", "function", "module", "names", "values"],
)
def test_a_judge_that_will_not_do_is_refused(prompts, generated, tmp_path, judges, entry, message):
    with pytest.raises(UserError, match=message):
        judge(WORLD, prompts=prompts, videos=generated, entry=entry, out=tmp_path / "judged.json")
    assert not (tmp_path / "judged.json").exists()


def test_an_incomplete_folder_is_not_judged(prompts, made, tmp_path, judges):
    (made / "a.mp4").unlink()
    with pytest.raises(UserError, match=r"not complete .1 missing"):
        judge(WORLD, prompts=prompts, videos=made, entry="my_judges:look", out=tmp_path / "judged.json")
