"""Which split a labelled clip belongs to, so that no text, and where asked no speaker, stands in two splits.

Clips that share a text (lower case, no punctuation) or a speaker must not be apart; a clip without text shares its text with none. Clips
that are chained together so form a group, and the hash of seed and group draws its split by the shares. Pinned clips win:
- a group whose pinned members claim one split goes there, if that split takes a share of the unpinned clips;
- otherwise its clips that share something with a pinned clip of another split are in conflict;
- between two pinned splits, the one with the smaller share (none counts as 0; then by name) keeps what both hold.
The order of the clips changes nothing, nor does adding clips of other groups.
"""

import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Tie = tuple[str, str]  # ("text", normalised), ("clip", name) where there is no text, or ("speaker", name)


@dataclass(frozen=True)
class Candidate:
    """A clip to place: `speaker` None ties it to nobody, `pinned` names the split that it was given, `name` stands in for a text."""

    text: str
    speaker: str | None = None
    pinned: str | None = None
    name: str = ""


@dataclass(frozen=True)
class Placement:
    """The split of a clip; `conflict` says why it must not be used there."""

    split: str
    conflict: str | None = None


def assign_splits(candidates: Sequence[Candidate], shares: Mapping[str, float], *, seed: int) -> list[Placement]:
    """Place every candidate, in their order. `shares` maps a split to its share of the unpinned clips; shares add up to 1."""
    ties = [_ties(candidate) for candidate in candidates]
    winners = _winners(candidates, ties, shares)
    placements: dict[int, Placement] = {}
    for group in _groups(ties):
        home = _home({tie for index in group for tie in ties[index]}, winners, shares, seed)
        for index in group:
            split = candidates[index].pinned or home
            foreign = [
                f"{tie[0]} stands in split {winners[tie]}" for tie in ties[index] if winners.get(tie, split) != split
            ]
            placements[index] = Placement(split, foreign[0] if foreign else None)
    return [placements[index] for index in range(len(candidates))]


def comparable_text(text: str) -> str:
    """Lower case without punctuation: "It's half-past 2!" -> "its half past 2"; "" when nothing is left to say."""
    text = unicodedata.normalize("NFKC", text).lower().replace("'", "").replace("\u2019", "")
    return " ".join(
        "".join(" " if unicodedata.category(character)[0] in "PS" else character for character in text).split()
    )


def seeded_hash(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on nothing but seed and key."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=6).digest()) / 2**48


def _ties(candidate: Candidate) -> list[Tie]:
    text = comparable_text(candidate.text)
    ties = [("text", text) if text else ("clip", candidate.name)]
    return [*ties, ("speaker", candidate.speaker)] if candidate.speaker is not None else ties


def _winners(
    candidates: Iterable[Candidate], ties: Iterable[Sequence[Tie]], shares: Mapping[str, float]
) -> dict[Tie, str]:
    """What pinned clips hold -> the one split that keeps it."""
    claims: dict[Tie, set[str]] = defaultdict(set)
    for candidate, own in zip(candidates, ties, strict=True):
        for tie in own if candidate.pinned else ():
            claims[tie].add(str(candidate.pinned))
    return {tie: min(splits, key=lambda split: (shares.get(split, 0), split)) for tie, splits in claims.items()}


def _groups(ties: Sequence[Sequence[Tie]]) -> list[list[int]]:
    """Connected components of the clips that share ties, as indices (union-find over the ties)."""
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


def _home(ties: set[Tie], winners: Mapping[Tie, str], shares: Mapping[str, float], seed: int) -> str:
    """The split of a group's unpinned clips."""
    claimed = {winners[tie] for tie in ties if tie in winners}
    takers = [(split, share) for split, share in shares.items() if share > 0]
    if len(claimed) == 1 and claimed <= dict(takers).keys():
        return claimed.pop()
    drawn = seeded_hash(seed, min(value for kind, value in ties if kind != "speaker"))
    for split, share in takers:
        drawn -= share
        if drawn < 0:
            return split
    return (
        takers[-1][0] if takers else ""
    )  # shares that add up to a little less than 1, or none, as every clip is pinned
