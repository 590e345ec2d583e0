"""The sharding table and its rules for the model, without processes."""

import pytest
import torch
from torch import nn

from kairos_train.config.schema import ActionStreamConfig, ModelConfig, VideoStreamConfig
from kairos_train.model.public_keys import public_keys
from kairos_train.model.sharding_rules import sharding_table
from kairos_train.model.world_action import WorldActionModel
from parallel.audit import audit, checksum
from parallel.sharding import ShardingError, ShardingRule, ShardingTable, set_attributes
from parallel.topology import Topology

FULL_SIZE = public_keys(ModelConfig())
SMALL = ModelConfig(
    num_layers=4,
    num_heads=4,
    text_dim=16,
    freq_dim=8,
    video=VideoStreamConfig(dim=24, ffn_dim=32, gdn_key_dim=4, gdn_value_dim=8),
    action=ActionStreamConfig(dim=16, ffn_dim=32, action_dim=3, state_dim=3),
)
RULES = (
    ShardingRule(r"up\.(weight|bias)", "column"),
    ShardingRule(r"down\.weight", "row"),
    ShardingRule(r"down\.bias", "replicated_full"),
)


def small_table(tensor: int = 2) -> ShardingTable:
    return ShardingTable.of(RULES, ("up.weight", "up.bias", "down.weight", "down.bias"), tensor=tensor)


def kinds(*, tensor: int, sequence: bool) -> dict[str, str]:
    table = sharding_table(tensor=tensor, sequence=sequence, names=FULL_SIZE)
    return {name: shard.kind for name, shard in table.entries.items()}


# --- the mechanism ---


def test_a_column_is_split_by_rows_and_a_row_layer_by_columns():
    table = small_table()
    assert table.slices("up.weight", (8, 3), 1) == (slice(4, 8), slice(0, 3))
    assert table.slices("up.bias", (8,), 0) == (slice(0, 4),)
    assert table.slices("down.weight", (3, 8), 1) == (slice(0, 3), slice(4, 8))
    assert table.slices("down.bias", (3,), 1) == (slice(0, 3),)


def test_local_and_full_shapes_are_inverses():
    table = small_table(tensor=4)
    for name, full, local in (
        ("up.weight", (8, 3), (2, 3)),
        ("down.weight", (3, 8), (3, 2)),
        ("down.bias", (3,), (3,)),
    ):
        assert table.local_shape(name, full) == local
        assert table.full_shape(name, local) == full


def test_one_tensor_rank_holds_everything():
    table = small_table(tensor=1)
    assert table["up.weight"].dim is None
    assert table.slices("up.weight", (7, 3), 0) == (slice(0, 7), slice(0, 3))


def test_a_dimension_that_does_not_divide_is_refused():
    with pytest.raises(ShardingError, match=r"up.weight \(7, 3\) does not divide into 2 along dimension 0"):
        small_table().slices("up.weight", (7, 3), 0)
    with pytest.raises(ShardingError, match=r"down.weight \(4,\) does not divide into 2 along dimension 1"):
        small_table().local_shape("down.weight", (4,))


def test_a_parameter_that_no_rule_fits_is_refused_by_name():
    with pytest.raises(ShardingError, match=r"parameter new\.weight needs exactly one sharding rule, and none fits"):
        ShardingTable.of(RULES, ("up.weight", "new.weight"), tensor=2)


def test_a_parameter_that_two_rules_fit_is_refused_by_name():
    rules = (*RULES, ShardingRule(r".*\.bias", "replicated_full"))
    with pytest.raises(ShardingError, match=r"parameter up.bias .*up.* and \.\*.* fits"):
        ShardingTable.of(rules, ("up.weight", "up.bias"), tensor=2)


def test_rules_fit_whole_names_only():
    with pytest.raises(ShardingError, match=r"parameter up\.weight_scale"):
        ShardingTable.of(RULES, ("up.weight_scale",), tensor=2)


def test_a_name_outside_the_table_is_refused():
    with pytest.raises(ShardingError, match="parameter new has no entry"):
        small_table()["new"]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'diagonal' is no kind of sharding"):
        ShardingRule("up", "diagonal")


def test_split_parameters_alone_are_marked_as_such():
    model = nn.ModuleDict({"up": nn.Linear(3, 8), "down": nn.Linear(8, 3)})
    model["down"].bias.tensor_model_parallel = True  # as some layers would leave it
    set_attributes(model, small_table())
    marks = {name: (p.tensor_model_parallel, p.partition_dim) for name, p in model.named_parameters()}
    assert marks == {
        "up.weight": (True, 0),
        "up.bias": (True, 0),
        "down.weight": (True, 1),
        "down.bias": (False, -1),
    }
    with pytest.raises(ShardingError, match="parameter extra"):
        set_attributes(nn.ParameterDict({"extra": nn.Parameter(torch.ones(1))}), small_table())


# --- the rules of the model ---


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_every_parameter_of_both_streams_has_one_entry_and_divides(tensor, sequence):
    table = sharding_table(tensor=tensor, sequence=sequence, names=FULL_SIZE)
    assert set(table.entries) == set(FULL_SIZE)
    for name, shape in FULL_SIZE.items():
        held = [table.slices(name, shape, rank) for rank in range(tensor)]
        for dim, size in enumerate(shape):
            ends = [(slices[dim].start, slices[dim].stop) for slices in held]
            if dim == table[name].dim:
                assert [start for start, _ in ends] == [0, *(stop for _, stop in ends[:-1])], name
                assert ends[-1][1] == size, name
            else:
                assert set(ends) == {(0, size)}, name


def test_attention_and_ffn_are_split_by_heads_and_channels():
    kind = kinds(tensor=2, sequence=False)
    for stream in ("video_dit", "action_dit"):
        block = f"{stream}.blocks.0"
        for attention in ("self_attn", "cross_attn"):
            assert {kind[f"{block}.{attention}.{p}.{w}"] for p in "qkv" for w in ("weight", "bias")} == {"column"}
            assert {kind[f"{block}.{attention}.norm_{p}.weight"] for p in "qk"} == {"head"}
            assert kind[f"{block}.{attention}.o.weight"] == "row"
        assert (kind[f"{block}.ffn.0.weight"], kind[f"{block}.ffn.0.bias"]) == ("column", "column")
        assert kind[f"{block}.ffn.2.weight"] == "row"


def test_gated_layers_are_split_by_heads():
    kind = kinds(tensor=2, sequence=False)
    gated = "video_dit.blocks.3.gated_delta"
    assert {kind[f"{gated}.{p}_proj.weight"] for p in "qkvabg"} == {"column"}
    assert {kind[f"{gated}.{p}_conv1d.weight"] for p in "qkv"} == {"head"}
    assert kind[f"{gated}.A_log"] == kind[f"{gated}.dt_bias"] == "head"
    assert kind[f"{gated}.o_proj.weight"] == "row"


def test_without_sequence_parallelism_only_the_gated_output_norms_are_partial():
    partial = {name for name, kind in kinds(tensor=2, sequence=False).items() if kind == "replicated_partial"}
    assert partial == {f"video_dit.blocks.{i}.gated_delta.o_norm.weight" for i in range(3, 32, 4)}


def test_sequence_parallelism_makes_what_sees_the_videos_own_tokens_partial():
    without, with_tokens = (kinds(tensor=2, sequence=sequence) for sequence in (False, True))
    changed = {name for name in FULL_SIZE if without[name] != with_tokens[name]}
    expected = {
        f"video_dit.{name}.{part}"
        for name in ("time_embedding.0", "time_embedding.2", "time_projection.1", "head.head")
        for part in ("weight", "bias")
    } | {"video_dit.head.modulation"}
    for i in range(32):
        block = f"video_dit.blocks.{i}"
        expected |= {f"{block}.modulation", f"{block}.cross_attn_norm.weight", f"{block}.cross_attn_norm.bias"}
        expected |= {f"{block}.cross_attn.o.bias", f"{block}.ffn.2.bias"}
        expected |= {f"{block}.self_attn.o.bias"} if i % 4 != 3 else set()
    assert changed == expected
    assert {with_tokens[name] for name in changed} == {"replicated_partial"}
    assert with_tokens["video_dit.patch_embedding.weight"] == "replicated_full"
    assert with_tokens["video_dit.text_embedding.0.weight"] == "replicated_full"


# --- the audit in one process ---


def test_the_model_passes_its_audit():
    model = WorldActionModel(SMALL)
    table = sharding_table(tensor=1, sequence=False, names=dict(model.named_parameters()))
    audit(model, table, Topology.single(torch.device("cpu")), full_shapes=public_keys(SMALL))


def test_a_parameter_of_another_shape_fails_the_audit():
    model = WorldActionModel(SMALL)
    table = sharding_table(tensor=1, sequence=False, names=dict(model.named_parameters()))
    shapes = public_keys(SMALL) | {"video_dit.head.head.weight": (1, 1)}
    with pytest.raises(ShardingError, match=r"video_dit.head.head.weight is \(64, 24\) on this rank; .* is \(1, 1\)"):
        audit(model, table, Topology.single(torch.device("cpu")), full_shapes=shapes)


def test_the_checksum_sees_single_bits_and_their_order():
    x = torch.tensor([1.0, 2.0, 0.0])
    different = [torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, -0.0]), torch.tensor([1.0, 2.0, 1e-45])]
    assert len({int(checksum(y)) for y in (x, *different)}) == 4
    assert checksum(x) == checksum(x.clone())
    assert checksum(x.bfloat16()).dtype == checksum(x.double()).dtype == torch.int64


def test_the_checksum_does_not_depend_on_how_a_large_tensor_is_taken(monkeypatch):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = checksum(x)
    monkeypatch.setattr("parallel.audit.CHUNK", 64)
    assert checksum(x) == whole
