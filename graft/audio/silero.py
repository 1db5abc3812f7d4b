"""Run Silero's speech detector (silero-vad 6.2.3) over blocks of many windows at once.

    windows of 64 + 512 samples -> spectrum -> four convolutions -> LSTM along the clip -> score of each window

The weights are those of the package's TorchScript model, which takes more than ten times as long for the same scores, a
call for every 32 ms. The package itself is never imported, as that would set the process's number of threads to 1. A
block holds one clip: batches of clips would save a tenth of the time at best, and the last bit of a clip's scores would
depend on the others.
"""

import importlib.util
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from graft.errors import MissingExtra

REQUIREMENT = "silero-vad==6.2.3"
WINDOW = 512
CONTEXT = 64
"""Samples before a window that the network takes with it."""
_NAMES = {
    "_model.stft.forward_basis_buffer": "spectrum.weight",
    **{
        f"_model.encoder.{layer}.reparam_conv.{part}": f"layers.{2 * layer}.{part}"
        for layer in range(4)
        for part in ("weight", "bias")
    },
    **{f"_model.decoder.rnn.{part}": f"lstm.{part}_l0" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
    **{f"_model.decoder.decoder.2.{part}": f"score.{part}" for part in ("weight", "bias")},
}
"""Name of each weight for 16 kHz in the package's model -> its name here."""


class Silero(nn.Module):
    """Silero's network for 16 kHz, which scores every 512 samples with the probability that they hold speech.

    Raises MissingExtra without the package.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Conv1d(1, 258, 256, stride=128, bias=False)  # 129 cosines, 129 sines
        self.layers = nn.Sequential(
            nn.Conv1d(129, 128, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(128, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv1d(64, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv1d(64, 128, 3, padding=1),
            nn.ReLU(),
        )
        self.lstm = nn.LSTM(128, 128)
        self.score = nn.Conv1d(128, 1, 1)
        spec = importlib.util.find_spec("silero_vad")
        if spec is None or not spec.submodule_search_locations:
            raise MissingExtra(f"silero-vad is not installed: pip install --no-deps {REQUIREMENT}")
        path = Path(spec.submodule_search_locations[0]) / "data" / "silero_vad.jit"
        packaged = torch.jit.load(str(path), map_location="cpu").state_dict()
        self.load_state_dict({ours: packaged[theirs] for theirs, ours in _NAMES.items()})

    def scores(self, blocks: Iterable[np.ndarray]) -> np.ndarray:
        """Score consecutive blocks of float32 samples, each a multiple of 512 long -> (windows,)."""
        stream = ScoreStream(self)
        return np.concatenate([np.zeros(0, np.float32), *map(stream, blocks)])

    def forward(
        self, windows: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Score (N, 576) consecutive windows -> (N,) scores and the LSTM's state after them.

        `state` is the one after the windows before.
        """
        waves = self.spectrum(nn.functional.pad(windows, (0, CONTEXT), mode="reflect")[:, None])  # (N, 258, 4)
        magnitudes = waves[:, :129].square().add(waves[:, 129:].square()).sqrt()
        hidden, state = self.lstm(self.layers(magnitudes).squeeze(2), state)  # (N, 128, 1) -> (N, 128)
        return self.score(hidden.relu()[:, :, None]).sigmoid().flatten(), state


class ScoreStream:
    """Scores the blocks of one clip, which may come while it is recorded; any number of streams share a network."""

    def __init__(self, network: Silero) -> None:
        self._network = network
        self._context = np.zeros(CONTEXT, np.float32)
        self._state: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.inference_mode()
    def __call__(self, block: np.ndarray) -> np.ndarray:
        """Score the next block of float32 samples, a multiple of 512 long and not empty -> (windows,)."""
        samples = torch.from_numpy(np.concatenate([self._context, block]))
        windows = samples.unfold(0, CONTEXT + WINDOW, WINDOW)  # (samples,) -> (windows, 576)
        scores, self._state = self._network(windows, self._state)
        self._context = block[-CONTEXT:]
        return scores.numpy()
