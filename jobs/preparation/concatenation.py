"""Join single clips of one speaker to longer ones with pauses, for models that hear 30 s at a time.

rows of a split -> turns; each turn puts every row once, by source and speaker, in an order of its own -> cut into clips
-> as many clips, in a drawn order, as the share asks for. Audio is decoded only when a row is written.
All draws follow from the seed and the rows' ids. Pauses are digital silence: beside speech of usual loudness, Whisper's
features, which end 80 dB below the loudest, do not tell it from noise of -80 dBFS.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graft.audio.clip import SAMPLE_RATE, AudioClip, read_audio
from graft.data.splits import seeded_hash
from graft.errors import DataError

from .audio_places import AudioReader
from .clips import stored_clip
from .manifests import Row
from .recipe import MOST_TURNS, JoinedRecipe


@dataclass(frozen=True)
class Part:
    """A row inside a joined one."""

    row: Row
    pause_count: int
    """Samples of silence before the row; the first part of a clip has none."""


@dataclass(frozen=True)
class JoinedRow:
    """Rows that become one clip."""

    id: str
    parts: tuple[Part, ...]

    @property
    def duration_s(self) -> float:
        """Seconds of the rows and of the pauses between them."""
        return _duration_s(self.parts)

    @property
    def language(self) -> str | None:
        """The language of the rows, which is one."""
        return self.parts[0].row.language


def join_splits(splits: Mapping[str, Sequence[Row]], recipe: JoinedRecipe, *, seed: int) -> dict[str, list[JoinedRow]]:
    """Join labelled rows of each split that the recipe names. Raises DataError when too few of them can be joined."""
    named = splits if recipe.splits is None else [split for split in splits if split in recipe.splits]
    return {split: _join(split, [row for row in splits[split] if row.text], recipe, seed) for split in named}


def joined_corpus_row(joined: JoinedRow, reader: AudioReader) -> dict[str, Any]:
    """Decode a joined row into the columns of write_corpus. Raises AudioError."""
    from graft.data.dataset import clip_row

    pieces: list[np.ndarray] = []
    for part in joined.parts:
        pieces += [np.zeros(part.pause_count, np.float32)] if pieces else []
        content, _ = stored_clip(part.row, reader)
        pieces += [read_audio(content, name=str(part.row.audio)).samples]
    rows = [part.row for part in joined.parts]
    columns = clip_row(joined.id, AudioClip(np.concatenate(pieces)), " ".join(row.text for row in rows))
    sexes = {row.sex for row in rows}  # rows without a speaker can be of several
    return {**columns, "spk_id": rows[0].speaker, "sex": rows[0].sex if len(sexes) == 1 else None}


def _join(split: str, rows: Sequence[Row], recipe: JoinedRecipe, seed: int) -> list[JoinedRow]:
    wanted_s = recipe.share * sum(sorted(row.duration_s for row in rows))
    joined: list[JoinedRow] = []
    joined_s = 0.0
    clips = (parts for turn in range(MOST_TURNS) for parts in _turn(rows, recipe, seed, turn))
    while joined_s < wanted_s:
        parts = next(clips, None)
        if parts is None:
            raise DataError(
                f"joined.share={recipe.share:g} of split {split} is {wanted_s / 3600:.2g} h, and its clips, each in "
                f"{MOST_TURNS} at most, make {joined_s / 3600:.2g} h of {recipe.shortest_s:g} to "
                f"{recipe.longest_s:g} s: lower share or shortest_s or name splits"
            )
        digest = hashlib.blake2b("\n".join(part.row.id for part in parts).encode(), digest_size=4).hexdigest()
        joined.append(JoinedRow(f"joined-{len(joined):05}-{digest}", tuple(parts)))
        joined_s += joined[-1].duration_s
    return joined


def _turn(rows: Sequence[Row], recipe: JoinedRecipe, seed: int, turn: int) -> list[list[Part]]:
    """Return the parts of one turn's joined clips, in a drawn order."""
    # Speakers are those of a source, since two may use one name, in one language.
    speakers: dict[tuple[str, str | None, str | None], list[Row]] = defaultdict(list)
    for row in _shuffled(rows, seed, f"order {turn}"):
        speakers[row.source, row.speaker, row.language].append(row)
    cut = [parts for same_speaker in speakers.values() for parts in _cut(same_speaker, recipe, seed, turn)]
    clips = {parts[0].row: parts for parts in cut if len(parts) > 1 and _duration_s(parts) >= recipe.shortest_s}
    return [clips[first] for first in _shuffled(clips, seed, f"clips {turn}")]


def _cut(rows: Sequence[Row], recipe: JoinedRecipe, seed: int, turn: int) -> Iterator[list[Part]]:
    """Cut a sequence of rows where a drawn length is reached, and before the longest one is passed."""
    parts: list[Part] = []
    for row in rows:
        part = Part(row, round(_uniform(recipe.pause_s, seed, f"pause {turn} {row.id}") * SAMPLE_RATE))
        if parts and _duration_s([*parts, part]) > recipe.longest_s:
            yield parts
            parts = []
        parts.append(part)
        enough_s = _uniform((recipe.shortest_s, recipe.longest_s), seed, f"length {turn} {parts[0].row.id}")
        if len(parts) > 1 and _duration_s(parts) >= enough_s:
            yield parts
            parts = []
    yield parts


def _shuffled(rows: Iterable[Row], seed: int, purpose: str) -> list[Row]:
    return sorted(rows, key=lambda row: (seeded_hash(seed, f"{purpose} {row.id}"), row.id))


def _uniform(limits: tuple[float, float], seed: int, key: str) -> float:
    lowest, highest = limits
    return lowest + (highest - lowest) * seeded_hash(seed, key)


def _duration_s(parts: Sequence[Part]) -> float:
    return sum(part.row.duration_s for part in parts) + sum(part.pause_count for part in parts[1:]) / SAMPLE_RATE
