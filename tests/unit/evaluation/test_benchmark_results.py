"""Official result files in the forms that the benchmarks' own scripts write -> one form, or refused."""

import csv
import json
from statistics import stdev

import pytest

from evaluation.benchmarks.interface import noise_seed
from evaluation.benchmarks.registry import VIDEO_BENCHMARKS
from evaluation.benchmarks.results import import_results
from evaluation.intervals import mean_interval, wilson
from kairos_train.basics.errors import UserError
from kairos_train.cli import main


def imported(name, prompts, out, samples=1, **files):
    return import_results(VIDEO_BENCHMARKS[name], prompts=prompts, files=files, out=out, samples=samples)


def save(path, content):
    path.write_text(json.dumps(content))
    return path


# --- intervals ---


def test_the_interval_of_a_mean_is_students():
    # Three values 1, 2, 3: 2 ± 4.302653 · 1/√3.
    low, high = mean_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    with pytest.raises(ValueError, match="needs two"):
        mean_interval([1.0])


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (9, 2.26216), (49, 2.00958)]
)
def test_students_quantile_is_that_of_the_tables(freedom, quantile):
    values = [float(i) for i in range(freedom + 1)]
    low, high = mean_interval(values)
    assert (low + high) / 2 == pytest.approx(freedom / 2)
    assert (high - low) / 2 == pytest.approx(quantile * stdev(values) / len(values) ** 0.5, rel=1e-5)


def test_noise_seeds_differ_with_every_part():
    seeds = {noise_seed(*parts) for parts in [(0, "a", 1), (0, "a", 2), (0, "a1", ""), (1, "a", 1), ("0a", 1)]}
    assert len(seeds) == 5
    assert max(seeds) < 2**48


# --- WorldModelBench ---


@pytest.fixture
def world(tmp_path):
    """Prompts of two entries, and the result file of the official script: entry b, then a."""
    entries = [
        {"domain": domain, "text_instruction": "Go.", "first_frame": f"images/{name}.jpg"}
        for name, domain in (("b", "robotics"), ("a", "driving"))
    ]
    result = {
        "model_name": "mine",
        "preds": {
            name: {"instruction": ["…"], "physical_laws": ["No"] * 5, "common_sense": ["No"] * 2} for name in "ba"
        },
        "accs": {
            "instruction": [3.0, 1.0],
            "physical_laws": [True, True, False, True, True, True, False, False, True, True],
            "common_sense": [True, True, False, True],
        },
    }
    return save(tmp_path / "prompts.json", entries), result


def test_worldmodelbench_scores_are_the_official_ones_with_n_and_interval(world, tmp_path):
    prompts, result = world
    found = imported("worldmodelbench", prompts, tmp_path / "out.json", results=save(tmp_path / "r.json", result))
    scores = found["scores"]
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert (found["complete"], found["jobs"], found["judged_model"]) == (True, 2, "mine")
    assert scores["instruction"]["total"]["value"] == 2
    assert scores["instruction"]["robotics"]["value"] == 3
    assert scores["instruction"]["robotics"]["low"] is None
    mass, gravity = scores["physical_laws.mass"], scores["physical_laws.gravity"]
    assert (mass["total"]["successes"], mass["total"]["n"], mass["driving"]["value"]) == (1, 2, 0)
    assert (mass["total"]["low"], mass["total"]["high"]) == wilson(1, 2)
    assert gravity["total"]["value"] == 1
    # The official total: mean instruction + sums of the questions' means.
    assert scores["total_of_10"]["total"]["value"] == pytest.approx(2 + (1 + 0.5 + 0 + 1 + 1) + (0.5 + 1))
    assert scores["total_of_10"]["robotics"]["value"] == pytest.approx(3 + 4 + 2)


def _without(result):
    del result["preds"]["a"]
    result["accs"] = {part: values[: len(values) // 2] for part, values in result["accs"].items()}


def _strange(result):
    result["preds"]["c"] = result["preds"].pop("a")


def _short(result):
    result["accs"]["physical_laws"].pop()


def _out_of_range(result):
    result["accs"]["instruction"][0] = 7.0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without, "covers 1 of 2 .1 missing: a"),
        (_strange, "1 missing: a; 1 not of this prompt list: c"),
        (_short, "physical_laws: does not hold 10 answers"),
        (_out_of_range, "instruction.0.: is 7.0; it must be a number from 0 to 3"),
        (dict.clear, "has no preds and accs"),
    ],
    ids=["missing", "strange", "short", "range", "empty"],
)
def test_a_result_over_another_set_has_no_total(world, tmp_path, damage, message):
    prompts, result = world
    damage(result)
    with pytest.raises(UserError, match=message):
        imported("worldmodelbench", prompts, tmp_path / "out.json", results=save(tmp_path / "r.json", result))
    assert not (tmp_path / "out.json").exists()


def test_the_command_line_imports_and_names_the_kinds(world, tmp_path, capsys):
    prompts, result = world
    save(tmp_path / "r.json", result)
    command = ["benchmark", "import", "worldmodelbench", "--prompts", str(prompts), "--out", str(tmp_path / "o.json")]
    assert main([*command, "--results", f"results={tmp_path / 'r.json'}"]) == 0
    assert json.loads(capsys.readouterr().out)["complete"]
    assert main([*command, "--results", str(tmp_path / "r.json")]) == 2
    assert "takes results=FILE" in capsys.readouterr().err


# --- DreamGen Bench ---


@pytest.fixture
def dreams(tmp_path):
    for index, text in enumerate(("Pick up the can, then the box", "Close it")):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / f"set/{index}_x.png").write_bytes(b"")
        (tmp_path / f"set/{index}_x.txt").write_text(text)
    return tmp_path / "set"


def dream_csv(path, *rows):
    """As the official script writes it: no quotes, commas of the prompt made spaces."""
    path.write_text("video_path,prompt,prediction\n" + "".join(f"{row}\n" for row in rows))
    return path


FIRST = "v/0_Pick_up_the_can,_then_the_box.mp4,Pick up the can  then the box"


def test_dreamgen_counts_instructions_followed(dreams, tmp_path):
    result = dream_csv(tmp_path / "r.csv", f"{FIRST},1", "v/1_Close_it.mp4,Close it,0")
    total = imported("dreamgen", dreams, tmp_path / "out.json", sr=result)["scores"]["instruction_following"]["total"]
    assert (total["successes"], total["n"], (total["low"], total["high"])) == (1, 2, wilson(1, 2))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((f"{FIRST},1",), "covers 1 of 2 .1 missing: 1_Close_it.mp4"),
        ((f"{FIRST},1", "v/1_Close_it.mp4,Close it,0", "w/1_Close_it.mp4,Close it,1"), "1 there twice"),
        ((f"{FIRST},1", "v/1_Close_it.mp4,Pick up the can  then the box,0"), "1_Close_it.mp4 was judged by the prompt"),
        ((f"{FIRST},1", "v/1_Close_it.mp4,Close it,yes"), "is 'yes'; it must be 0 or 1"),
        ((f"{FIRST},1", "v/1_Clo"), "is cut short"),
    ],
    ids=["missing", "twice", "prompt of another", "answer", "cut"],
)
def test_dreamgen_results_that_do_not_fit_are_refused(dreams, tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        imported("dreamgen", dreams, tmp_path / "out.json", sr=dream_csv(tmp_path / "r.csv", *rows))


# --- PAI-Bench ---


@pytest.fixture
def pai(tmp_path):
    ids = ("robot_1", "robot_2", "av_1")
    save(tmp_path / "p.json", [{"video_id": i, "prompt_en": "Go.", "image_name": f"{i}.jpg"} for i in ids])
    names = [f"{i}__{seed}" for i in ids for seed in (0, 1)]
    values = dict(zip(names, (20.0, 40.0, 50.0, 70.0, 10.0, 90.0)))
    quality = {
        "imaging_quality": [
            46.6667 / 100,
            [{"video_path": f"/v/{n}.mp4", "video_results": v} for n, v in values.items()],
        ],
        "motion_smoothness": [0.9, [{"video_path": f"/v/{n}.mp4", "video_results": 0.9} for n in names]],
    }
    vqa = [
        {"video_id": i, "video_paths": [f"/v/{i}__0.mp4", f"/v/{i}__1.mp4"], "accuracy": a, "results": []}
        for i, a in zip(ids, (0.5, 1.0, 0.75))
    ]
    return tmp_path / "p.json", quality, vqa


def test_pai_averages_a_prompts_videos_before_it_counts(pai, tmp_path):
    prompts, quality, vqa = pai
    files = {"quality": save(tmp_path / "q.json", quality), "vqa": save(tmp_path / "v.json", vqa)}
    content = imported("pai", prompts, tmp_path / "out.json", samples=2, **files)
    scores = content["scores"]
    assert content["official_means"] == {"imaging_quality": pytest.approx(0.466667), "motion_smoothness": 0.9}
    imaging = scores["imaging_quality"]
    assert (imaging["total"]["n"], imaging["robot"]["n"]) == (3, 2)
    assert imaging["total"]["value"] == pytest.approx((0.3 + 0.6 + 0.5) / 3)
    assert imaging["robot"]["value"] == pytest.approx(0.45)
    assert (imaging["total"]["low"], imaging["total"]["high"]) == pytest.approx(mean_interval([0.3, 0.6, 0.5]))
    assert scores["motion_smoothness"]["av"]["value"] == pytest.approx(0.9)
    assert scores["vqa_accuracy"]["total"]["value"] == pytest.approx(0.75)


def test_pai_results_over_fewer_videos_are_refused(pai, tmp_path):
    prompts, quality, vqa = pai
    vqa[0]["video_paths"].pop()
    with pytest.raises(UserError, match=r"covers 5 of 6 .1 missing: robot_1__1.mp4"):
        imported("pai", prompts, tmp_path / "out.json", samples=2, vqa=save(tmp_path / "v.json", vqa))
    quality["imaging_quality"][1].pop()
    with pytest.raises(UserError, match="imaging_quality: covers 5 of 6"):
        imported("pai", prompts, tmp_path / "out.json", samples=2, quality=save(tmp_path / "q.json", quality))


# --- VideoPhy ---

SA_PROMPT = 'The following is…\nHuman: <|video|>\nHuman: Does this video entail the description: "{}"?\nAI: '
PC_PROMPT = "The following is…\nHuman: <|video|>\nHuman: Does this video follow the physical laws?\nAI: "
CAPTIONS = ("Tea, hot, is poured.", "A cup falls.", "A ball rolls.")


@pytest.fixture
def captions(tmp_path):
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["caption"], *([caption] for caption in CAPTIONS)])
    return tmp_path / "captions.csv"


def rows_to(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def phy1(path, scores, prompt):
    rows = [(f"/v/0000{i}.mp4", prompt.format(CAPTIONS[i]), score) for i, score in enumerate(scores)]
    return rows_to(path, rows)


def phy2(path, scores):
    rows = [(i, CAPTIONS[i], f"/v/0000{i}.mp4", score) for i, score in enumerate(scores)]
    return rows_to(path, [("", "caption", "videopath", "score"), *rows])


def test_videophy_has_rates_of_both_judgements_and_of_having_both(captions, tmp_path):
    files = {
        "sa": phy1(tmp_path / "sa.csv", (0.9, 0.5, 0.1), SA_PROMPT),
        "pc": phy1(tmp_path / "pc.csv", (0.2, 0.8, 0.9), PC_PROMPT),
    }
    scores = imported("videophy", captions, tmp_path / "out.json", **files)["scores"]
    assert [scores[name]["total"]["successes"] for name in ("sa", "pc", "sa_and_pc")] == [2, 2, 1]
    assert scores["sa_mean"]["total"]["value"] == pytest.approx(0.5)
    assert scores["sa_and_pc"]["total"]["n"] == 3
    with pytest.raises(UserError, match="was not asked for sa"):
        imported("videophy", captions, tmp_path / "out.json", sa=files["pc"], pc=files["sa"])


def test_videophys_doubled_rows_are_refused(captions, tmp_path):
    file = phy1(tmp_path / "sa.csv", (0.9, 0.5, 0.1), SA_PROMPT)
    file.write_text(file.read_text() * 2)  # the official script appends
    with pytest.raises(UserError, match="3 there twice"):
        imported("videophy", captions, tmp_path / "out.json", sa=file)


def test_videophy2_counts_scores_of_four_and_five(captions, tmp_path):
    files = {"sa": phy2(tmp_path / "sa.csv", (5.0, 4.0, 3.0)), "pc": phy2(tmp_path / "pc.csv", (4.0, 1.0, 5.0))}
    scores = imported("videophy2", captions, tmp_path / "out.json", **files)["scores"]
    assert [scores[name]["total"]["successes"] for name in ("sa", "pc", "sa_and_pc")] == [2, 2, 1]
    assert scores["pc_mean"]["total"]["value"] == pytest.approx(10 / 3)


@pytest.mark.parametrize(
    ("scores", "message"),
    [((5.0, 4.0), "covers 2 of 3 .*iloc.:20.. is taken out"), ((5.0, 0.0, 3.0), "0 for an answer that it cannot read")],
    ids=["first rows alone", "unread answer"],
)
def test_videophy2_results_that_the_official_script_cut_or_made_up_are_refused(captions, tmp_path, scores, message):
    with pytest.raises(UserError, match=message):
        imported("videophy2", captions, tmp_path / "out.json", sa=phy2(tmp_path / "sa.csv", scores))


def test_videophy2_results_of_other_captions_are_refused(captions, tmp_path):
    file = phy2(tmp_path / "sa.csv", (5.0, 4.0, 3.0))
    file.write_text(file.read_text().replace("A cup falls.", "A dog runs."))
    with pytest.raises(UserError, match=r"was judged for 'A dog runs.'"):
        imported("videophy2", captions, tmp_path / "out.json", sa=file)


@pytest.mark.parametrize(
    ("text", "message"),
    [("prompt\nx\n", "has no column 'caption'"), ('caption\n" "\n', "row 2 has an empty caption"), ("", "is empty")],
    ids=["column", "blank", "empty"],
)
def test_a_table_that_is_no_prompt_list_is_refused(tmp_path, text, message):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        VIDEO_BENCHMARKS["videophy"].jobs(tmp_path / "c.csv", images=None, samples=1)
