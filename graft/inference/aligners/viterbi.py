"""Find the best paths through states that follow one another in time, with Viterbi's algorithm."""

import numpy as np


def best_paths(scores: np.ndarray, may_skip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the state of each frame on the path with the largest sum of scores.

    scores (..., frames, states), may_skip (states,) -> paths (..., frames) and their sums (...). From one frame to the
    next the state stays or advances by one; it advances by two onto a state that `may_skip` the one before it. The
    first frame is in one of the first two states, the last frame in one of the last two. A sum is -inf where no path
    exists.
    """
    frames, states = scores.shape[-2:]
    best = np.full_like(scores[..., 0, :], -np.inf)  # (..., states): the sum of the best path that ends in each state
    best[..., :2] = scores[..., 0, :2]
    moves = np.zeros((frames, *best.shape), np.int8)  # how many states each best path advanced to get there
    for frame in range(1, frames):
        reached = np.full((3, *best.shape), -np.inf, best.dtype)
        reached[0] = best
        reached[1, ..., 1:] = best[..., :-1]
        reached[2, ..., 2:] = np.where(may_skip[2:], best[..., :-2], -np.inf)
        moves[frame] = reached.argmax(axis=0)
        best = reached.max(axis=0) + scores[..., frame, :]
    # The moves lead back from the better of the last two states to the first frame.
    state = np.where(best[..., -1] > best[..., -2], states - 1, states - 2)
    path = np.empty((frames, *state.shape), np.int64)
    for frame in reversed(range(frames)):
        path[frame] = state
        state = state - np.take_along_axis(moves[frame], state[..., None], axis=-1)[..., 0]
    return np.moveaxis(path, 0, -1), best[..., -2:].max(axis=-1)


def word_spans(owners: np.ndarray, word_count: int) -> list[tuple[int, int]]:
    """Find the first frame of each word and the frame after its last.

    `owners` (frames,) holds the word that each frame belongs to, -1 for none; every word must have a frame.
    """
    frames = [np.flatnonzero(owners == word) for word in range(word_count)]
    return [(int(own[0]), int(own[-1]) + 1) for own in frames]
