"""TensorBoard event files as TensorBoard shows them."""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog


def event_files(folder: Path) -> list[Path]:
    return sorted(Path(folder).glob("events.out.tfevents.*"))


def events(path: Path):
    """The events of a file: a record is a length, a checksum of it, the bytes, a checksum of them."""
    data, start = path.read_bytes(), 0
    while start < len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        yield Event.FromString(data[start + 12 : start + 12 + length])
        start += 12 + length + 4


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]} of a folder. A session that starts at a step voids it and later ones in earlier files."""
    shown: dict[str, list] = {}
    for path in event_files(folder):
        for event in events(path):
            if event.session_log.status == SessionLog.START:
                shown = {tag: [pair for pair in pairs if pair[0] < event.step] for tag, pairs in shown.items()}
            for value in event.summary.value:
                shown.setdefault(value.tag, []).append((event.step, value.simple_value))
    return shown
