"""From messages to observations: keys of datasets, LIBERO and DROID; errors that name the field."""

import numpy as np
import pytest
from support.serving_exports import picture

from kairos_train.basics.errors import UserError
from kairos_train.serving.observation import ObservationReader, layouts_of

CAMERA = "observation.images.top"
LIBERO = ("observation.images.image", "observation.images.wrist_image")


def reader_of(cameras, *, state_key="observation.state", state_dim=8, most_frames=1) -> ObservationReader:
    return ObservationReader(layouts_of(cameras, state_key, state_dim), state_dim=state_dim, most_frames=most_frames)


def message(**changes) -> dict:
    return {CAMERA: picture(0), "observation.state": np.zeros(8), "prompt": "push"} | changes


def libero() -> dict:
    return {
        "observation/image": picture(1, 224, 224),
        "observation/wrist_image": picture(2, 224, 224),
        "observation/state": np.arange(8.0),
        "prompt": "open the drawer",
    }


def droid() -> dict:
    return {
        "observation/exterior_image_1_left": picture(1, 180, 320),
        "observation/wrist_image_left": picture(2, 180, 320),
        "observation/joint_position": np.arange(7.0),
        "observation/gripper_position": np.array([7.0]),
        "prompt": "open the drawer",
    }


def test_a_datasets_own_keys_are_read():
    read = reader_of([CAMERA]).read(message(seed=5))
    assert np.array_equal(read.pictures[0], picture(0)[None])
    assert read.states.dtype == np.float32
    assert read.states.shape == (1, 8)
    assert (read.prompt, read.seed) == ("push", 5)


def test_liberos_keys_are_read_in_the_models_order():
    read = reader_of(LIBERO).read(libero())
    assert [p[0, 0, 0].tolist() for p in read.pictures] == [picture(s, 224, 224)[0, 0].tolist() for s in (1, 2)]
    assert read.states.tolist() == [list(range(8))]
    turned = reader_of(LIBERO[::-1]).read(libero())
    assert np.array_equal(turned.pictures[0], read.pictures[1])
    assert np.array_equal(turned.pictures[1], read.pictures[0])


def test_droids_keys_are_read_and_their_state_put_together():
    cameras = ["observation.images.exterior_image_1_left", "observation.images.wrist_image_left"]
    read = reader_of(cameras).read(droid())
    assert np.array_equal(read.pictures[1][0], picture(2, 180, 320))
    assert read.states.tolist() == [list(range(8))]
    a_number = droid() | {"observation/gripper_position": 7.0}
    assert np.array_equal(reader_of(cameras).read(a_number).states, read.states)


def test_parts_of_a_state_are_keys_of_their_own():
    reader = reader_of([CAMERA], state_key="joints+gripper", state_dim=3)
    given = {CAMERA: picture(0), "joints": np.array([1, 2]), "gripper": np.array([3.0]), "prompt": "push"}
    assert reader.read(given).states.tolist() == [[1, 2, 3]]
    with pytest.raises(UserError, match="4 dimensions; the model takes 3"):
        reader.read(given | {"gripper": np.zeros(2)})


@pytest.mark.parametrize(
    ("cameras", "state_dim"),
    [
        ([CAMERA], 8),
        (LIBERO[:1], 8),
        ((*LIBERO, CAMERA), 8),
        (LIBERO, 7),
        ((LIBERO[0], "observation.images.image2"), 6),
    ],
)
def test_a_robots_keys_are_offered_only_where_cameras_and_state_agree(cameras, state_dim):
    assert [layout.name for layout in layouts_of(cameras, "observation.state", state_dim)] == ["dataset"]
    assert [layout.name for layout in layouts_of(LIBERO, "observation.state", 8)] == ["dataset", "libero"]


def test_a_request_without_seed_gets_one_of_its_own():
    reader = reader_of([CAMERA])
    assert len({reader.read(message()).seed for _ in range(8)}) == 8


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({CAMERA: None}, "'observation.images.top': is a NoneType; send a uint8 array"),
        ({CAMERA: picture(0).astype(np.float32)}, "'observation.images.top': has dtype float32; send uint8"),
        ({CAMERA: picture(0)[..., 0]}, "'observation.images.top': has shape [32, 32]"),
        ({CAMERA: picture(0).transpose(2, 0, 1)}, "'observation.images.top': has shape [3, 32, 32]"),
        ({CAMERA: np.zeros((0, 32, 3), np.uint8)}, "'observation.images.top': has shape [0, 32, 3]"),
        ({CAMERA: np.zeros((1, 5000, 3), np.uint8)}, "sides of 1 to 4096"),
        ({CAMERA: np.zeros((2, 32, 32, 3), np.uint8)}, "'observation.images.top': has 2 frames; the model is given 1"),
        ({CAMERA: np.zeros((0, 32, 32, 3), np.uint8)}, "has 0 frames"),
        ({"observation.state": [0.0] * 8}, "'observation.state': is a list; send an array"),
        ({"observation.state": np.zeros(7)}, "'observation.state': has shape [7]; send (8,)"),
        ({"observation.state": np.zeros((1, 1, 8))}, "'observation.state': has shape [1, 1, 8]"),
        ({"observation.state": np.array(["a"] * 8)}, "'observation.state': has dtype <U1"),
        ({"observation.state": np.full(8, True)}, "'observation.state': has dtype bool"),
        ({"observation.state": np.array([0, 0, np.nan] + [0] * 5)}, "'observation.state': dimension 2 is not a finite"),
        ({"observation.state": np.full(8, 1e300)}, "'observation.state': dimension 0 is not a finite"),
        ({"prompt": b"push"}, "'prompt': is a bytes"),
        ({"prompt": "a" * 5000}, "'prompt': has 5000 characters"),
        ({"seed": -1}, "'seed': must be"),
        ({"seed": 0.5}, "'seed': must be"),
        ({"seed": True}, "'seed': must be"),
        ({"observation.images.tpo": picture(0)}, "did you mean 'observation.images.top'?"),
        ({b"prompt": "push"}, "b'prompt': is no key of this policy"),
    ],
)
def test_an_unfit_field_is_named(changes, reason):
    with pytest.raises(UserError) as refused:
        reader_of([CAMERA]).read(message() | changes)
    assert reason in str(refused.value)


@pytest.mark.parametrize("key", [CAMERA, "observation.state", "prompt"])
def test_a_missing_field_is_named(key):
    given = message()
    del given[key]
    with pytest.raises(UserError, match=f"'{key}': is missing"):
        reader_of([CAMERA]).read(given)


@pytest.mark.parametrize("value", [None, 3, "text", [1], np.zeros(3)])
def test_what_is_no_map_is_refused(value):
    with pytest.raises(UserError, match="send a map"):
        reader_of([CAMERA]).read(value)


def test_several_frames_need_as_many_states():
    reader = reader_of([CAMERA], most_frames=5)
    stack = np.stack([picture(s) for s in range(3)])
    read = reader.read(message() | {CAMERA: stack, "observation.state": np.zeros((3, 8))})
    assert read.pictures[0].shape == (3, 32, 32, 3)
    with pytest.raises(UserError, match=r"frames: 3 of observation.images.top, 1 of the state; send as many"):
        reader.read(message() | {CAMERA: stack})
