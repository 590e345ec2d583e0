"""What is done with a hostile source, in a process of its own: its outcome, and the most memory that it took."""

from __future__ import annotations

import json
import re
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from attack_parts.clips import PRIVATE

from dataloaders.config import ClipConfig, WindowConfig
from dataloaders.files.video import decode_mp4
from dataloaders.packing.pack import QUARANTINE, pack
from dataloaders.packing.verification import verify
from dataloaders.shards import read_index, read_shard
from kairos_train.basics.errors import UserError

SECRET = "S3CR3T"
CLIPS = ClipConfig(fps=10.0, short_side=64, aspects=[1.0], most_frames=9, least_frames=5)
WINDOW = WindowConfig(frames=5, action_video_freq_ratio=1, stride=2, height=32, width=32)


def pack_source(source: Path | str, out: Path) -> dict:
    """Pack with `on_bad="skip"`: samples, the lines of quarantine or the error, whether a private video is shown."""
    try:
        pack(source, out, window=WINDOW, clips=CLIPS, prompt_template="{task}", on_bad="skip")
    except UserError as error:
        return {"samples": 0, "lines": [], "error": str(error), "private": False}
    index = read_index(out)
    clips = [decode_mp4(raw["mp4"]) for shard in index.shards for raw in read_shard(out, shard)]
    text = (out / QUARANTINE).read_text() if (out / QUARANTINE).exists() else ""
    lines = [f"{line['name']}: {line['reason']}" for line in map(json.loads, text.splitlines())]
    private = any(abs(clip.mean() - PRIVATE) < 20 for clip in clips)
    return {"samples": index.samples, "lines": lines, "error": "", "private": private}


def verify_shards(folder: Path, out: Path) -> dict:
    """Verify a folder of shards: what is wrong with it."""
    try:
        found = verify(folder)
    except UserError as error:
        return {"samples": 0, "lines": [], "error": str(error), "private": False}
    lines = [f"{fault.name}: {fault.reason}" for fault in found.faults]
    return {"samples": found.samples, "lines": lines, "error": "", "private": False}


def pack_from_afar(folder: Path, out: Path) -> dict:
    """Pack a manifest that lies behind a password and a signature, as do its files; `private` also where those show."""
    with _serving(folder) as host:
        signed = f"http://user:{SECRET}@{host}/%s?signature={SECRET}"
        path = folder / "manifest.jsonl"
        path.write_text(re.sub(r"AFAR/([^\"]*)", lambda match: signed % match[1], path.read_text()))
        found = pack_source(signed % "manifest.jsonl", out)
    written = b"".join(file.read_bytes() for file in out.rglob("*") if file.is_file())
    leaked = SECRET.encode() in written or SECRET in json.dumps(found)
    return found | {"private": found["private"] or leaked}


def spoil_shards(folder: Path, members: dict[str, bytes]) -> None:
    """Give the first sample of a packed folder other members; the index fits them."""
    from dataloaders.shards import sample_block, write_shard

    index = read_index(folder)
    raw = [dict(sample) for shard in index.shards for sample in read_shard(folder, shard)]
    raw[0] |= members
    blocks = [sample_block(sample.pop("__key__"), sample) for sample in raw]
    info = write_shard(folder / index.shards[0].name, blocks)
    values = json.loads((folder / "index.json").read_text())
    values["shards"][0] |= {"bytes": info.bytes, "sha256": info.sha256}
    (folder / "index.json").write_text(json.dumps(values))


def array_header(shape: str) -> bytes:
    """A .npy file of no data; its header says what it likes."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


def peak_kb() -> int:
    """The most memory that this process has had resident. Not of `getrusage`, which begins with the parent's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


@contextmanager
def _serving(folder: Path) -> Iterator[str]:
    login = f"Basic {b64encode(f'user:{SECRET}'.encode()).decode()}"

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Authorization") != login or SECRET not in self.path:
                self.send_error(403)
            else:
                super().do_GET()

        def log_message(self, *ignored) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
