"""numpy in msgpack: what openpi's codec writes and reads, and nothing that could run code or take memory."""

import contextlib
import os
import pickle

import msgpack
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openpi_client import msgpack_numpy

from kairos_train.basics.errors import UserError
from kairos_train.serving import codec

VALUES = {
    "image": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
    "big_endian": np.array([1.5, -2], ">f8"),
    "strided": np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2],
    "empty": np.zeros((0, 7), np.float32),
    "no_axes": np.array(3, np.int64),
    "flags": np.array([True, False]),
    "names": np.array(["a", "bcd"]),
    "scalar": np.float32(0.25),
    "flag": np.bool_(True),
    "text": "grüß dich",
    "nested": {"list": [1, -(2**40), None, 0.5], b"bytes": b"\x00\xff"},
}


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b) and a.shape == b.shape
    return type(a) is type(b) and a == b


def test_values_survive_a_round_trip():
    assert equal(codec.decode(codec.encode(VALUES)), VALUES)


def test_openpis_codec_reads_and_writes_the_same():
    assert codec.encode(VALUES) == msgpack_numpy.packb(VALUES)
    assert equal(codec.decode(msgpack_numpy.packb(VALUES)), VALUES)
    assert equal(msgpack_numpy.unpackb(codec.encode(VALUES)), VALUES)


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.zeros(2, [("a", "f4")]),
        np.zeros(2, "V3"),
        np.zeros(2, np.complex64),
        np.complex64(1j),
        {1, 2},
        2**70,
    ],
    ids=["objects", "records", "raw", "complex numbers", "a complex number", "a set", "a large integer"],
)
def test_what_has_no_form_is_not_written(value):
    with pytest.raises(UserError, match="message: cannot"):
        codec.encode({"value": value})


def array(**changes) -> dict:
    return {b"__ndarray__": True, b"data": b"\x00" * 8, b"dtype": "<f4", b"shape": [2]} | changes


def with_field(name: bytes, value) -> dict:
    return array() | {name: value}


def nested(levels: int) -> bytes:
    return b"\x91" * levels + b"\xc0"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (with_field(b"dtype", "|O"), "dtype '|O' is not accepted"),
        (with_field(b"dtype", "|V8"), "dtype '|V8' is not accepted"),
        (with_field(b"dtype", "<c8"), "dtype '<c8' is not accepted"),
        (with_field(b"dtype", "i4,O"), "dtype 'i4,O' is not accepted"),
        (with_field(b"dtype", [["a", "O"]]), "dtype list is not accepted"),
        (with_field(b"dtype", "<m8[xx]"), "is not one of numpy's"),
        (with_field(b"shape", [3]), "takes 12 bytes, data has 8"),
        (with_field(b"shape", [2**40, 2**40]), "sizes from 0"),
        (with_field(b"shape", [2**31 - 1] * 8), "data has 8"),
        (with_field(b"shape", [0] + [2**31 - 1] * 7) | {b"data": b""}, "cannot be made"),
        (with_field(b"shape", [-1, -2]), "sizes from 0"),
        (with_field(b"shape", [True, 2]), "sizes from 0"),
        (with_field(b"shape", [1] * 9), "at most 8 sizes"),
        (with_field(b"shape", 2), "at most 8 sizes"),
        (with_field(b"data", "text"), "data is str"),
        (with_field(b"data", [0] * 8), "data is list"),
        (with_field(b"more", 1), "nothing else"),
        ({b"__ndarray__": True}, "must have"),
        ({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}, "does not fit dtype"),
        ({b"__npgeneric__": True, b"data": [], b"dtype": "|u1"}, "data is list"),
        ({b"__npgeneric__": True, b"data": b"", b"dtype": "|O"}, "is not accepted"),
    ],
)
def test_an_array_that_is_not_what_it_says_is_refused(message, reason):
    with pytest.raises(UserError) as refused:
        codec.decode(msgpack.packb({"image": message}))
    assert reason in str(refused.value)


def of_bytes(shape, data):
    return {b"__ndarray__": True, b"data": data, b"dtype": "|u1", b"shape": shape}


@pytest.mark.parametrize(
    ("most", "beyond", "reason"),
    [
        ([0] * 1024, [0] * 1025, "max_array_len"),
        ({str(i): 0 for i in range(1024)}, {str(i): 0 for i in range(1025)}, "max_map_len"),
        ("a" * 65536, "a" * 65537, "max_str_len"),
        ([[]] * 255, [[]] * 256, "more than 256 maps and lists"),  # and the list around them
        (of_bytes([1] * 8, b"x"), of_bytes([1] * 9, b"x"), "at most 8 sizes"),
        (of_bytes([2**31 - 1, 0], b""), of_bytes([2**31, 0], b""), "sizes from 0 to 2^31 - 1"),
        (of_bytes([3], b"xyz"), of_bytes([3], b"xyz-"), "shape [3] of |u1 takes 3 bytes, data has 4"),
        (of_bytes([3], b"xyz"), of_bytes([3], b"xy"), "shape [3] of |u1 takes 3 bytes, data has 2"),
    ],
    ids=["list", "map", "text", "containers", "axes", "size", "more bytes", "fewer bytes"],
)
def test_limits_are_met_and_no_more(most, beyond, reason):
    codec.decode(msgpack.packb(most))
    with pytest.raises(UserError) as refused:
        codec.decode(msgpack.packb(beyond))
    assert reason in str(refused.value)


def test_eight_containers_within_each_other_and_no_more():
    codec.decode(nested(8))
    with pytest.raises(UserError, match="more than 8 deep"):
        codec.decode(nested(9))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "incomplete"),
        (codec.encode(VALUES)[:-3], "incomplete"),
        (codec.encode(VALUES) + b"\x00", "extra"),
        (b"\xc1", "msgpack"),
        (b"\xa2\xff\xff", "utf-8"),
        (msgpack.packb({1: 2}), "int is not allowed"),
        (b"\x82\xa1a\x01\xa1a\x02", "a key twice"),
        (msgpack.packb(msgpack.ExtType(4, b"x")), "max_ext_len"),
        (b"\xdd\xff\xff\xff\xff", "max_array_len"),
        (b"\xdf\x00\x00\x10\x00" + b"\x00" * 8192, "max_map_len"),
        (msgpack.packb("a" * 70_000), "max_str_len"),
        (nested(codec.MAX_DEPTH + 1), "more than 8 deep"),
        (nested(300), "more than 256 maps and lists"),
        (nested(100_000), "more than 8 deep"),
        (b"\x93" + 2 * (b"\xdc\x03\xe8" + b"\x90" * 1000) + b"\xc0", "more than 256 maps and lists"),
    ],
)
def test_a_message_past_a_limit_is_refused(data, reason):
    with pytest.raises(UserError) as refused:
        codec.decode(data)
    assert reason in str(refused.value)
    assert len(str(refused.value)) < 300


def test_the_deepest_message_is_read():
    assert codec.decode(nested(codec.MAX_DEPTH)) is not None


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_pickle_is_not_opened(tmp_path):
    marker = tmp_path / "ran"
    pickled = pickle.dumps(Payload(marker))
    in_msgpack_numpys_form = {b"nd": True, b"type": "O", b"kind": b"O", b"shape": [1], b"data": pickled}
    assert codec.decode(msgpack.packb(in_msgpack_numpys_form)) == in_msgpack_numpys_form  # a map like any other
    for dtype in ("|O", "O", "object", "|O8"):
        with pytest.raises(UserError):
            codec.decode(msgpack.packb(array() | {b"data": pickled, b"dtype": dtype, b"shape": [1]}))
    assert not marker.exists()
    pickle.loads(pickled)  # the test's own: had the codec opened it, the marker would have been there before
    assert marker.exists()


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from([b"__ndarray__", b"__npgeneric__", b"data", b"dtype", b"shape", "a", ""]), inner, max_size=5
        )
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | JUNK.map(msgpack.packb))
@example(msgpack.packb({b"__ndarray__": True, b"data": b"", b"dtype": "<U1", b"shape": [0]}))
def test_any_bytes_are_read_or_refused_in_one_line(data):
    refusal = ""
    try:
        codec.decode(data)
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_message_is_read_or_refused(data):
    message = bytearray(codec.encode(VALUES))
    for place in data.draw(st.lists(st.integers(0, len(message) - 1), max_size=4)):
        message[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UserError):
        codec.decode(bytes(message[: data.draw(st.integers(0, len(message)))]))
