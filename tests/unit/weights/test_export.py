"""Checkpoint → export folder → loaded policy: equal weights, and no mixture of parts passes without a word."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny_export import tiny_config, write_tiny_checkpoint

from kairos_train.basics.errors import UserError
from kairos_train.checkpoint import boxes
from kairos_train.checkpoint.canonical import CheckpointReader, checkpoint_path
from kairos_train.checkpoint.writing import Piece, publish, write_part
from kairos_train.conditioning.build import build_encoders
from kairos_train.conditioning.interfaces import Encoders
from kairos_train.config.schema import TextEncoderConfig
from kairos_train.inference.load import load
from kairos_train.inference.predict import Predictor
from kairos_train.weights.export import export
from kairos_train.weights.public import from_public, to_public


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, shards):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints", shards)


@pytest.fixture
def exported(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "export", dtype="fp32")
    return tmp_path / "export"


def weights_of(folder):
    """All tensors of an export's files."""
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def edit(folder, name, change):
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


@pytest.mark.parametrize(("weights", "section"), [("ema", "ema"), ("raw", "model")])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_exported_tensors_are_the_checkpoints_cast(checkpoint, tmp_path, weights, section, dtype):
    summary = export(checkpoint, tmp_path / "out", weights=weights, dtype=dtype)
    stored = weights_of(tmp_path / "out")
    source = CheckpointReader(checkpoint).read_section(section)
    assert stored.keys() == source.keys()
    cast = torch.bfloat16 if dtype == "bf16" else torch.float32
    assert all(torch.equal(stored[name], tensor.to(cast)) for name, tensor in source.items())
    assert all(tensor.dtype == cast for tensor in stored.values())
    assert summary["step"] == 40
    assert summary["parameters"] == sum(t.numel() for t in source.values())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    files = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    files |= {"config.json", "sampler.json", "dataset_stats.json", "README.md"}
    assert manifest.keys() == files
    assert {path.name for path in (tmp_path / "out").iterdir()} == files | {"manifest.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for name, recorded in manifest.items():
        content = (tmp_path / "out" / name).read_bytes()
        assert recorded == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_pieces_of_many_ranks_export_to_the_same_values(checkpoint, tmp_path):
    """Three ranks, each with a third of every tensor's elements, in small files."""
    reader, folder = CheckpointReader(checkpoint), tmp_path / ".tmp-pieces"
    folder.mkdir()
    parts = []
    for rank in range(3):
        sections = {section: [] for section in reader.sections()}
        for section, pieces in sections.items():
            for name in reader.names(section):
                whole = reader.read(section, name)
                start, stop = (whole.numel() * r // 3 for r in (rank, rank + 1))
                for box in boxes.boxes_of_range(whole.shape, start, stop - start):
                    part = whole[boxes.slices_of(box, [0] * whole.ndim)]
                    pieces.append(Piece(name, tuple(whole.shape), boxes.offset_of(box), part))
        parts.append(write_part(folder, rank, sections, file_bytes=1000))
    texts = {name: reader.text(name) for name in ("config.yaml", "dataset_stats.json")}
    publish(folder, checkpoint_path(tmp_path, 40), parts, state=reader.state, files=texts)
    CheckpointReader(checkpoint_path(tmp_path, 40)).verify()
    for source, out in ((checkpoint, "one"), (checkpoint_path(tmp_path, 40), "many")):
        export(source, tmp_path / out, dtype="fp32")
    one, many = weights_of(tmp_path / "one"), weights_of(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[key], many[key]) for key in one)
    file = "dataset_stats.json"
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "many" / file).read_bytes()


def test_loaded_policy_computes_what_the_checkpoints_weights_compute(checkpoint, exported):
    from kairos_train.model import WorldActionModel

    policy = load(exported)
    reference = WorldActionModel(tiny_config().model).eval()
    reference.load_state_dict(CheckpointReader(checkpoint).read_section("ema"))
    latents, context = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 5, 24)
    args = (latents, context, torch.ones(1, 5, dtype=torch.bool), torch.tensor([500.0]), [1])
    with torch.no_grad():
        assert torch.equal(policy.model(*args).video, reference(*args).video)
    assert (policy.horizon, policy.latent_frames, policy.history_frames, policy.acts) == (8, 2, 1, True)
    assert not any(p.requires_grad or p.is_meta for p in policy.model.parameters())
    assert load(exported, dtype="bf16").model(*args).video.isfinite().all()


def test_bf16_weights_run_in_float32_on_a_cpu_unless_asked_otherwise(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "out", dtype="bf16")
    for dtype, expected in ((None, torch.float32), ("bf16", torch.bfloat16)):
        policy = load(tmp_path / "out", dtype=dtype)
        assert {p.dtype for p in policy.model.parameters()} == {policy.dtype} == {expected}
    with pytest.raises(UserError, match="dtype='fp8'"):
        load(tmp_path / "out", dtype="fp8")


def test_model_card_says_what_it_is(exported):
    card = (exported / "README.md").read_text()
    for words in ("40 steps", "EMA", "fp32", "4 episodes", "block_dct", "of the demo", "fingerprint", "Robot: {task}"):
        assert words in card


def test_an_export_without_ema_says_what_there_is(tmp_path, shards):
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoints", shards, ema=False)
    with pytest.raises(UserError, match=r"weights='ema'.*exp_avg, model.*weights='raw'"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export(checkpoint, tmp_path / "out", weights="raw")["weights"] == "raw"


def test_an_existing_folder_is_not_overwritten(checkpoint, exported):
    before = (exported / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="never overwritten"):
        export(checkpoint, exported)
    assert (exported / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("file", ["ema-00000-00001.safetensors", "config.yaml"])
def test_a_damaged_checkpoint_is_not_exported(tmp_path, shards, file):
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoints", shards)
    content = bytearray((checkpoint / file).read_bytes())
    content[-5] ^= 1
    (checkpoint / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file} is damaged"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_joint_run_without_statistics_is_not_exported(tmp_path):
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoints", None)
    with pytest.raises(UserError, match=r"dataset_stats\.json"):
        export(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_video_only_run_needs_no_statistics(tmp_path):
    config = tiny_config(streams="video", actions=False)
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoints", None, config=config)
    export(checkpoint, tmp_path / "out")
    policy = load(tmp_path / "out")
    assert not policy.acts
    frames = np.zeros((32, 32, 3), np.uint8)
    assert Predictor(policy).predict(frames, None, "go", seed=1, mode="video").frames.shape == (5, 32, 32, 3)
    with pytest.raises(UserError, match="no action stream"):
        Predictor(policy).predict(frames, None, "go", seed=1, mode="action")


def test_a_config_of_another_size_names_key_and_both_shapes(exported):
    edit(exported, "config.json", lambda c: c["run"]["model"]["video"].update(ffn_dim=64))
    with pytest.raises(UserError, match=r"video_dit\.blocks\.0\.ffn\.0\.bias.*\[48\] in the file.*\[64\]") as error:
        load(exported)
    assert "\n" not in str(error.value)


def test_a_missing_tensor_is_named(exported):
    file = exported / "model-00001-of-00001.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    del tensors["action_dit.head.weight"]
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(UserError, match=r"action_dit\.head\.weight.*none in the file.*\[3, 16\]"):
        load(exported, verify=False)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"window_frames": 2}, r"run\.model\.video\.window_frames=3, config\.json says 2"),
        ({"restrict_history_query_to_history": False}, "restrict_history_query_to_history=True"),
        ({"layer_cycle": ["SWA", "DSWA", "SWA", "GATED"]}, "layer_cycle"),
    ],
)
def test_what_leaves_no_trace_in_shapes_is_compared_all_the_same(exported, change, match):
    edit(exported, "config.json", lambda c: c["run"]["model"]["video"].update(change))
    with pytest.raises(UserError, match=match):
        load(exported)


def test_a_distilled_sampler_and_a_model_that_is_not_are_refused_together(checkpoint, exported, tmp_path):
    edit(exported, "sampler.json", lambda s: s.update(schedule="distilled", steps=4))
    with pytest.raises(UserError, match=r"schedule is 'distilled' while config\.json says distilled=False"):
        load(exported)
    export(checkpoint, tmp_path / "distilled", distilled=True)
    policy = load(tmp_path / "distilled")
    assert (policy.sampler.schedule, policy.sampler.steps, policy.sampler.guidance) == ("distilled", 4, 1.0)
    edit(tmp_path / "distilled", "sampler.json", lambda s: s.update(schedule="shifted"))
    with pytest.raises(UserError, match=r"schedule is 'shifted' while config\.json says distilled=True"):
        load(tmp_path / "distilled")


@pytest.mark.parametrize(
    "file",
    [
        *("config.json", "sampler.json", "dataset_stats.json"),
        *("model.safetensors.index.json", "model-00001-of-00001.safetensors"),
    ],
)
def test_missing_and_broken_files_are_named(exported, file):
    (exported / file).write_bytes(b"{broken")
    with pytest.raises(UserError, match=file):
        load(exported)
    (exported / file).unlink()
    with pytest.raises(UserError, match=f"{file}: not found"):
        load(exported)


def test_other_encoders_than_those_trained_with_are_refused(exported):
    policy = load(exported)
    config = policy.config.encoders
    encoders = build_encoders(config)
    config.text = TextEncoderConfig(kind="hashed_ngrams", text_dim=24, max_tokens=8)
    with pytest.raises(UserError, match=r"encoders\.text\.max_tokens"):
        Predictor(policy)
    Predictor(policy, encoders=Encoders(video=encoders.video, text=encoders.text))


def test_predictions_are_in_raw_units_and_modes_agree(exported):
    predictor = Predictor(load(exported))
    frame = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    state = np.array([10.0, 12.0], np.float32)
    chunk = predictor.predict(frame, state, "push square 1", seed=3)
    assert chunk.frames is None
    assert chunk.actions.shape == (8, 3)
    joint = predictor.predict(frame, state, "push square 1", seed=3, mode="joint")
    np.testing.assert_allclose(joint.actions, chunk.actions, atol=1e-4)
    assert joint.frames.shape == (5, 32, 32, 3)
    decoded = predictor.encoders.video.decode(predictor.encoders.video.encode(torch.from_numpy(frame)[None, None]))
    assert np.abs(joint.frames[0].astype(int) - decoded[0, 0].numpy()).max() <= 1
    assert not np.array_equal(predictor.predict(frame, state, "push square 1", seed=4).actions, chunk.actions)
    same = {"frames": frame, "state": state, "instruction": "push square 1"}
    for change in ({"frames": 255 - frame}, {"state": state + 1}, {"instruction": "push square 0"}):
        other = predictor.predict(**{**same, **change}, seed=3).actions
        assert np.abs(other - chunk.actions).max() > 1e-5


def test_state_goes_in_normalised_and_actions_come_out_raw(exported):
    predictor = Predictor(load(exported))
    statistics = json.loads((exported / "dataset_stats.json").read_text())

    def bounds(group, key):
        return (np.array(statistics[group][key][f"global_{end}"]) for end in ("min", "max"))

    frame = np.zeros((1, 1, 32, 32, 3), np.uint8)
    conditions = predictor.conditions(texts=["go"], state=np.array([[10.0, 12.0]]), frames=frame)
    low, high = bounds("state", "observation.state")
    np.testing.assert_allclose(conditions.state[0, 0], 2 * (np.array([10, 12]) - low) / (high - low) - 1, atol=1e-5)
    sampled = predictor.sample(conditions, mode="action", seeds=[3])
    low, high = bounds("action", "action")
    expected = low + (sampled.actions.numpy() + 1) / 2 * (high - low)
    np.testing.assert_allclose(predictor.actions(sampled), expected, atol=1e-4)


def test_observations_that_do_not_fit_are_refused(exported):
    predictor = Predictor(load(exported))
    good = np.zeros((32, 32, 3), np.uint8)
    state = np.zeros(2, np.float32)
    for frames, given, match in (
        (good.astype(np.float32), state, "must be uint8"),
        (np.zeros((48, 32, 3), np.uint8), state, "48×32 pixels.*32×32"),
        (np.zeros((2, 32, 32, 3), np.uint8), state, "2 given; 1 history latent frames take 1"),
        (good, None, "state=None"),
        (good, np.zeros(3, np.float32), "must be"),
    ):
        with pytest.raises(UserError, match=match):
            predictor.predict(frames, given, "go", seed=0)


def test_files_of_two_exports_are_not_mixed(checkpoint, exported, tmp_path):
    """Same model, same sizes: only the fingerprint tells them apart."""
    other = tmp_path / "other"
    export(checkpoint, other, weights="raw", dtype="fp32", file_bytes=40_000)
    export(checkpoint, tmp_path / "ema", dtype="fp32", file_bytes=40_000)
    files = sorted(path.name for path in other.glob("*.safetensors"))
    assert len(files) > 2
    for name, match in ((files[1], files[1]), ("sampler.json", "sampler.json"), ("config.json", "sampler.json")):
        mixed = tmp_path / f"mixed-{name}"
        shutil.copytree(tmp_path / "ema", mixed)
        shutil.copy(other / name, mixed / name)
        with pytest.raises(UserError, match=f"{match}.*another"):
            load(mixed, verify=False)
        with pytest.raises(UserError, match=match):
            load(mixed)
    edit(exported, "dataset_stats.json", lambda s: s.update(num_episodes=5))
    with pytest.raises(UserError, match=r"dataset_stats\.json: is not the one that was exported"):
        load(exported)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["run"]["data"].update(prompt_template="{task}!"),
        lambda c: c["run"]["data"]["window"].update(frames=9),
        lambda c: c["run"]["encoders"]["text"].update(max_tokens=17),
        lambda c: c.update(step=41),
        lambda c: c.update(dtype="bf16"),
    ],
)
def test_a_setting_that_decides_predictions_is_not_edited_behind_an_export(exported, change):
    edit(exported, "config.json", change)
    with pytest.raises(UserError, match=r"config\.json: is not as it was exported"):
        load(exported)


def test_what_belongs_to_a_machine_and_the_sampling_may_be_edited(exported):
    edit(exported, "config.json", lambda c: c["run"]["encoders"]["video"].update(path="/elsewhere"))
    edit(exported, "config.json", lambda c: c["run"]["kernels"].update(attention="dense"))
    edit(exported, "sampler.json", lambda s: s.update(steps=4, guidance=1.0))
    policy = load(exported)
    assert (policy.sampler.steps, policy.sampler.guidance) == (4, 1.0)


def test_many_small_files_load_to_the_same_policy(checkpoint, exported, tmp_path):
    summary = export(checkpoint, tmp_path / "out", dtype="fp32", file_bytes=20_000)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert summary["files"] == len(files) > 3
    assert max(path.stat().st_size for path in files) < 40_000
    assert summary["bytes"] == sum(path.stat().st_size for path in files)
    one, many = load(exported).model.state_dict(), load(tmp_path / "out").model.state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[key], many[key]) for key in one)


def test_a_file_that_is_cut_off_is_named(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "out", dtype="fp32", file_bytes=40_000)
    file = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=file.name):
        load(tmp_path / "out")


def test_an_index_names_no_file_elsewhere(exported):
    edit(exported, "model.safetensors.index.json", lambda i: i["weight_map"].update(x="../other/x.safetensors"))
    with pytest.raises(UserError, match="files beside it"):
        load(exported)


# Public key layout


@pytest.mark.parametrize("wrapper", ["", "dit.", "pipe.dit."])
def test_all_full_size_keys_survive_the_way_out_and_back(shared, wrapper):
    names = list(json.loads((shared / "spec" / "full_size_keys.json").read_text()))
    assert len(names) == 1785
    public = to_public(names, wrapper=wrapper)
    assert all(key.startswith((f"{wrapper}video_dit.", f"{wrapper}action_dit.")) for key in public.values())
    back = from_public(public.values())
    assert all(back[public[name]] == name for name in names)


@pytest.mark.parametrize("wrapper", ["", "dit.", "pipe.dit."])
def test_a_video_only_file_has_no_stream_prefix(wrapper):
    names = ["video_dit.blocks.0.modulation", "video_dit.head.head.bias"]
    public = to_public(names, wrapper=wrapper, stream_prefix=False)
    assert public["video_dit.head.head.bias"] == f"{wrapper}head.head.bias"
    assert set(from_public(public.values()).values()) == set(names)


def test_mixed_and_impossible_layouts_are_refused():
    for names, match in (
        ([], "no tensor"),
        (["video_dit.a", "blocks.0.b"], "'blocks.0.b'.*no stream prefix"),
        (["dit.video_dit.a", "video_dit.b"], "'dit.'"),
        (["pipe.dit.a", "dit.b"], "one file follows one layout"),
    ):
        with pytest.raises(UserError, match=match):
            from_public(names)
    with pytest.raises(UserError, match="video-only layout"):
        to_public(["action_dit.head.bias"], stream_prefix=False)
    with pytest.raises(UserError, match="no stream prefix"):
        to_public(["head.bias"])
    with pytest.raises(UserError, match=r"wrapper='net\.'"):
        to_public(["video_dit.a"], wrapper="net.")
