"""A warm start for the projector: it learns to spell what is heard in the language model's own letters.

A fresh projector tells a language model nothing, and takes long to learn from whole transcripts what to tell it. Spelling needs no
language model: by CTC (Graves et al., 2006) each audio token comes to resemble the text embedding of the letter that is spoken there, or
of a line break where there is none, and a language model can learn to read that.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .encoder import encode_audio, token_counts
from .modeling import GraftForConditionalGeneration
from .tokens import LETTERS

BLANK, SPACE = "\n", " "
SHARPNESS = 8.0
"""The logit that a letter's own embedding gets over that of the average one."""


@dataclass
class CtcOutput:
    loss: Tensor


class CtcPrealignment(nn.Module):
    """A graft's encoder and projector, without its language model, of which only the letters' embeddings remain.

    Takes a training batch's inputs as the graft does and returns the loss alone: CTC's, summed over the clips that have labels and divided
    by `label_count`. What is spelled is the labels' text in lower case, without accents; what is none of `letters` is a space.
    Raises ValueError for letters that are not one token each.
    """

    def __init__(self, model: GraftForConditionalGeneration, tokenizer: Any, letters: str = LETTERS):
        super().__init__()
        self.config = model.config
        self.audio_tower, self.audio_projector = model.audio_tower, model.audio_projector
        self.tokenizer, self.symbols = tokenizer, BLANK + SPACE + letters
        ids = [tokenizer(symbol, add_special_tokens=False)["input_ids"] for symbol in self.symbols]
        if several := [symbol for symbol, found in zip(self.symbols, ids, strict=True) if len(found) != 1]:
            raise ValueError(f"{several[0]!r} is not one token of the language model's: leave it out of letters")
        with torch.no_grad():
            embeddings = model.get_input_embeddings()(torch.tensor(ids, device=model.device).flatten()).float()
            centred = embeddings - embeddings.mean(0)
        self.register_buffer(
            "directions", centred * SHARPNESS / centred.square().sum(1).mean(), persistent=False
        )  # (symbols, hidden_size)

    def forward(
        self,
        labels: Tensor,
        audio_frame_counts: Tensor,
        input_features: Tensor | None = None,
        audio_states: Tensor | None = None,
        label_count: int | Tensor | None = None,
        **_: Any,
    ) -> CtcOutput:
        logits, counts = self._logits(audio_frame_counts, input_features, audio_states)
        spelled = [self.spelled(self.tokenizer.decode(row[row != -100], skip_special_tokens=True)) for row in labels]
        losses = nn.functional.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),
            torch.tensor(
                [self.symbols.index(letter) for text in spelled for letter in text],
                dtype=torch.long,
                device=logits.device,
            ),
            torch.tensor(counts),
            torch.tensor([len(text) for text in spelled]),
            reduction="none",
            zero_infinity=True,  # of clips with more letters than audio tokens
        )
        is_label = labels != -100
        total = (losses * is_label.any(1)).sum()
        return CtcOutput(total / (label_count if label_count is not None else is_label.sum().clamp(min=1)))

    @torch.no_grad()
    def spell(self, input_features: Tensor, audio_frame_counts: Tensor) -> list[str]:
        """Spell clips by the best letter at each audio token."""
        logits, counts = self._logits(audio_frame_counts, input_features, None)
        rows = (row[:count].unique_consecutive().tolist() for row, count in zip(logits.argmax(-1), counts, strict=True))
        return ["".join(self.symbols[index] for index in row if index).strip() for row in rows]

    def spelled(self, text: str) -> str:
        """Write a text in these letters alone."""
        plain = unicodedata.normalize("NFKD", text.lower())
        kept = (letter for letter in plain if not unicodedata.combining(letter))
        return re.sub(r"\s+", SPACE, "".join(letter if letter in self.symbols else SPACE for letter in kept)).strip()

    def _logits(
        self, frame_counts: Tensor, features: Tensor | None, states: Tensor | None
    ) -> tuple[Tensor, Sequence[int]]:
        """Compare each audio token with the letters: (clips, tokens, symbols) float32, padded, and each clip's tokens."""
        if states is None:
            if features is None:
                raise ValueError("neither input_features nor audio_states are given")
            states = encode_audio(self.audio_tower, features, frame_counts, self.config)
        projected = self.audio_projector(states.to(next(self.audio_projector.parameters()).dtype))
        with torch.autocast(projected.device.type, enabled=False):
            logits = projected.float() @ self.directions.T
        counts = token_counts(frame_counts, self.config)
        return nn.utils.rnn.pad_sequence(logits.split(counts), batch_first=True), counts
