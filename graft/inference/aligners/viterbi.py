"""The likeliest way through states that follow one another in time, as aligners ask for it: Viterbi's algorithm."""

import numpy as np


def best_paths(scores: np.ndarray, may_skip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find which state each frame is in, and the sum of its scores: (..., frames, states) -> (..., frames), (...).

    From one frame to the next the state stays, or is the next one, or, where that one `may_skip` (states,) the one before it, the next
    but one. The first frame is in one of the first two states, the last in one of the last two. The sum is -inf where no such way exists.
    """
    frames, states = scores.shape[-2:]
    best = np.full_like(scores[..., 0, :], -np.inf)
    best[..., :2] = scores[..., 0, :2]
    moves = np.zeros((frames, *best.shape), np.int8)
    for frame in range(1, frames):
        reached = np.full((3, *best.shape), -np.inf, best.dtype)
        reached[0] = best
        reached[1, ..., 1:] = best[..., :-1]
        reached[2, ..., 2:] = np.where(may_skip[2:], best[..., :-2], -np.inf)
        moves[frame] = reached.argmax(axis=0)
        best = reached.max(axis=0) + scores[..., frame, :]
    state = np.where(best[..., -1] > best[..., -2], states - 1, states - 2)
    path = np.empty((frames, *state.shape), np.int64)
    for frame in reversed(range(frames)):
        path[frame] = state
        state = state - np.take_along_axis(moves[frame], state[..., None], axis=-1)[..., 0]
    return np.moveaxis(path, 0, -1), best[..., -2:].max(axis=-1)


def word_spans(owners: np.ndarray, word_count: int) -> list[tuple[int, int]]:
    """Find each word's first frame and the one after its last, by the words to which frames belong (frames,), -1 where to none."""
    frames = [np.flatnonzero(owners == word) for word in range(word_count)]
    return [(int(own[0]), int(own[-1]) + 1) for own in frames]
