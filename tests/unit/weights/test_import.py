"""Public weights → checkpoint: what is recognised, what must be said, what is refused, and nothing of it changed."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.public_weights import (
    GOLDEN,
    HEADER,
    SETTINGS,
    SIZES,
    describe,
    golden_weights,
    same_bytes,
    save,
    save_sharded,
    tiny_weights,
)
from support.tiny_export import tiny_config

from kairos_train import cli
from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.canonical import CheckpointReader, checkpoint_path, find_problem
from kairos_train.checkpoint.resolve import resolve_checkpoint
from kairos_train.config.compose import load_config, load_saved
from kairos_train.inference.load import load
from kairos_train.model.golden import verify_file
from kairos_train.model.public_keys import public_keys
from kairos_train.training.engine.initial_weights import build_model
from kairos_train.weights.export import export
from kairos_train.weights.import_public import import_weights
from kairos_train.weights.recognise import Word, leaves, recognise


def sections_of(folder):
    return CheckpointReader(resolve_checkpoint(folder))


# --- the way there and back ---


@pytest.mark.parametrize("name", GOLDEN)
def test_reference_weights_go_in_out_and_in_again_unchanged(shared, tmp_path, name):
    weights, metadata = golden_weights(shared, name)
    file = save(tmp_path / "in", weights, metadata=metadata)
    found = import_weights(file, tmp_path / "checkpoint")
    assert same_bytes(sections_of(tmp_path / "checkpoint").read_section("model"), weights)
    export(tmp_path / "checkpoint", tmp_path / "public", form="public")
    again = import_weights(tmp_path / "public" / "model.safetensors", tmp_path / "again")
    assert same_bytes(sections_of(tmp_path / "again").read_section("model"), weights)
    assert again["model"] == found["model"]
    header = json.loads(metadata["config"])
    video = found["model"]["video"]
    assert video["layer_cycle"] == header["layers"]
    assert (video["window_frames"], video["dilation"]) == (header["window_frames"], header["dilation"])
    assert video["window_semantics"] == header["window_semantics"]
    assert video["all_attend_history"] == header.get("all_attend_history", False)
    assert found["streams"] == (["video", "action"] if "action_dim" in header else ["video"])


def test_an_imported_reference_model_computes_the_reference_outputs(shared, tmp_path):
    """The whole way: the exported weights in place of the file's own give the recorded outputs and gradients."""
    path = shared / "golden" / "video_token_window.safetensors"
    weights, metadata = golden_weights(shared, "video_token_window")
    import_weights(save(tmp_path / "in", weights, metadata=metadata), tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "public", form="public")
    exported = load_file(tmp_path / "public" / "model.safetensors")
    assert all(not key.startswith("video_dit.") for key in exported)  # the video-only layout
    rest = {key: tensor for key, tensor in load_file(path).items() if not key.startswith("weights.")}
    save_file(
        rest | {f"weights.{k}": v for k, v in exported.items()}, tmp_path / "mixed.safetensors", metadata=metadata
    )
    result = verify_file(tmp_path / "mixed.safetensors", device="cpu", dtype=torch.float32)
    assert result.outputs < 1e-5
    assert result.gradients < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_tensor_keeps_its_type_and_bytes(tmp_path, dtype):
    weights = tiny_weights(dtype=dtype)
    weights["video_dit.blocks.0.modulation"] = weights["video_dit.blocks.0.modulation"].float()
    summary = import_weights(save(tmp_path / "in", weights, metadata=HEADER), tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "public", form="public")
    assert same_bytes(load_file(tmp_path / "public" / "model.safetensors"), weights)
    assert sum(summary["dtypes"].values()) == len(weights) == summary["tensors"]
    assert "imported by kairos-train from `weights.safetensors`" in (tmp_path / "public" / "README.md").read_text()


@pytest.mark.parametrize("prefix", ["", "dit.", "pipe.dit."])
@pytest.mark.parametrize("actions", [True, False])
def test_all_prefixes_are_read(tmp_path, prefix, actions):
    weights = tiny_weights(actions=actions)
    bare = weights if actions else {name.removeprefix("video_dit."): tensor for name, tensor in weights.items()}
    summary = import_weights(save(tmp_path / "in", bare, prefix=prefix, metadata=HEADER), tmp_path / "checkpoint")
    assert summary["prefix"] == prefix + ("video_dit." if actions else "")
    assert same_bytes(sections_of(tmp_path / "checkpoint").read_section("model"), weights)


def test_a_sharded_file_is_read_by_its_index(tmp_path):
    weights = tiny_weights()
    import_weights(save_sharded(tmp_path / "in", weights), tmp_path / "checkpoint", SETTINGS)
    assert same_bytes(sections_of(tmp_path / "checkpoint").read_section("model"), weights)


def test_an_export_for_inference_comes_back_too(exported, tmp_path):
    summary = import_weights(exported / "model.safetensors.index.json", tmp_path / "checkpoint")
    assert summary["statistics"]
    assert summary["model"]["name"] == "toy"
    stored = {k: v for file in exported.glob("*.safetensors") for k, v in load_file(file).items()}
    assert same_bytes(sections_of(tmp_path / "checkpoint").read_section("model"), stored)
    export(tmp_path / "checkpoint", tmp_path / "out")
    assert load(tmp_path / "out").acts


def test_the_disk_holds_imported_weights_once(tmp_path):
    file = save(tmp_path / "in", tiny_weights(), metadata=HEADER)
    import_weights(file, tmp_path / "checkpoint")
    folder = checkpoint_path(tmp_path / "checkpoint", 0)
    reader = CheckpointReader(folder)
    assert reader.sections() == ["ema", "model"]
    assert same_bytes(reader.read_section("ema"), reader.read_section("model"))
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 1.2 * file.stat().st_size
    assert find_problem(folder, deep=True) is None


# --- what is recognised, and what must be said ---


def test_sizes_are_recognised_and_the_rest_is_taken_from_beside_the_file(tmp_path):
    file = save(tmp_path / "in", tiny_weights())
    with pytest.raises(UserError, match=r"model\.video\.layer_cycle, model\.video\.window_frames.*model=NAME"):
        import_weights(file, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    config = tiny_config()
    config.model.video.dilation = 3
    describe(tmp_path / "in", config)
    found = import_weights(file, tmp_path / "checkpoint")
    assert found["model"]["video"]["dilation"] == 3
    assert found["model"]["num_layers"] == 4
    assert set(found["stated_by"].values()) == {str(tmp_path / "in" / "config.json")}
    saved = load_saved(checkpoint_path(tmp_path / "checkpoint", 0) / "config.yaml", sections=("model",))
    assert saved.model == config.model
    found = import_weights(file, tmp_path / "other", ["model.video.dilation=5"])
    assert found["model"]["video"]["dilation"] == 5
    assert found["stated_by"]["video.dilation"] == "the command line"


def test_a_named_model_says_what_leaves_no_trace_but_not_robot_and_encoder(tmp_path):
    """kairos_4b has 14 action dimensions and contexts of 2048; published files of the same model have others."""
    named = load_config(["model=kairos_4b"], sections=()).model
    words = {key: Word(value, "model=kairos_4b", named_model=True) for key, value in leaves(asdict(named)).items()}
    for text_dim in (2048, 3584):
        other = load_config(
            ["model=kairos_4b_libero", f"model.text_dim={text_dim}", "model.name=kairos_4b"], sections=()
        ).model
        assert recognise(public_keys(other), words) == other
    video = load_config(["model=kairos_4b", "model.action=null"], sections=()).model
    assert recognise(public_keys(video), words) == video
    small = load_config(["model=small", "model.action.action_dim=14", "model.action.state_dim=14"], sections=()).model
    with pytest.raises(UserError, match=r"patch_embedding\.weight has shape \[768, .* but 2560 by model=kairos_4b"):
        recognise(public_keys(small), words)


@pytest.mark.parametrize(("text_dim", "encoders"), [(2048, "wan_qwen35"), (3584, "wan_qwen25")])
def test_the_width_of_contexts_tells_the_published_encoders(tmp_path, text_dim, encoders):
    weights = tiny_weights(actions=False)
    weights["video_dit.text_embedding.0.weight"] = torch.zeros(32, text_dim, dtype=torch.bfloat16)
    file = save(tmp_path / "in", weights, metadata=HEADER)
    assert import_weights(file, tmp_path / "checkpoint")["encoders"] == encoders
    other = {"wan_qwen35": "wan_qwen25", "wan_qwen25": "wan_qwen35"}[encoders]
    with pytest.raises(UserError, match=r"encoders\.text\.text_dim"):
        import_weights(file, tmp_path / "other", [f"encoders={other}"])


def test_words_and_weights_that_contradict_each_other_are_refused(tmp_path):
    file = save(tmp_path / "in", tiny_weights())
    with pytest.raises(UserError, match=r"ffn\.0\.weight has shape \[48, 32\]: model\.video\.ffn_dim is 48, but 64"):
        import_weights(file, tmp_path / "checkpoint", [*SETTINGS, *SIZES, "model.video.ffn_dim=64"])
    with pytest.raises(UserError, match=r"blocks\.2\.gated_delta\.A_log is absent in the file and \[2\] by the model"):
        import_weights(file, tmp_path / "checkpoint", [*SETTINGS, "model.video.layer_cycle=[SWA,SWA,GATED,DSWA]"])
    config = tiny_config(actions=False)
    describe(tmp_path / "in", config)
    with pytest.raises(UserError, match=r"model\.action=None by .*config\.json, but the weights hold an action stream"):
        import_weights(file, tmp_path / "checkpoint")
    stage = ["stage=physical"]
    (tmp_path / "in" / "config.json").unlink()
    with pytest.raises(UserError, match=r"stage\.streams=video .*hold both streams"):
        import_weights(file, tmp_path / "checkpoint", [*SETTINGS, *stage])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_configuration_of_another_program_beside_the_file_says_nothing(tmp_path):
    file = save(tmp_path / "in", tiny_weights(), metadata={"config": '{"format": "pt"}'})
    (tmp_path / "in" / "config.json").write_text('{"_class_name": "Transformer", "video": 3}')
    with pytest.raises(UserError, match="nothing in the weights tells"):
        import_weights(file, tmp_path / "checkpoint")
    import_weights(file, tmp_path / "checkpoint", SETTINGS)
    for content, why in (("{", "Expecting property name"), ('{"a":' * 100_000, "is nested deeper")):
        (tmp_path / "in" / "config.json").write_text(content)
        with pytest.raises(UserError, match=rf"config\.json: is not JSON \({why}.*\); correct or remove it$"):
            import_weights(file, tmp_path / "other", SETTINGS)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layers": []}, r"model\.video\.layer_cycle=\[\]"),
        ({"layers": ["SWA", "LSTM"]}, "'LSTM'"),
        ({"dilation": "4"}, r"model\.video\.dilation='4'"),
        ({"window_frames": True}, r"model\.video\.window_frames=True"),
        ({"all_attend_history": 1}, r"model\.video\.all_attend_history=1"),
        ({"window_semantics": "pixel"}, r"model\.video\.window_semantics=pixel"),
        ({"dilation": 0}, r"model\.video\.dilation=0"),
    ],
)
def test_a_configuration_of_nonsense_is_refused_by_name(tmp_path, change, match):
    header = {"config": json.dumps({**json.loads(HEADER["config"]), **change})}
    with pytest.raises(UserError, match=match):
        import_weights(save(tmp_path / "in", tiny_weights(), metadata=header), tmp_path / "checkpoint")


def test_header_and_config_beside_the_file_must_agree(tmp_path):
    config = tiny_config()
    metadata = {"model_config": json.dumps(asdict(config.model))}
    file = save(tmp_path / "in", tiny_weights(), metadata=metadata)
    config.model.video.window_frames = 5
    describe(tmp_path / "in", config)
    with pytest.raises(UserError, match=r"window_frames is 3 by metadata 'model_config'.* and 5 by .*config\.json"):
        import_weights(file, tmp_path / "checkpoint")


# --- what is refused ---


def without(name):
    def change(weights):
        del weights[name]

    return change


def instead(name, tensor):
    def change(weights):
        weights[name] = tensor

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without("video_dit.blocks.1.cross_attn.q.weight"), r"blocks\.1\.cross_attn\.q\.weight is absent in the file"),
        (without("video_dit.patch_embedding.weight"), r"patch_embedding\.weight: no such tensor"),
        (without("action_dit.proprio_encoder.0.weight"), r"proprio_encoder\.0\.weight: no such tensor"),
        (without("video_dit.blocks.3.gated_delta.A_log"), "model.num_heads"),
        (instead("video_dit.blocks.2.extra", torch.zeros(3)), r"blocks\.2\.extra is \[3\] in the file and absent"),
        (instead("video_dit.blocks.7.modulation", torch.zeros(1, 6, 32)), r"blocks\.4\..* is absent in the file"),
        (instead("video_dit.blocks.0.ffn.2.bias", torch.zeros(31)), r"ffn\.2\.bias is \[31\] in the file and \[32\]"),
        (instead("video_dit.blocks.0.ffn.2.weight", torch.zeros(32, 48, dtype=torch.int8)), "quantised weights"),
        (
            instead("video_dit.head.head.bias", torch.full((64,), torch.nan)),
            r"head\.head\.bias' has values that are not",
        ),
        (instead("vae.encoder.weight", torch.zeros(3)), r"'vae\.encoder\.weight'.*no stream prefix"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, change, match):
    weights = tiny_weights(dtype=torch.float32)
    change(weights)
    with pytest.raises(UserError, match=match) as error:
        import_weights(save(tmp_path / "in", weights, metadata=HEADER), tmp_path / "checkpoint")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_action_stream_alone_is_refused(tmp_path):
    weights = {name: tensor for name, tensor in tiny_weights().items() if name.startswith("action_dit.")}
    with pytest.raises(UserError, match=r"video_dit\.patch_embedding\.weight: no such tensor"):
        import_weights(save(tmp_path / "in", weights, metadata=HEADER), tmp_path / "checkpoint")


def test_damaged_files_are_refused(tmp_path):
    file = save(tmp_path / "in", tiny_weights(), metadata=HEADER)
    content = file.read_bytes()
    for damaged in (content[:-1000], content[:200], b"", (10**12).to_bytes(8, "little") + content[8:]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="is no safetensors file"):
            import_weights(file, tmp_path / "checkpoint")
    pickled = tmp_path / "in" / "weights.pt"
    torch.save({}, pickled)
    with pytest.raises(UserError, match="pickled weights run code"):
        import_weights(pickled, tmp_path / "checkpoint")
    with pytest.raises(UserError, match="cannot be read"):
        import_weights(tmp_path / "nowhere.safetensors", tmp_path / "checkpoint")
    (tmp_path / "checkpoint").mkdir()
    file.write_bytes(content)
    with pytest.raises(UserError, match="never overwritten"):
        import_weights(file, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update({"video_dit.x": "model-00001-of-00003.safetensors"}), r"'video_dit\.x' should be in"),
        (lambda m: m.pop("video_dit.head.head.bias"), r"holds 'video_dit\.head\.head\.bias', which the index"),
        (lambda m: m.update({"video_dit.x": "../elsewhere.safetensors"}), "must lie beside the index"),
        (lambda m: m.update({"video_dit.x": "absent.safetensors"}), r"absent\.safetensors: cannot be read"),
    ],
)
def test_an_index_that_is_not_that_of_its_files_is_refused(tmp_path, change, match):
    index = save_sharded(tmp_path / "in", tiny_weights())
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=match):
        import_weights(index, tmp_path / "checkpoint", SETTINGS)


# --- training from it ---


@pytest.mark.parametrize("action_init", ["interpolate", "random"])
def test_video_only_weights_become_a_world_action_model(tmp_path, action_init):
    weights = tiny_weights(actions=False)
    bare = {name.removeprefix("video_dit."): tensor for name, tensor in weights.items()}
    import_weights(save(tmp_path / "in", bare, metadata=HEADER), tmp_path / "checkpoint")
    config = tiny_config(init_from=str(tmp_path / "checkpoint"), action_init=action_init)
    state = build_model(config).state_dict()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in weights.items())
    fresh = build_model(tiny_config()).state_dict()
    name = "action_dit.blocks.1.ffn.0.weight"
    assert torch.equal(state[name], fresh[name]) == (action_init == "random")
    config.stage.init_weights = "raw"
    raw = build_model(config).state_dict()
    assert all(torch.equal(raw[name], tensor) for name, tensor in state.items())


def test_the_command_says_what_it_found(tmp_path, capsys):
    file = save(tmp_path / "in", tiny_weights())
    words = ["import", str(file), "--out", str(tmp_path / "checkpoint"), *SETTINGS]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["streams"], found["model"]["num_heads"]) == (["video", "action"], 2)
    assert cli.main(["export", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "out")]) == 2
    assert "dataset_stats.json" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "out"), "--format", "public"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bf16"
