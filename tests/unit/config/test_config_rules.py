"""Every cross-field rule refuses what breaks it, and nothing else."""

import math

import pytest
from support.settings import changed

from dataloaders.config import SourceConfig
from kairos_train.basics.errors import UserError
from kairos_train.config import validate as rules
from kairos_train.config.compose import load_config
from kairos_train.config.operation_schema import FaultConfig
from kairos_train.config.schema import CaptionShare, Config, CurriculumConfig, CurriculumStage, LoraConfig

DEMO = "experiment=demo"

RULE_CASES = [
    ("values_are_legal", {"train.precision": "fp8"}, r"train\.precision=fp8 is unknown; use one of bf16, fp32"),
    ("values_are_legal", {"train.zero_stage": 4}, r"train\.zero_stage=4 is unknown; use one of 0, 1, 2, 3"),
    ("values_are_legal", {"train.steps": 0}, r"train\.steps=0 is outside \[1, 99999999\]"),
    ("values_are_legal", {"train.steps": 10**400}, r"train\.steps=10{79}… is outside"),
    ("values_are_legal", {"train.steps": 10**5000}, r"train\.steps=an integer of more than 4,300 digits is outside"),
    ("values_are_legal", {"model.num_layers": 4 * 10**9}, r"num_layers=4000000000 is outside \[1, 1024\]"),
    ("values_are_legal", {"model.video.dim": 2**20}, r"dim=1048576 is outside \[1, 131072\]"),
    (
        "values_are_legal",
        {"train.samples": 10**400},
        r"samples=10{79}… is not a positive number \(integers: 2\^53 at most\)",
    ),
    ("values_are_legal", {"watch.stuck": 1e300}, r"stuck=1e\+300 is no time above 0 and of 10\^9 seconds at most"),
    ("values_are_legal", {"data.workers": 10**6}, r"data\.workers=1000000 is outside \[0, 1024\]"),
    ("values_are_legal", {"optimizer.lr": math.nan}, r"optimizer\.lr=nan is not a positive number"),
    ("values_are_legal", {"stage.lr": math.inf}, r"stage\.lr=inf is not a positive number"),
    ("values_are_legal", {"train.peak_tflops": -1}, r"train\.peak_tflops=-1 is not a positive number"),
    ("values_are_legal", {"data.log_wait": -1}, r"data\.log_wait=-1 is no time"),
    ("values_are_legal", {"stage.weight_decay": math.nan}, r"stage\.weight_decay=nan is negative or not finite"),
    ("values_are_legal", {"stage.cfg_dropout": 1.5}, r"stage\.cfg_dropout=1\.5 is outside \[0, 1\]"),
    ("layer_kinds_are_known", {"model.video.layer_cycle": ["SWA", "SWO"]}, r"holds 'SWO'; use SWA, DSWA, FA, GATED"),
    ("layers_are_whole_cycles", {"model.num_layers": 6}, r"model\.num_layers=6 is no multiple of the 4 .*; use 4 or 8"),
    ("layers_are_whole_cycles", {"model.video.layer_cycle": []}, r"layer_cycle=\[\] is empty"),
    (
        "heads_divide_the_width",
        {"model.num_heads": 5},
        r"heads not divisible: model\.video\.dim=128 .*model\.num_heads=5",
    ),
    ("rotary_splits_the_head", {"model.num_heads": 128}, r"gives heads of 1 channels"),
    ("rotary_splits_the_head", {"model.num_heads": 32}, r"gives heads of 4 channels"),
    ("timestep_embedding_is_even", {"model.freq_dim": 63}, r"model\.freq_dim=63 is odd"),
    ("latents_fit_the_encoders", {"model.video.latent_channels": 8}, r"latent_channels=8; the video encoders give 16"),
    ("patches_tile_the_latents", {"model.video.patch_size": [2, 2, 2]}, r"patch_size=\[2, 2, 2\] does not tile"),
    ("patches_tile_the_latents", {"model.video.patch_size": [1, 2]}, r"patch_size=\[1, 2\] does not tile"),
    ("patches_tile_the_latents", {"model.video.patch_size": [1, 3, 2]}, r"patch_size=\[1, 3, 2\] does not tile"),
    (
        "token_windows_have_no_history_rule",
        {"model.video.window_semantics": "token"},
        r"restrict_history_query_to_history=true with model\.video\.window_semantics=token",
    ),
    (
        "causal_history_is_restricted",
        {"model.video.history_causal": True, "model.video.all_attend_history": True},
        r"with model\.video\.all_attend_history=true: .* use model\.video\.all_attend_history=false",
    ),
    (
        "causal_history_is_restricted",
        {
            "model.video.history_causal": True,
            "model.video.window_semantics": "token",
            "model.video.restrict_history_query_to_history": False,
        },
        r"history_causal=true with model\.video\.window_semantics=token: .* use model\.video\.window_semantics=frame",
    ),
    ("text_widths_agree", {"encoders.text.text_dim": 32}, r"encoders\.text\.text_dim=32 but model\.text_dim=64"),
    ("frames_are_4k_plus_1", {"data.window.frames": 10}, r"^data\.window\.frames=10 is not 4k\+1; use 9 or 13$"),
    ("frames_are_4k_plus_1", {"data.window.frames": 2}, r"frames=2 is not 4k\+1; use 1 or 5$"),
    ("frames_are_4k_plus_1", {"data.window.frames": 7}, r"frames=7 is not 4k\+1; use 5 or 9$"),
    ("frames_are_4k_plus_1", {"data.window.frames": 8}, r"frames=8 is not 4k\+1; use 5 or 9$"),
    ("pictures_are_multiples_of_32", {"data.window.height": 100}, r"height=100 is no multiple of 32; use 96 or 128"),
    ("sources_give_samples", {"data.sources": [SourceConfig()]}, r"data\.sources\[0\] has no shards; name its folder"),
    ("values_are_legal", {"data.sources": [SourceConfig("a", weight=-1.0)]}, r"sources\[0\]\.weight=-1\.0 is neg"),
    ("sources_give_samples", {"data.sources": [SourceConfig("a", max_epochs=0)]}, r"\[0\]\.max_epochs=0 is below 1"),
    ("sources_give_samples", {"data.sources": [SourceConfig("a", weight=0.0)]}, r"data\.sources: every weight is 0"),
    ("pictures_are_multiples_of_32", {"data.window.width": 16}, r"width=16 is no multiple of 32; use 32$"),
    ("clips_have_sides", {"data.clips.short_side": 16}, r"short_side=16 is below 32; use 32 or more"),
    ("clips_have_sides", {"data.clips.aspects": [0.5, 1]}, r"aspects=\[0\.5, 1\]; give .* from 1 to 8"),
    (
        "frames_are_4k_plus_1",
        {"data.clips.most_frames": 80},
        r"^data\.clips\.most_frames=80 is not 4k\+1; use 77 or 81$",
    ),
    (
        "some_clips_are_long_enough",
        {"data.clips.least_frames": 21, "data.clips.most_frames": 17},
        r"least_frames=21 is above data\.clips\.most_frames=17",
    ),
    (
        "head_stands_over_two_wrists",
        {"data.window.layout": "head_over_wrists", "data.window.height": 384, "data.window.cameras": ["a", "b"]},
        r"head_over_wrists with data\.window\.cameras=\['a', 'b'\]; name three",
    ),
    (
        "head_stands_over_two_wrists",
        {"data.window.layout": "head_over_wrists", "data.window.cameras": ["a", "b", "c"], "data.window.height": 256},
        r"height=256 with layout=head_over_wrists is no multiple of 96; use 288",
    ),
    (
        "cameras_are_named_once",
        {"data.window.cameras": ["top", "wrist", "top"]},
        r"cameras=\['top', 'wrist', 'top'\] names a camera twice; name each once",
    ),
    ("absolute_dims_are_named_once", {"data.window.absolute_dims": [6, 6]}, r"absolute_dims=\[6, 6\]; name each"),
    ("absolute_dims_are_named_once", {"data.window.absolute_dims": [-1]}, r"absolute_dims=\[-1\]; name each .* from 0"),
    ("prompt_holds_the_task", {"data.prompt_template": "go"}, r"data\.prompt_template='go' lacks \{task\}"),
    (
        "joint_has_an_action_stream",
        {"model.action": None},
        r"stage\.streams=joint but model\.action=null \(model tiny\)",
    ),
    ("some_loss_counts", {"stage.action_loss_weight": 0, "stage.train_video": False}, r"leave nothing to train"),
    ("only_a_joint_stage_freezes_the_video", {"stage.streams": "video", "stage.train_video": False}, r"trains nothing"),
    ("conditions_are_probabilities", {"stage.conditions": {"ti2v": 0.5}}, r"sums to 0\.5; probabilities sum to 1"),
    ("conditions_are_probabilities", {"stage.conditions": {"ti2v": 1.5, "t2v": -0.5}}, r"outside \[0, 1\]"),
    (
        "image_conditions_are_probabilities",
        {"stage.image_conditions": {"t2i": 0.5}},
        r"image_conditions=.* sums to 0\.5",
    ),
    ("image_conditions_are_probabilities", {"stage.image_conditions": {"t2v": 1}}, r"holds 't2v'; use t2i, n2i"),
    ("captions_are_shares", {"stage.captions": [CaptionShare("a"), CaptionShare("a")]}, r"name each caption once"),
    ("captions_are_shares", {"stage.captions": [CaptionShare()]}, r"name each caption once"),
    (
        "values_are_legal",
        {"stage.captions": [CaptionShare("a", 1.0, -1.0)]},
        r"captions\[0\]\.end=-1\.0 is negative",
    ),
    ("captions_are_shares", {"stage.captions": [CaptionShare("a", 1.0, 0.0)]}, r"every share is 0 at the end"),
    ("one_budget", {"train.samples": 5}, r"train\.steps=200 and train\.samples=5: a stage has one length"),
    ("one_budget", {"train.steps": None}, r"are all null; give one"),
    ("curriculum_stages_have_names", {"curriculum.stages": [CurriculumStage("a/b")]}, r"'a/b'; a name is made of"),
    ("curriculum_stages_have_names", {"curriculum.stages": [CurriculumStage("a")] * 2}, r"a, a; name each once"),
    ("curriculum_stages_have_names", {"curriculum.first": "a"}, r"first=a is no stage; there are none"),
    (
        "curriculum_stages_have_names",
        {"curriculum": CurriculumConfig([CurriculumStage("a"), CurriculumStage("b")], first="b", last="a")},
        r"first=b comes after curriculum\.last=a",
    ),
    ("adapters_fit", {"stage.lora.rank": 0}, r"stage\.lora\.rank=0 is not positive"),
    ("adapters_fit", {"stage.lora": LoraConfig(4, streams=["sound"])}, r"\['sound'\]; name each once, out of video"),
    ("adapters_fit", {"stage.lora": LoraConfig(4, targets=[])}, r"targets=\[\]; name each layer once"),
    ("adapters_fit", {"stage.lora.rank": 4, "precision.fp8.recipe": "emulated"}, r"use recipe=null"),
    ("adapters_fit", {"stage.lora.rank": 4, "stage.train_video": False}, r"freezes the video stream .* use true"),
    ("history_leaves_a_frame_to_generate", {"stage.history_frames": 2}, r"=2 leaves nothing .*frames=9 or more"),
    ("history_leaves_a_frame_to_generate", {"stage.history_frames": 0}, r"stage\.history_frames=0 but ti2v and i2v"),
    ("joint_sees_history", {"stage.conditions": {"t2v": 1}}, r"stage\.conditions gives no frames"),
    (
        "joint_sees_history",
        {"model.video.restrict_history_query_to_history": False},
        r"=false makes action-only inference",
    ),
    ("joint_window_has_actions", {"data.window.frames": 1}, r"frames=1"),
    ("action_weights_fit", {"stage.action_dim_weights": [0.5, 0.5]}, r"has 2 values but model\.action\.action_dim=4"),
    ("action_weights_fit", {"stage.action_dim_weights": [0.5, 0.5, 0.5, 0.5]}, r"sums to 2; give weights"),
    ("action_weights_fit", {"stage.action_dim_weights": [2, -1, 0, 0]}, r"sums to 1; give weights of 0 or more"),
    ("betas_are_two_fractions", {"optimizer.betas": [0.9, 1.0]}, r"optimizer\.betas=\[0\.9, 1\.0\]; give two numbers"),
    ("ema_forgets", {"train.ema_decay": 1.0}, r"train\.ema_decay=1 would keep the first weights"),
    (
        "tensor_ranks_share_heads_and_channels",
        {"parallel.tensor": 3},
        r"=3 does not divide model\.num_heads=4; .* 1, 2, 4$",
    ),
    (
        "sequence_needs_tensor",
        {"parallel.sequence": True},
        r"parallel\.sequence=true .* use parallel\.tensor=2 or more",
    ),
    (
        "selective_recomputation_needs_whole_weights",
        {"train.recompute": "selective", "train.zero_stage": 3},
        r"selective with train\.zero_stage=3: .* use train\.recompute=block or train\.zero_stage=2",
    ),
    ("fp8_names_streams_and_layers", {"precision.fp8.streams": ["sound"]}, r"streams holds 'sound'; use video, action"),
    ("fp8_names_streams_and_layers", {"precision.fp8.skip_layers": [4]}, r"skip_layers holds 4; model\.num_layers=4"),
    (
        "fp8_names_streams_and_layers",
        {"precision.fp8.recipe": "emulated", "parallel.tensor": 2},
        r"recipe=emulated scales whole tensors, but parallel\.tensor=2",
    ),
    (
        "fp8_names_streams_and_layers",
        {"precision.fp8.recipe": "delayed", "train.recompute": "block"},
        r"recipe=delayed with train\.recompute=block and parallel\.context=1: .* use precision\.fp8\.recipe=current",
    ),
    ("fp8_names_streams_and_layers", {"precision.fp8.recipe": "current"}, r"recipe=current with train\.precision=fp32"),
    (
        "time_limit_is_a_time",
        {"cluster.time_limit": "86400"},
        r'time_limit=86400 is no time; give H:MM:SS .* "24:00:00"',
    ),
    ("time_limit_is_a_time", {"cluster.time_limit": "1:60:00"}, r"time_limit=1:60:00 is no time"),
    ("time_limit_leaves_time", {"cluster.time_limit": "0:05:00"}, r"=0:05:00 is no longer than cluster.signal_seconds"),
    (
        "time_limit_leaves_time",
        {"train.deadline_margin": 1e6},
        r"is no longer than train\.deadline_margin=1e\+06 seconds",
    ),
    (
        "names_are_words",
        {"cluster.account": "a b"},
        r"cluster\.account='a b': an option of sbatch is a word without spaces, quotes",
    ),
    ("names_are_words", {"cluster.partition": ""}, r"cluster\.partition='': an option of sbatch is a word"),
    ("names_are_words", {"cluster.qos": "a#b"}, r"cluster\.qos='a#b'"),
    ("names_are_words", {"cluster.memory_per_cpu": 'a"b'}, r"cluster\.memory_per_cpu='a\"b'"),
    ("options_are_options", {"cluster.sbatch": ["-p x"]}, r"cluster\.sbatch holds '-p x'; write --OPTION"),
    ("options_are_options", {"cluster.srun": ["--a=b c"]}, r"cluster\.srun holds '--a=b c'"),
    ("environment_has_names", {"cluster.environment": {"A B": "1"}}, r"environment holds 'A B'; a variable has a name"),
    ("environment_has_names", {"cluster.environment": {"é": "1"}}, r"environment holds 'é'; a variable has a name"),
    ("texts_are_lines", {"cluster.environment": {"A": "1\n2"}}, r"environment holds '1\\n2'; give one line of text"),
    ("texts_are_lines", {"run_dir": "a\0b"}, r"run_dir holds 'a\\x00b'; give one line of text"),
    ("texts_are_lines", {"prepare": ["data \udc80"]}, r"prepare holds 'data \\udc80'; give one line of text"),
    ("environment_has_names", {"cluster.environment": {"RANK": "1"}}, r"environment holds RANK, which is derived"),
    (
        "container_or_venv",
        {"cluster.container": "a", "cluster.venv": "b"},
        r"container=a and cluster\.venv=b: a job runs",
    ),
    (
        "container_or_venv",
        {"cluster.container_mounts": ["a:b"]},
        r"container_mounts=\['a:b'\] without cluster\.container",
    ),
    (
        "container_or_venv",
        {"cluster.container": "a", "cluster.container_mounts": ["data"]},
        r"container_mounts holds 'data'; write HOST:CONTAINER",
    ),
    (
        "container_or_venv",
        {"cluster.container": "a", "cluster.scratch": "/tmp,/etc"},
        r"cluster\.scratch=/tmp,/etc: a container sees no folder with , or : in its name",
    ),
    (
        "deadline_is_a_time",
        {"train.deadline": "tomorrow"},
        r"train\.deadline=tomorrow is no time; give one as in 2026-",
    ),
    ("guard_sees_enough", {"guard.skips": 100}, r"guard\.skips=100 within guard\.window=100 .*; use 99 or fewer"),
    ("guard_sees_enough", {"guard.spike_factor": 1.0}, r"guard\.spike_factor=1\.0 takes half of the steps for spikes"),
    (
        "silence_is_longer_than_heartbeats",
        {"watch.heartbeat": 10.0},
        r"watch\.silence=20\.0 is less than three heartbeats .*; use 30\.0 or more",
    ),
    (
        "values_are_legal",
        {"faults.inject": [FaultConfig()]},
        r"faults\.inject\[0\]\.kind=\?\?\? is unknown; use one of kill",
    ),
    ("values_are_legal", {"faults.inject": [FaultConfig(kind="flood")]}, r"faults\.inject\[0\]\.kind=flood is unknown"),
    (
        "faults_count_from_one",
        {"faults.inject": [FaultConfig(kind="nan", step=0)]},
        r"step, steps and life count from 1",
    ),
    (
        "faults_count_from_one",
        {"faults.inject": [FaultConfig(kind="slow", seconds=0.0)]},
        r"faults\.inject\[0\]\.seconds=0\.0 is not positive",
    ),
]


@pytest.fixture(scope="module")
def demo() -> Config:
    return load_config([DEMO])


@pytest.mark.parametrize(("rule", "values", "message"), RULE_CASES)
def test_broken_rule_names_key_value_and_remedy(demo, rule, values, message):
    with pytest.raises(UserError, match=message) as error:
        rules.validate(changed(demo, values))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("rule", "values", "message"), RULE_CASES)
def test_the_rule_itself_refuses(demo, rule, values, message):
    """Asked alone, so that no rule hides behind an earlier one, and lets the unchanged configuration pass."""
    getattr(rules, rule)(demo)
    with pytest.raises(UserError, match=message):
        getattr(rules, rule)(changed(demo, values))


def test_every_rule_has_a_case():
    assert {rule.__name__ for rule in rules.RULES} == {rule for rule, _, _ in RULE_CASES}


def test_a_broken_rule_reaches_whoever_composes():
    with pytest.raises(UserError, match=r"^data\.window\.frames=10 is not 4k\+1; use 9 or 13$"):
        load_config([DEMO, "data.window.frames=10"])


@pytest.mark.parametrize("frames", [1, 5, 81])
def test_legal_frame_counts_pass(frames):
    overrides = [DEMO, "stage=physical", "stage.conditions={t2v: 1}", f"data.window.frames={frames}"]
    assert load_config(overrides).data.window.frames == frames


def test_windows_of_images_need_no_frame_beyond_the_history():
    config = load_config([DEMO, "stage=physical_images", "data.window.frames=1"])
    assert config.stage.history_frames == config.data.window.frames == 1


def test_token_windows_train_the_video_alone():
    config = load_config(["model=kairos_4b_robot_480p", "stage=behaviour", "data.shards=x"])
    assert (config.model.video.window_semantics, config.model.action) == ("token", None)
