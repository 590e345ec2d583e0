"""What strangers may send, and what is said of it: name -> (what makes it, its line in quarantine or the error).

Used by attack.py and the tests, which have smaller ones of the last kind for smaller limits.
"""

from __future__ import annotations

from attack_parts import clips as hostile
from attack_parts import robots

VECTORS = {name: {"dtype": "float32", "shape": [10**12]} for name in ("observation.state", "action")}
CAMERA = {"dtype": "video", "shape": [64, 96, 3]}
FEATURES = VECTORS | {robots.CAMERA: CAMERA}
"""That announce more dimensions than there are."""

# --- rows of manifests ---

GUESSED = {
    "a list of files": (hostile.concatenation("list.mkv"), "no matroska file as its name says"),
    "a list of addresses": (hostile.playlist("list.mov"), "no mov file as its name says"),
    "a session": (hostile.named("session.mp4", hostile.SESSION), "no mp4 file as its name says"),
    "Matroska called MP4": (hostile.named("a.mp4", lambda: hostile.encoded("matroska")), "no mp4 file as its"),
    "PostScript called JPEG": (hostile.named("a.jpg", lambda: hostile.image("EPS")), "no JPEG file, as its name says"),
    "GIF called PNG": (hostile.named("a.png", lambda: hostile.image("GIF")), "it is no PNG file, as its name says"),
    "TIFF called WebP": (hostile.named("a.webp", lambda: hostile.image("TIFF")), "no WEBP file, as its name says"),
}
NONSENSE = {
    "deep JSON": (hostile.line(hostile.nested(30_000)), "is not JSON .is nested deeper than 32"),
    "400 digits of a start": (
        hostile.line('{"path": "good.mp4", "start": %s}' % ("1" * 400)),
        "start is inf; it must be",
    ),
    "5000 digits of an end": (
        hostile.line('{"path": "good.mp4", "end": -%s}' % ("1" * 5000)),
        "end is -inf; it must be",
    ),
    "400 digits of a score": (
        hostile.line('{"path": "good.mp4", "end": 0.8, "scores": {"a": %s}}' % ("1" * 400)),
        "score a is inf; it must be a number",
    ),
    "a start that is no number": (
        hostile.line('{"path": "good.mp4", "start": NaN}'),
        "start is nan; it must be a number",
    ),
    "300 characters of a name": (hostile.line({"path": f"{'x' * 300}.mp4"}), "no such file"),
    "300 characters of a variant": (
        hostile.line({"path": "good.mp4", "end": 0.7, "captions": {"x" * 300: "x"}}),
        "must be called by up to 32 lower-case letters",
    ),
    "half a character": (
        hostile.line('{"path": "good.mp4", "end": 0.8, "caption": "\\ud800"}'),
        "holds half a character",
    ),
    "half a character of a name": (hostile.line('{"path": "\\ud800.mp4"}'), "no such file"),
    "a null character": (hostile.line('{"path": "a\\u0000.mp4"}'), "leads out of the folder"),
    "a path of lists": (hostile.line({"path": [["x" * 1000] * 10] * 5}), "path is .*it must be a text"),
}
ELSEWHERE = {
    "file://": (hostile.address("file"), "leads out of the folder; .*data.limits.allowed_roots"),
    "local://": (hostile.address("local"), "leads out of the folder; .*data.limits.allowed_roots"),
    "a linked folder": (hostile.linked, "leads out of the folder; .*data.limits.allowed_roots"),
    "a chain": (hostile.line({"path": "simplecache::file:///etc/a.mp4"}), "address that is not made of several"),
    "a chain from afar": (hostile.line({"path": "s3://a/b.mp4::file:///etc/b.mp4"}), "that is not made of several"),
    "memory://": (hostile.line({"path": "memory://a/b.mp4"}), "data.limits.allowed_roots has its beginning"),
}

# --- entries of tars ---

ENTRIES = {
    "a list of files": (
        hostile.entry("b.mkv", b"ffconcat version 1.0\nfile private.mp4\n") + hostile.entry("b.txt", b"x"),
        "no matroska file as its name says",
    ),
    "a sparse member": (hostile.sparse("b.mp4", 1 << 40) + hostile.entry("b.txt"), "b: has a sparse member mp4"),
    "a sparse member by its description": (
        hostile.pax(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40)})
        + hostile.entry("b.mp4", b"0\n" + bytes(510)),
        "b: has a sparse member mp4",
    ),
    "an exabyte": (hostile.entry("b.mp4", b"x", size=hostile.EXABYTE), "b.mp4 does not end in the file"),
    "more than files can have": (hostile.entry("b.mp4", b"x", size=1 << 80), "b.mp4 does not end in the file"),
    "60 digits of a size": (hostile.pax(size="9" * 60) + hostile.entry("b.mp4", b"x"), "does not end in the file"),
    "descriptions in a row": (hostile.pax(comment="x") * 2000 + hostile.entry("b.mp4"), "headers of a member are too"),
    "a long description": (hostile.entry("p", b"x", size=1 << 40, kind=b"x"), "headers of a member are too long"),
    "a long name": (hostile.entry("p", b"x" * 300_000, kind=b"L") + hostile.entry("b.mp4"), "headers of a member are"),
    "deep JSON": (
        hostile.entry("b.mp4", b"x") + hostile.entry("b.json", hostile.nested(30_000).encode()),
        "its json or txt cannot be used .is nested deeper than 32",
    ),
}

# --- datasets of robots ---

DATASETS = {
    "deep JSON": (
        robots.info(x="JSON:" + hostile.nested(30_000)),
        r"info\.json: is not JSON .is nested deeper",
    ),
    "a deep line": (
        robots.episode(x="JSON:" + hostile.nested(30_000)),
        r"episodes\.jsonl: line 2 is not JSON",
    ),
    "a rate of 400 digits": (robots.info(fps="JSON:" + "1" * 400), "fps is inf; it must be a positive number"),
    "a length of 400 digits": (robots.episode(length="JSON:" + "1" * 400), "length is inf; it must be a whole number"),
    "chunks of 400 digits": (
        robots.info(chunks_size="JSON:" + "1" * 400),
        "chunks_size is inf; it must be",
    ),
    "a split of 5000 digits": (
        robots.info(splits={"train": "0:" + "9" * 5000}),
        "split train is .* no range as 0:80",
    ),
    "a name of a gigabyte": (robots.info(data_path="data/{episode_index:01000000000d}.parquet"), "cannot be filled in"),
    "a name of an attribute": (robots.info(data_path="data/{episode_index.__class__}.parquet"), "cannot be filled in"),
    "a camera of 300 characters": (
        robots.info(features=VECTORS | {"x" * 300: CAMERA}),
        "has no camera",
    ),
    "tasks that are none": (robots.episode(tasks=5), "tasks is 5; it must be a list of texts"),
    "a hollow table of episodes": (
        robots.hole("meta/episodes.jsonl", 1 << 43),
        r"episodes\.jsonl: has more than \d",
    ),
    "a hollow info": (robots.hole("meta/info.json", 1 << 43), r"info\.json: has more than 16,000,000 bytes"),
    "a linked folder of videos": (robots.linked_videos, r"leads out of the folder; .*data\.limits\.allowed_roots"),
}

# --- larger than the default limits ---

LARGE = {
    "large pictures": (
        hostile.named("a.mp4", lambda: hostile.encoded(frames=9, height=4096, width=8192)),
        "pictures of 8192x4096, more than",
    ),
    "wide pixels": (
        hostile.named("a.mp4", lambda: hostile.encoded(height=1080, width=1920, **{"x264-params": "sar=200/1"})),
        "is shown at 384000x1080, more than",
    ),
    "a few million frames": (hostile.named("a.mp4", lambda: hostile.promised_frames(5_000_000)), "data.limits.frames"),
    "billions of frames": (hostile.named("a.mp4", lambda: hostile.promised_frames(2**32 - 1)), "data.limits.frames"),
    "a gap": (hostile.named("a.mkv", lambda: hostile.encoded("matroska", late=10**9)), "s at 10 fps: has more than"),
    "a large image": (hostile.named("a.png", lambda: hostile.black_png(9_000, 9_000)), "9000x9000 pixels, more than"),
    "a huge image": (hostile.named("a.png", lambda: hostile.black_png(60_000, 60_000)), "more pixels than data.limits"),
    "a hollow image": (hostile.hollow("a.png", 1 << 43), "has 8796093022208 bytes, more than"),
    "a hollow video": (hostile.hollow("a.mp4", 1 << 43), "a.mp4: cannot be decoded"),
    "a long line": (lambda folder: '{"caption": "%s"}' % ("x" * 10**8), "has more than 16,000,000 bytes of JSON"),
    "many lists": (lambda folder: "[" + "[]," * (10**7) + "[]]", "has more than 16,000,000 bytes of JSON"),
}
ACCEPTED = {
    "as large as pictures may be": hostile.named(
        "a.mp4", lambda: hostile.encoded(frames=41, height=4096, width=4096, **{"x264-params": "ref=16"})
    ),
    "as large as an image may be": hostile.named("a.png", lambda: hostile.black_png(8192, 8192)),
}
"""Rows that the default limits let pass: what they cost."""

EPISODES = {
    "equal numbers": (robots.many_zeros(600_000_000), "takes more than data.limits.table_mb"),
    "a long vector": (
        robots.column("x", lambda: robots.vector_of_zeros(100_000_000)),
        "more than data.limits.table_mb",
    ),
    "equal texts": (robots.rows(lambda: robots.one_text(100_000, 500_000)), "takes more than data.limits.table_mb"),
    "a list of equal texts": (
        robots.column("x", lambda: robots.list_of_one_text(5_000_000, 100_000)),
        "more than data.limits.table_mb",
    ),
    "a last timestamp that is no number": (robots.column("timestamp", robots.late_nan), "values that are not finite"),
    "a score of 400 digits": (robots.episode(score_a="JSON:" + "1" * 400), "score a is inf; it must be a number"),
    "a picture behind a linked folder": (robots.linked_picture, "'link/private.png' leads out of the folder"),
}
TABLES = {
    "as large as texts may be": (robots.column("x", lambda: robots.other_texts(17_000_000), compression="zstd"), None),
    "as long as a vector may be": (robots.column("x", lambda: robots.vector_of_zeros(39_000_000)), "different lengths"),
    "as many episodes as may be": (robots.many_episodes(499_999), "promises 2 episodes"),
}
"""Of robots, which the limits let pass: what they cost."""
