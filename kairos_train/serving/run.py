"""The whole of `kairos-train serve`: checks its options, loads and warms up the policy, serves, says so."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

from kairos_train.basics.errors import UserError
from kairos_train.basics.log import log_to_stderr, logger
from kairos_train.serving.admission import raise_file_numbers
from kairos_train.serving.policy import ActionClipping, ServedPolicy
from kairos_train.serving.server import ServerSettings, run_server

MAX_TOKEN = 4096  # characters of a token file


def run(
    export: Path,
    *,
    host: str,
    port: int,
    token_file: Path | None,
    max_message_mb: float,
    max_batch: int,
    batch_window_ms: float,
    max_connections: int,
    max_connections_per_client: int,
    steps: int | None,
    cameras: str,
    fps: float | None,
    robot: str | None,
    clip_actions: str | None,
    clip_margin: float | None,
    device: str,
) -> None:
    """Serve an export until SIGINT or SIGTERM; prints one line once clients can connect.

    Args:
        cameras: keys joined by commas, for an export that names none; "" otherwise.
        robot: name of one of several that it was trained on; None: the first.
        clip_actions, clip_margin: of `ActionClipping`; None: not clipped, and no margin.

    Raises:
        UserError: an option out of range, a token file that holds no token or that others may use, too few file
            numbers, an export that cannot be served, or an address that cannot be listened on.
    """
    for name, value, fits, rule in (
        ("port", port, 0 <= port < 65536, "from 0 to 65535"),
        ("max-message-mb", max_message_mb, 0 < max_message_mb <= 1024, "above 0, up to 1024"),
        ("batch-window-ms", batch_window_ms, 0 <= batch_window_ms <= 1000, "from 0 to 1000"),
        ("fps", fps, fps is None or 0 < fps < 1e6, "above 0"),
        ("clip-margin", clip_margin, clip_margin is None or 0 <= clip_margin < 1e6, "0 or more"),
    ):
        if not fits:
            raise UserError(f"{name}={value}: must be {rule}")
    if clip_margin is not None and clip_actions is None:
        raise UserError(f"clip-margin={clip_margin}: widens the range of --clip-actions, which is not given; add it")
    clipping = None if clip_actions is None else ActionClipping(clip_actions, clip_margin or 0.0)
    settings = ServerSettings(
        host=host,
        port=port,
        token=None if token_file is None else read_token(token_file),
        max_message_bytes=int(max_message_mb * 2**20),
        max_batch=max_batch,
        batch_window=batch_window_ms / 1000,
        max_connections=max_connections,
        max_connections_per_client=max_connections_per_client,
    )
    raise_file_numbers(max_connections)
    log_to_stderr(dated=True)
    if settings.token is None and not is_local(host):
        logger.warning("host=%s is reachable by others and no --token-file is given: anyone may ask the policy", host)
    policy = ServedPolicy(
        export,
        steps=steps,
        cameras=[c for c in cameras.split(",") if c],
        fps=fps,
        robot=robot,
        clipping=clipping,
        device=device,
    )
    if policy.contradictions:
        logger.warning(
            "%s: its robot's dataset contradicted itself (%s); consistency.json of the shards says what was believed",
            export,
            ", ".join(policy.contradictions),
        )
    for batch in sorted({1, max_batch}):
        policy.warm_up(batch)

    def listening(bound: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {export} at ws://{shown}:{bound} ({policy.reader.told()})", flush=True)

    run_server(policy, settings, listening)


def read_token(file: Path) -> str:
    """The token in a file, without the white space around it.

    Raises:
        UserError: no such file, it does not hold one printable ASCII word, or it is not this user's alone.
    """
    try:
        with open(file, encoding="utf-8") as opened:
            token, about = opened.read(MAX_TOKEN).strip(), os.stat(opened.fileno())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"token-file={file}: cannot be read ({type(error).__name__}); give a text file") from error
    if not (token.isascii() and token.isprintable()) or not token or " " in token:
        raise UserError(f"token-file={file}: must hold one word of printable ASCII; write a random one into it")
    if about.st_uid not in (os.geteuid(), 0):
        raise UserError(f"token-file={file}: belongs to another user ({about.st_uid}); give a file of your own")
    if about.st_mode & 0o077:
        raise UserError(f"token-file={file}: others may use it (mode {about.st_mode & 0o777:o}); run chmod 600 {file}")
    return token


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
