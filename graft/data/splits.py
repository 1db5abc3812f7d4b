"""Assign labelled clips to splits, so that no text, and where asked no speaker, is in two splits.

Clips that share a text (lower case, no punctuation) or a speaker must be in one split; a clip without text shares its
text with none. Clips that are chained together so form a group, and the hash of seed and group draws its split by the
shares. Pinned clips win:

- a group whose pinned members claim one split goes there, if that split takes a share of the unpinned clips;
- otherwise its clips that share something with a pinned clip of another split are in conflict;
- between two pinned splits, the one with the smaller share (none counts as 0; then by name) keeps what both hold.

The result depends neither on the order of the clips nor on the clips of other groups.
"""

import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Tie = tuple[str, str]
"""A thing that clips may share: ("text", normalised), ("clip", name) where there is no text, or ("speaker", name)."""


@dataclass(frozen=True)
class Candidate:
    """A clip to place.

    `speaker` None ties it to nobody, `pinned` names the split that it was given, `name` replaces a missing text.
    """

    text: str
    speaker: str | None = None
    pinned: str | None = None
    name: str = ""


@dataclass(frozen=True)
class Placement:
    """The split of a clip; `conflict` says why it must not be used there, None that it may."""

    split: str
    conflict: str | None = None


def assign_splits(candidates: Sequence[Candidate], shares: Mapping[str, float], *, seed: int) -> list[Placement]:
    """Place every candidate, in order.

    `shares` maps each split to its share of the unpinned clips; shares add up to 1.
    """
    ties = [_ties(candidate) for candidate in candidates]
    winners = _winners(candidates, ties, shares)
    placements: dict[int, Placement] = {}
    for group in _groups(ties):
        chosen = _choose_split({tie for index in group for tie in ties[index]}, winners, shares, seed)
        for index in group:
            split = candidates[index].pinned or chosen
            foreign = (tie for tie in ties[index] if winners.get(tie, split) != split)
            conflict = next((f"{tie[0]} stands in split {winners[tie]}" for tie in foreign), None)
            placements[index] = Placement(split, conflict)
    return [placements[index] for index in range(len(candidates))]


def comparable_text(text: str) -> str:
    """Write a text in lower case without punctuation: "It's half-past 2!" -> "its half past 2"."""
    text = unicodedata.normalize("NFKC", text).lower().replace("'", "").replace("\u2019", "")
    # Categories P and S are punctuation and symbols.
    spaced = (" " if unicodedata.category(character)[0] in "PS" else character for character in text)
    return " ".join("".join(spaced).split())


def seeded_hash(seed: int, key: str) -> float:
    """Hash seed and key to a number in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=6).digest()) / 2**48


def _ties(candidate: Candidate) -> list[Tie]:
    text = comparable_text(candidate.text)
    ties = [("text", text) if text else ("clip", candidate.name)]
    return [*ties, ("speaker", candidate.speaker)] if candidate.speaker is not None else ties


def _winners(
    candidates: Iterable[Candidate], ties: Iterable[Sequence[Tie]], shares: Mapping[str, float]
) -> dict[Tie, str]:
    """Map each tie of pinned clips to the one split that keeps it."""
    claims: dict[Tie, set[str]] = defaultdict(set)
    for candidate, own in zip(candidates, ties, strict=True):
        for tie in own if candidate.pinned else ():
            claims[tie].add(str(candidate.pinned))
    return {tie: min(splits, key=lambda split: (shares.get(split, 0), split)) for tie, splits in claims.items()}


def _groups(ties: Sequence[Sequence[Tie]]) -> list[list[int]]:
    """Find the connected components of clips that share ties, as indices (union-find over the ties)."""
    parent: dict[Tie, Tie] = {}

    def root(tie: Tie) -> Tie:
        while parent.setdefault(tie, tie) != tie:
            parent[tie] = tie = parent[parent[tie]]
        return tie

    for first, *others in ties:
        for other in others:
            parent[root(other)] = root(first)
    groups: dict[Tie, list[int]] = defaultdict(list)
    for index, (first, *_) in enumerate(ties):
        groups[root(first)].append(index)
    return list(groups.values())


def _choose_split(ties: set[Tie], winners: Mapping[Tie, str], shares: Mapping[str, float], seed: int) -> str:
    """Choose the split of a group's unpinned clips."""
    claimed = {winners[tie] for tie in ties if tie in winners}
    takers = [(split, share) for split, share in shares.items() if share > 0]
    if len(claimed) == 1 and claimed <= dict(takers).keys():
        return claimed.pop()
    drawn = seeded_hash(seed, min(value for kind, value in ties if kind != "speaker"))
    for split, share in takers:
        drawn -= share
        if drawn < 0:
            return split
    # The shares add up to a little less than 1, or there are none because every clip is pinned.
    return takers[-1][0] if takers else ""
