"""Compute Whisper's log-mel spectrogram of a clip, on CPU.

Whisper takes windows of 30 s, padded with digital silence. Only the frames that overlap the clip are computed; all
after them hold one constant, max(mel.max() - 2, -1.5), which the encoder fills in where it needs them: in log10 power
silence is -10, raised to 8 below the clip's maximum, and features are (power + 4) / 4.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank

from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.errors import AudioError
from graft.model.configuration import TAIL_FRAMES, WINDOW_FRAMES

HOP_LENGTH = 160  # 10 ms
N_FFT = 400
LOUDEST = 2.0
"""Peak, as a multiple of full scale, above which a clip is scaled and clipped to it. Float files may have any scale,
such as that of 16-bit numbers, and Whisper writes nothing of clips that are much too loud."""
MIN_FRAMES = 8  # 0.08 s: one audio token at the coarsest pooling


@dataclass(frozen=True, eq=False)
class Features:
    """Log-mels of one clip: float32 (mels, min(frame_count + TAIL_FRAMES, WINDOW_FRAMES)), 100 frames a second.

    `frame_count` frames are the clip's own, at least MIN_FRAMES; the tail is kept because the encoder's convolutions
    see it.
    """

    mel: np.ndarray
    frame_count: int


class Featurizer:
    """Whisper's log-mel features with 80 or 128 mels, equal to those of the clip padded to 30 s.

    Clips under 0.08 s are padded to it with silence, those over twice full scale are scaled to it. Raises AudioError
    over 30 s. Source: Whisper (Radford et al. 2022), and the WhisperFeatureExtractor of transformers, whose frames come
    out the same.
    """

    def __init__(self, mel_count: int = 80) -> None:
        self.mel_count = mel_count
        self._window = torch.hann_window(N_FFT)
        filters = mel_filter_bank(
            N_FFT // 2 + 1, mel_count, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
        )
        self._filters = torch.from_numpy(filters).float().T.contiguous()  # (mels, bins)

    @torch.inference_mode()
    def __call__(self, clip: AudioClip) -> Features:
        frame_count = max(-(-len(clip.samples) // HOP_LENGTH), MIN_FRAMES)
        if frame_count > WINDOW_FRAMES:
            raise AudioError(
                f"a clip of {clip.duration_s:.2f} s is over Whisper's 30 s: "
                "cut it, e.g. with graft.audio.chunking.windows"
            )
        length = min(frame_count + TAIL_FRAMES, WINDOW_FRAMES)
        # Silence follows to one STFT window past the last frame, but not past 30 s, where Whisper's STFT reflects.
        padded = np.zeros(min(frame_count * HOP_LENGTH + N_FFT, WINDOW_FRAMES * HOP_LENGTH), np.float32)
        padded[: len(clip.samples)] = clip.samples
        if max(padded.max(), -padded.min()) > LOUDEST:
            level = np.percentile(np.abs(clip.samples), 99)  # which a damaged spot does not change
            padded = np.clip(padded / max(1.0, 3 * level), -1, 1)
        stft = torch.stft(torch.from_numpy(padded), N_FFT, HOP_LENGTH, window=self._window, return_complex=True)
        stft = stft[:, :length].T  # (bins, frames) -> (frames, bins), its order in memory
        power = stft.real.square().addcmul_(stft.imag, stft.imag)  # (frames, bins)
        log_mel = (self._filters @ power.T).clamp_(min=1e-10).log10_()  # (mels, frames)
        log_mel = log_mel.clamp_(min=log_mel.max().item() - 8)
        return Features(log_mel.add_(4).div_(4).numpy(), frame_count)

    def fingerprint(self) -> str:
        """Digest the features of a sweep, rounded as far as processors differ: a text that changes when features do."""
        time_s = np.arange(SAMPLE_RATE) / SAMPLE_RATE
        sweep = np.sin(2 * np.pi * 4000 * time_s**2) * time_s
        return hashlib.sha256(np.round(self(AudioClip(sweep.astype(np.float32))).mel, 2).tobytes()).hexdigest()
