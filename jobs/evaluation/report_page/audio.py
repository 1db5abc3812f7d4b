"""Read the audio of clips, and write it so that a page can hold it: MP3 and a log-mel picture.

clips.parquet -> the rows of the data -> samples -> {"type", "audio", "mel"}, in base64
"""

import base64
import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import soundfile

from graft.audio.chunking import windows
from graft.audio.clip import SAMPLE_RATE, AudioClip, read_audio
from graft.audio.features import Featurizer
from graft.data.dataset import CorpusFile, RowReader
from graft.errors import AudioError, DataError

Key = tuple[str, str]
"""Set and id of a clip."""
CLIPS_FILE = "clips.parquet"
COMPRESSION = 0.8
"""Of MP3, from 0 to 1: speech takes about 30 kb/s."""
MOST_COLUMNS = 1200
"""Most columns of a log-mel picture, which are screen pixels at most."""


def read_clips(folder: Path, keys: Sequence[Key]) -> Iterator[tuple[Key, AudioClip]]:
    """Yield the audio of the clips that graft evaluate has noted in the folder, and that can still be read."""
    path = folder / CLIPS_FILE
    if not path.is_file():
        return
    table = pq.read_table(path)
    names = pc.binary_join_element_wise(table["set"], table["id"], "\n")
    places = pc.index_in(pa.array([f"{set_name}\n{name}" for set_name, name in keys], pa.string()), names)
    found = [(key, place) for key, place in zip(keys, places.to_pylist(), strict=True) if place is not None]
    rows = table.take(pa.array([place for _, place in found], pa.int64())).to_pylist()
    files = [CorpusFile(row["uri"], row["audio"]) for row in rows]
    reader = RowReader(list(dict.fromkeys(files)))
    for (key, _), row, file in zip(found, rows, files, strict=True):
        with contextlib.suppress(AudioError, DataError):
            content, name = reader.wav(reader.files.index(file), row["row_group"], row["row"])
            yield key, read_audio(content, name=name or key[1])


def embed_audio(clip: AudioClip) -> dict[str, str]:
    """Write a clip for the page: its audio as MP3, and its log-mel picture as PNG."""
    audio, picture = io.BytesIO(), io.BytesIO()
    soundfile.write(
        audio,
        np.clip(clip.samples, -1, 1),
        SAMPLE_RATE,
        format="MP3",
        subtype="MPEG_LAYER_III",
        compression_level=COMPRESSION,
        bitrate_mode="VARIABLE",
    )
    _write_picture(picture, log_mel(clip))
    return {"type": "audio/mpeg", "audio": _base64(audio), "mel": _base64(picture)}


def log_mel(clip: AudioClip) -> np.ndarray:
    """Compute a clip's log-mels as the encoder sees them, without what follows its end: (mels, columns)."""
    featurizer = Featurizer()
    parts = [featurizer(window.clip) for window in windows(clip)]
    mel = np.concatenate([part.mel[:, : part.frame_count] for part in parts], axis=1)
    step = -(-mel.shape[1] // MOST_COLUMNS)  # frames of a column
    padded = np.pad(mel, ((0, 0), (0, -mel.shape[1] % step)), mode="edge")
    return padded.reshape(len(mel), -1, step).max(axis=2)


def _write_picture(file: io.BytesIO, mel: np.ndarray) -> None:
    from matplotlib.image import imsave

    metadata: Any = {"Software": None}  # the version of matplotlib, by which equal pages would differ
    imsave(file, mel, cmap="magma", origin="lower", format="png", metadata=metadata)


def _base64(file: io.BytesIO) -> str:
    return base64.b64encode(file.getvalue()).decode()
