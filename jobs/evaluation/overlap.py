"""Find clips that stand twice in a test set, or also in the training data: by id, by text and by audio.

Texts are compared in lower case without punctuation, and only those of LEAST_WORDS words and more: everybody says
"good morning". Audio is compared by its samples at 16 kHz in 16 bits, without digital silence around them: a copy in
another lossless format is found, one that was coded lossily or cut otherwise is not. Of the training data only clips
are decoded whose length is that of a test clip, and at most MOST_DECODED.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from graft.audio.clip import AudioClip
from graft.data.dataset import RowReader, RowTable
from graft.data.splits import comparable_text

from .test_sets import Item, as_rows

LEAST_WORDS = 5
MOST_DECODED = 20_000
SAME_LENGTH_S = 0.02
"""Largest difference between the lengths, as the data tell them, of clips whose audio is compared."""
_BLOCK = 65_536


@dataclass(frozen=True)
class Overlap:
    """Clips of test sets, as (set, id), that stand elsewhere too, and how much was compared."""

    ids: Sequence[tuple[str, str]] = ()
    texts: Sequence[tuple[str, str]] = ()
    audio: Sequence[tuple[str, str]] = ()
    compared: Mapping[str, int] = field(default_factory=dict)
    """Counts of clips: `clips`, `training` rows, `decoded` ones of these and `of_equal_length`."""

    @property
    def clips(self) -> list[tuple[str, str]]:
        """All of them, each once."""
        return list(dict.fromkeys([*self.ids, *self.texts, *self.audio]))


def find_duplicates(items: Sequence[Item]) -> Overlap:
    """Find the clips of test sets that stand there twice: all but the first of those that share id, text or audio.

    Clips in different sets are compared, too, because all sets together are scored.
    """
    names = [item.id.rpartition("#")[0] if _is_numbered(item) else item.id for item in items]
    hashes = hash_audio(as_rows(items))
    return Overlap(
        ids=_repeated(items, [(item.set_name, name) for item, name in zip(items, names, strict=True)]),
        texts=_repeated(items, [_telling_text(item.text) for item in items]),
        audio=_repeated(items, [hashes.get(place) for place in range(len(items))]),
        compared={"clips": len(items)},
    )


def find_overlap(items: Sequence[Item], training: RowTable) -> Overlap:
    """Find the clips of test sets that stand in the training data, too."""
    ids = pa.array([item.id for item in items], pa.large_string())
    known = pc.is_in(ids, training.ids.cast(pa.large_string())).to_pylist()
    wanted = {text for item in items if (text := _telling_text(item.text))}
    found = _texts_among(training, wanted)
    hashes = hash_audio(as_rows(items))
    near = np.flatnonzero(_have_length_of(items, training.duration_s))
    decoded = near if len(near) <= MOST_DECODED else np.random.default_rng(0).permutation(near)[:MOST_DECODED]
    theirs = set(hash_audio(training.select(np.sort(decoded))).values()) if len(decoded) else set()
    return Overlap(
        ids=[_name(item) for item, is_known in zip(items, known, strict=True) if is_known],
        texts=[_name(item) for item in items if _telling_text(item.text) in found],
        audio=[_name(item) for place, item in enumerate(items) if hashes.get(place) in theirs],
        compared={
            "clips": len(items),
            "training": len(training),
            "of_equal_length": len(near),
            "decoded": len(decoded),
        },
    )


def hash_audio(rows: RowTable) -> dict[int, str]:
    """Hash the audio of the rows that can be read: row -> digest."""
    from ..training.validation import readable_rows

    return {row: audio_digest(clip) for row, clip in readable_rows(rows, RowReader(rows.files))}


def audio_digest(clip: AudioClip) -> str:
    """Hash samples in 16 bits, without digital silence around them."""
    samples = np.clip(np.round(clip.samples * 32768), -32768, 32767).astype("<i2")
    (sounding,) = np.nonzero(samples)
    core = samples[sounding[0] : sounding[-1] + 1] if len(sounding) else samples
    return hashlib.blake2b(core.tobytes(), digest_size=16).hexdigest()


def _is_numbered(item: Item) -> bool:
    """Tell whether an id was given a number because it had occurred before: `a#2`."""
    return item.id.rpartition("#")[2].isdigit() and "#" in item.id


def _repeated(items: Sequence[Item], keys: Iterable[object]) -> list[tuple[str, str]]:
    seen: Counter[object] = Counter()
    repeated = []
    for item, key in zip(items, keys, strict=True):
        if key:
            seen[key] += 1
            repeated += [_name(item)] if seen[key] > 1 else []
    return repeated


def _telling_text(text: str) -> str:
    """Return a text for comparison, or "" where it is too short to tell a clip."""
    comparable = comparable_text(text)
    return comparable if len(comparable.split()) >= LEAST_WORDS else ""


def _texts_among(training: RowTable, wanted: set[str]) -> set[str]:
    """Return the wanted texts that training rows have."""
    found: set[str] = set()
    for start in range(0, len(training), _BLOCK):
        texts = training.texts.slice(start, _BLOCK).to_pylist()
        found |= wanted.intersection(map(comparable_text, filter(None, texts)))
    return found


def _have_length_of(items: Sequence[Item], duration_s: np.ndarray) -> np.ndarray:
    """Tell of each length whether an item has it."""
    lengths = np.sort([item.duration_s for item in items])
    after = np.searchsorted(lengths, duration_s - SAME_LENGTH_S)
    nearest = lengths[np.minimum(after, len(lengths) - 1)]
    return np.abs(nearest - duration_s) <= SAME_LENGTH_S


def _name(item: Item) -> tuple[str, str]:
    return item.set_name, item.id
