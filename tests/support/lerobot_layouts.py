"""LeRobot datasets in the older layouts, made from newer ones; and read without the reader that is tested."""

import json
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataloaders.files.video_encoder import encode_mp4
from dataloaders.lerobot.reader import LeRobotDataset


def as_version_2(source: Path, root: Path, version: str) -> Path:
    """The dataset in the older layout: one file per episode, JSON lines, templates of its own."""
    dataset = LeRobotDataset(source)
    info = json.loads((source / "meta/info.json").read_text()) | {
        "codebase_version": version,
        "fps": float(dataset.fps),
        "chunks_size": 2,  # so that the third episode is in the second chunk
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    info["features"]["observation.images.declared"] = info["features"][dataset.camera_keys[0]]
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    tasks = [json.dumps({"task_index": i, "task": task}) for i, task in dataset.tasks.items()]
    (root / "meta/tasks.jsonl").write_text("\n".join(tasks) + "\n")
    lines = []
    for e in dataset:
        chunk = f"chunk-{e.index // 2:03d}"
        lines.append(json.dumps({"episode_index": e.index, "tasks": e.tasks, "length": e.length}))
        table = pa.table(
            {
                "observation.state": e.columns["observation.state"].tolist(),
                "action": e.columns["action"].tolist(),
                "timestamp": e.timestamps,
                "task_index": e.columns["task_index"].ravel(),
            }
        )
        (root / "data" / chunk).mkdir(parents=True, exist_ok=True)
        pq.write_table(table, root / "data" / chunk / f"episode_{e.index:06d}.parquet")
        for camera in dataset.camera_keys:
            video = root / "videos" / chunk / camera / f"episode_{e.index:06d}.mp4"
            video.parent.mkdir(parents=True, exist_ok=True)
            encode_mp4(video, e.frames(camera, range(e.length)), dataset.fps)
    (root / "meta/episodes.jsonl").write_text("\n".join(lines))
    return root


def direct_read(root: Path, camera: str) -> dict[int, dict[str, np.ndarray]]:
    """{episode: {"frames", "observation.state", "action"}} with pyarrow and PyAV alone."""
    info = json.loads((root / "meta/info.json").read_text())
    return (_direct_3 if info["codebase_version"] == "v3.0" else _direct_2)(root, camera)


def _direct_3(root: Path, camera: str) -> dict[int, dict[str, np.ndarray]]:
    out, videos = {}, {}
    rows = [
        row
        for path in sorted(root.glob("meta/episodes/*/*.parquet"))
        for row in pq.ParquetFile(path).read().to_pylist()
    ]
    tables = {path: pq.ParquetFile(path).read() for path in root.glob("data/*/*.parquet")}
    for row in rows:
        path = root / f"data/chunk-{row['data/chunk_index']:03d}/file-{row['data/file_index']:03d}.parquet"
        table = tables[path].filter(pa.compute.equal(tables[path]["episode_index"], row["episode_index"]))
        chunk, file = (row[f"videos/{camera}/{name}_index"] for name in ("chunk", "file"))
        video = root / f"videos/{camera}/chunk-{chunk:03d}/file-{file:03d}.mp4"
        if video not in videos:
            videos[video] = _pictures(video)
        pictures = videos[video]
        fps = json.loads((root / "meta/info.json").read_text())["fps"]
        first = round(row[f"videos/{camera}/from_timestamp"] * fps)
        out[row["episode_index"]] = {"frames": pictures[first : first + row["length"]]} | _vectors(table)
    return out


def _direct_2(root: Path, camera: str) -> dict[int, dict[str, np.ndarray]]:
    out = {}
    for path in sorted(root.glob("data/*/episode_*.parquet")):
        video = root / "videos" / path.parent.name / camera / f"{path.stem}.mp4"
        out[int(path.stem[-6:])] = {"frames": _pictures(video)} | _vectors(pq.ParquetFile(path).read())
    return out


def _vectors(table: pa.Table) -> dict[str, np.ndarray]:
    return {k: np.array(table[k].to_pylist(), np.float32) for k in ("observation.state", "action")}


def _pictures(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
