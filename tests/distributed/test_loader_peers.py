"""Batches of ranks that share samples are compared between processes."""

import json

import pytest
from support.loader_peers_ranks import read_steps
from support.toy_shards import toy_members, write_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """Of each rank's machine: the last one's copy differs in one text."""
    root = tmp_path_factory.mktemp("peers")

    def changed(number):
        members = toy_members(number)
        if number == 4:
            members["json"] = json.dumps(json.loads(members["json"]) | {"text": "do something else"}).encode()
        return members

    write_folder(root / "same", [6, 6])
    write_folder(root / "other", [6, 6], changed)
    return [str(root / name) for name in ("same", "same", "same", "other")]


def test_a_copy_of_the_shards_that_differs_stops_all_ranks_by_the_same_words(world, folders):
    found = world(4).run(read_steps, folders, 3, check=True)
    assert len(set(found)) == 1
    assert found[0].startswith("data.check_peers=true: processes that share samples have different batches: of data ")
    assert "of data rank 1 " in found[0]
    assert "on rank 2, " in found[0]
    assert "on rank 3; " in found[0]


def test_peers_with_equal_shards_read_on(world, folders):
    found = world(4).run(read_steps, folders[:3] + folders[:1], 3, check=True)
    assert found[0] == found[1] != found[2] == found[3]
    assert sorted(found[0] + found[2]) == sorted(2 * [*{*found[0], *found[2]}])
