"""Find word times from Whisper's cross-attention: its decoder reads the text and attends to where each word is spoken.

clip, text -> encoder, decoder -> attention of each head to each word -> the heads that follow the text best
    -> words and pauses, by frames

Teacher forcing, the decoder's prefix, and attention over the clip's own frames alone follow OpenAI's
`whisper.timing.find_alignment`. That function takes heads from a list for each checkpoint, reads their attention one
token early, and lets a word last until the next one begins. This module feeds the text letter by letter and chooses the
heads for each clip, with any checkpoint, as in Yeh et al., Whisper Has an Internal Word Aligner, 2025; pauses belong to
no word. Where words follow each other without a pause, Whisper base finds half of the borders to within 30 ms this way,
and to within 250 ms with the listed heads.
"""

import os
import threading
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import WhisperForConditionalGeneration, WhisperTokenizer

from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.audio.features import Featurizer
from graft.audio.vad import FRAME as SCORE_FRAME
from graft.audio.vad import Speech, SpeechDetector
from graft.checkpoints.quiet import no_loading_bars
from graft.errors import ModelError
from graft.inference.aligners.ctc import best_paths, word_spans
from graft.inference.aligners.protocol import spread_words, timed_words
from graft.inference.segments import Word
from graft.model.configuration import WINDOW_FRAMES
from graft.model.encoder import pad_with_silence
from graft.text.characters import split_words

# Samples in an encoder frame: 20 ms.
FRAME = 320
# Number of heads, those whose attention has the largest norms, among which the best are sought.
CANDIDATES = 8
# Most heads that are used: others attend to what is said later, or earlier.
HEADS = 2
# Share of the best head's attention to its own words that a second head must reach to be used.
NEARLY = 0.9
# Encoder frames that are merged into one while heads are chosen. Each word has at least one merged frame.
COARSE = 3
# Share of a frame that a word has where nothing attends to it, so that no single frame decides.
LEAST_SHARE = 0.01

# Largest log-odds, in nats for each frame, that loudness and the speech detector give to speech or to a pause.
MOST_EVIDENCE = 3.0
# Samples over which a frame's loudness is measured.
LOUDNESS_WINDOW = 400
# Decibels above the clip's quiet frames at which a frame is as likely speech as not.
LOUDER_DB = 6.0
# Decibels below the clip's loud frames beyond which nothing is speech, however quiet the quiet frames are.
LOUDEST_RANGE_DB = 35.0
# Decibels of loudness that are worth one nat.
SLOPE_DB = 2.0


class WhisperAligner:
    """Aligns with any Whisper checkpoint, which finds out the language of each clip where none is given.

    A text in a language that the checkpoint does not know is read as one in the language that it hears. A text of more
    tokens than the decoder takes (443 in most checkpoints), or of more than 16 words a second, is spread over the clip.
    Raises MissingExtra without the package silero-vad, ModelError for a checkpoint whose generation config does not say
    how texts begin.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        name: str | None = None,
        device: str = "cpu",
    ) -> None:
        self.name = name or f"{Path(folder).name}, cross-attention"
        with no_loading_bars():
            model: Any = WhisperForConditionalGeneration.from_pretrained(folder, dtype="auto")
        self._model = model.to(device).eval()
        generation = model.generation_config
        if getattr(generation, "no_timestamps_token_id", None) is None:
            raise ModelError(
                f"{folder}: generation_config.json names no no_timestamps_token_id: "
                "take that of the Whisper it was made from"
            )
        # English-only checkpoints take no tokens for the language and the task.
        found = getattr(generation, "lang_to_id", None) or {}
        self._language_ids = {token.strip("<|>"): index for token, index in found.items()}
        self._start_id = generation.decoder_start_token_id
        task = [generation.task_to_id["transcribe"]] if found else []
        self._ending = [*task, generation.no_timestamps_token_id]
        self._tokenizer = WhisperTokenizer.from_pretrained(folder)
        self._featurizer = Featurizer(model.config.num_mel_bins)
        self._detector = SpeechDetector()
        self._lock = threading.Lock()

    def find_language(self, clip: AudioClip) -> str | None:
        """Return the language that is spoken in a clip, as Aligner says; an English-only checkpoint hears English."""
        if not self._language_ids:
            return "en"
        with self._lock:
            return self._likeliest_language(self._encode(clip))

    def align(self, clip: AudioClip, text: str, language: str | None = None) -> tuple[Word, ...]:
        """Return the words of a text with their times, as Aligner says."""
        written = split_words(text)
        words = [word for _, word in written]
        frame_count = -(-len(clip.samples) // FRAME)
        with self._lock:
            tokens = self._word_tokens(written)
            if tokens is None or not words or len(words) > -(-frame_count // COARSE):
                return spread_words(words, clip.duration_s)
            states = self._encode(clip)
            attention = self._attention(states, self._prefix(states, language), tokens, frame_count)
            speech = self._detector.find(clip)
        evidence = _speech_evidence(clip, speech, frame_count)
        best = attention[_best_heads(attention, evidence)]  # (heads, words, frames)
        scores = np.log(_word_shares(best).mean(axis=0) + LEAST_SHARE)  # (words, frames)
        spans = word_spans(_align_frames(scores, evidence), len(words))
        frame_s = FRAME / SAMPLE_RATE
        return timed_words(words, [(first * frame_s, end * frame_s) for first, end in spans], clip.duration_s)

    def _word_tokens(self, words: Sequence[tuple[str, str]]) -> list[list[int]] | None:
        """Tokenize each word by letters, or as a whole where letters are too many; None where words are too.

        What stands before a word is given with it.
        """
        most = self._model.config.max_target_positions - len(self._ending) - (2 if self._language_ids else 1)
        for pieces in [[gap + word[0], *word[1:]] for gap, word in words], [[gap + word] for gap, word in words]:
            flat = [piece for word in pieces for piece in word] or [""]
            ids = iter(self._tokenizer(flat, add_special_tokens=False)["input_ids"])
            # The ids of all pieces in order -> those of each word.
            tokens = [[token for piece in islice(ids, len(word)) for token in piece] for word in pieces]
            if sum(map(len, tokens)) <= most:
                return tokens
        return None

    @torch.inference_mode()
    def _encode(self, clip: AudioClip) -> torch.Tensor:
        """Compute the encoder's states of a clip, (1, window, d_model). Raises AudioError for a clip over 30 s."""
        features = self._featurizer(clip)
        # (1, mels, frames of the clip) -> (1, mels, WINDOW_FRAMES)
        mel = pad_with_silence(
            torch.from_numpy(features.mel[None]), torch.tensor([features.frame_count]), WINDOW_FRAMES
        )
        self._model.set_attn_implementation("sdpa")
        states: torch.Tensor = self._model.get_encoder()(
            mel.to(self._model.device, self._model.dtype)
        ).last_hidden_state
        return states

    def _prefix(self, states: torch.Tensor, language: str | None) -> list[int]:
        """Return the ids with which every text begins in a language, by default the likeliest one of the states."""
        if not self._language_ids:
            return [self._start_id, *self._ending]
        code = language if language in self._language_ids else self._likeliest_language(states)
        return [self._start_id, self._language_ids[code], *self._ending]

    @torch.inference_mode()
    def _likeliest_language(self, states: torch.Tensor) -> str:
        ids = torch.tensor([[self._start_id]], device=states.device)
        decoded = self._model.get_decoder()(ids, encoder_hidden_states=states, use_cache=False).last_hidden_state
        logits = self._model.proj_out(decoded)[0, -1]  # (vocabulary,)
        return max(self._language_ids, key=lambda code: float(logits[self._language_ids[code]]))

    @torch.inference_mode()
    def _attention(
        self, states: torch.Tensor, prefix: Sequence[int], tokens: Sequence[Sequence[int]], frame_count: int
    ) -> np.ndarray:
        """Compute how much heads attend to the clip's frames for each word: (CANDIDATES, words, frames).

        The attention of each token sums to 1 over the frames.
        """
        device = states.device
        self._model.set_attn_implementation("eager")  # it takes twice the time, but returns its weights
        ids = torch.tensor([[*prefix, *(token for word in tokens for token in word)]], device=device)
        decoded = self._model.get_decoder()(ids, encoder_hidden_states=states, output_attentions=True, use_cache=False)
        owners = torch.repeat_interleave(torch.tensor([len(word) for word in tokens])).to(device)  # (tokens,)
        # For each layer (1, heads, prefix + tokens, window) -> (heads, tokens, frames) -> (heads, words, frames)
        layers = [layer[0, :, len(prefix) :, :frame_count].float() for layer in decoded.cross_attentions]
        heads = torch.cat([_sum_by_word(layer, owners, len(tokens)) for layer in layers])
        norms = heads.square().sum(dim=1).sqrt().sum(dim=-1)  # (heads of all layers,)
        return heads[norms.topk(min(CANDIDATES, len(norms))).indices].cpu().numpy()


def _sum_by_word(attention: torch.Tensor, owners: torch.Tensor, word_count: int) -> torch.Tensor:
    """Add up the attention of each word's tokens.

    attention (heads, tokens, frames), the word that owns each token (tokens,) -> (heads, words, frames)
    """
    heads, _, frames = attention.shape
    attention = attention / (attention.sum(dim=-1, keepdim=True) + 1e-9)
    return attention.new_zeros(heads, word_count, frames).index_add_(1, owners, attention)


def _best_heads(attention: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """Choose the heads that attend most to the frames where they place the words; every word counts the same.

    attention (heads, words, frames); evidence (frames,) in nats, positive for speech and negative for a pause.
    """
    starts = np.arange(0, attention.shape[-1], COARSE)
    attention, evidence = (np.add.reduceat(part, starts, axis=-1) for part in (attention, evidence))
    paths = _align_frames(COARSE * np.log(_word_shares(attention) + LEAST_SHARE), evidence)  # (heads, frames)
    own = paths[:, None, :] == np.arange(attention.shape[1])[:, None]  # (heads, words, frames)
    own_shares = (attention * own).sum(axis=-1) / (attention.sum(axis=-1) + 1e-9)  # (heads, words)
    faithfulness = own_shares.mean(axis=-1)  # (heads,)
    best = np.argsort(-faithfulness)[:HEADS]
    return best[faithfulness[best] >= NEARLY * faithfulness[best[0]]]


def _word_shares(attention: np.ndarray) -> np.ndarray:
    """Return each word's share of the attention to a frame: (..., words, frames)."""
    return attention / (attention.sum(axis=-2, keepdims=True) + 1e-9)


def _align_frames(scores: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """Find the word of each frame, -1 for a pause.

    scores (..., words, frames), evidence (frames,) -> (..., frames)
    """
    *heads, words, frames = scores.shape
    # The states are a pause, a word, a pause, ..., a word, a pause; pauses may be skipped.
    states = np.empty((*heads, frames, 2 * words + 1), np.float32)
    states[..., ::2] = -np.maximum(evidence, 0)[:, None]
    states[..., 1::2] = np.moveaxis(scores, -1, -2) + np.minimum(evidence, 0)[:, None]
    is_word = np.arange(2 * words + 1) % 2 == 1
    paths, _ = best_paths(states, may_skip=is_word)
    return np.where(is_word[paths], paths // 2, -1)


def _speech_evidence(clip: AudioClip, speech: Speech, frame_count: int) -> np.ndarray:
    """Return the log-odds of speech in each frame (frames,), in nats, from loudness and from the speech detector.

    Loudness shows the borders of words best; the detector holds out in noise.
    """
    middles = np.arange(frame_count) * FRAME + FRAME // 2
    # Loudness of the window around each frame's middle, from differences of the running sum of squares.
    energy = np.cumsum(np.pad(np.square(clip.samples, dtype=np.float64), LOUDNESS_WINDOW))
    first = middles + LOUDNESS_WINDOW // 2
    level = 10 * np.log10((energy[first + LOUDNESS_WINDOW] - energy[first]) / LOUDNESS_WINDOW + 1e-10)
    quiet, loud = np.percentile(level, (5, 95))
    threshold = max(min(quiet + LOUDER_DB, (quiet + loud) / 2), loud - LOUDEST_RANGE_DB)
    scores = np.clip(speech.scores[middles.clip(max=len(clip.samples) - 1) // SCORE_FRAME], 1e-3, 1 - 1e-3)
    detected = np.clip(np.log(scores / (1 - scores)), -MOST_EVIDENCE, MOST_EVIDENCE)
    return np.clip((level - threshold) / SLOPE_DB + detected, -MOST_EVIDENCE, MOST_EVIDENCE)
