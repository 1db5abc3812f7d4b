"""CTC pre-alignment, a quick first training of the projector that needs the language model's text embeddings only.

A CTC loss (Graves et al., 2006) pulls each projected audio token towards the text embedding of the letter that is
spoken there, or of a line break as the blank, so that the language model later starts from inputs close to those it
knows. Aligning speech to text embeddings by CTC before the language model takes part follows Soundwave (Zhang et al.,
2025).
"""

import re
import unicodedata
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from .encoder import encode_audio, token_counts
from .modeling import GraftForConditionalGeneration
from .tokens import LETTERS

BLANK, SPACE = "\n", " "
LOGIT_MARGIN = 8.0
"""How much higher a symbol's logit is for its own text embedding than for the mean embedding, on average."""


class CtcPrealignment(nn.Module):
    """A graft's encoder and projector with the text embeddings of CTC's symbols as a fixed classifier.

    The symbols are the blank (index 0), the space and `letters`, each one token of `tokenizer`. Raises ValueError for a
    letter that is not.
    """

    def __init__(self, model: GraftForConditionalGeneration, tokenizer: Any, letters: str = LETTERS):
        super().__init__()
        self.config = model.config
        self.audio_tower, self.audio_projector = model.audio_tower, model.audio_projector
        self.tokenizer, self.symbols = tokenizer, BLANK + SPACE + letters
        ids = [tokenizer(symbol, add_special_tokens=False)["input_ids"] for symbol in self.symbols]
        if split := [symbol for symbol, tokens in zip(self.symbols, ids, strict=True) if len(tokens) != 1]:
            raise ValueError(f"{split[0]!r} is not one token of the language model: leave it out of letters")
        with torch.no_grad():
            embeddings = model.get_input_embeddings()(torch.tensor(ids, device=model.device).flatten()).float()
            centred = embeddings - embeddings.mean(0)  # (symbols, hidden_size)
            weight = centred * LOGIT_MARGIN / centred.square().sum(1).mean()
        self.register_buffer("symbol_weight", weight, persistent=False)  # (symbols, hidden_size)

    def forward(
        self,
        labels: Tensor,
        audio_frame_counts: Tensor,
        input_features: Tensor | None = None,
        audio_states: Tensor | None = None,
        label_count: int | Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Compute CTC's loss, summed over the clips that have labels and divided by `label_count`.

        The inputs are those of GraftForConditionalGeneration.forward, one clip for each row of labels (clips, length).
        The target is the labels' text after `normalize`. A clip with more symbols than audio tokens adds zero.
        """
        logits, counts = self._symbol_logits(audio_frame_counts, input_features, audio_states)
        log_probs = logits.log_softmax(-1).transpose(0, 1)  # (clips, tokens, symbols) -> (tokens, clips, symbols)
        texts = [self.normalize(self.tokenizer.decode(row[row != -100], skip_special_tokens=True)) for row in labels]
        targets = [self.symbols.index(symbol) for symbol in "".join(texts)]  # all clips' symbols, end to end
        losses = nn.functional.ctc_loss(
            log_probs,
            torch.tensor(targets, dtype=torch.long, device=logits.device),
            torch.tensor(counts),
            torch.tensor([len(text) for text in texts]),
            reduction="none",
            zero_infinity=True,
        )  # (clips,)
        is_label = labels != -100  # (clips, length)
        total: Any = (losses * is_label.any(1)).sum()
        return CausalLMOutput(loss=total / (label_count if label_count is not None else is_label.sum().clamp(min=1)))

    @torch.no_grad()
    def greedy_decode(self, input_features: Tensor, audio_frame_counts: Tensor) -> list[str]:
        """Transcribe clips by the likeliest symbol of each audio token, with repetitions merged and blanks removed."""
        logits, counts = self._symbol_logits(audio_frame_counts, input_features, None)
        best = zip(logits.argmax(-1), counts, strict=True)  # the best symbols (tokens,) of each clip, and their number
        merged = (symbols[:count].unique_consecutive().tolist() for symbols, count in best)
        return ["".join(self.symbols[index] for index in indices if index).strip() for indices in merged]

    def normalize(self, text: str) -> str:
        """Reduce a text to the symbols: lower case, without accents, and any other character becomes a space."""
        decomposed = unicodedata.normalize("NFKD", text.lower())
        plain = (character for character in decomposed if not unicodedata.combining(character))
        known = "".join(character if character in self.symbols else SPACE for character in plain)
        return re.sub(r"\s+", SPACE, known).strip()

    def _symbol_logits(
        self, frame_counts: Tensor, features: Tensor | None, states: Tensor | None
    ) -> tuple[Tensor, list[int]]:
        """Score the audio tokens; returns logits (clips, tokens, symbols), padded, and each clip's number of tokens."""
        if states is None:
            if features is None:
                raise ValueError("neither input_features nor audio_states are given")
            states = encode_audio(self.audio_tower, features, frame_counts, self.config)
        audio_embeds = self.audio_projector(states)  # (tokens of all clips, hidden_size)
        with torch.autocast(audio_embeds.device.type, enabled=False):
            logits = audio_embeds.float() @ self.symbol_weight.T  # -> (tokens of all clips, symbols)
        counts = token_counts(frame_counts, self.config)
        return nn.utils.rnn.pad_sequence(logits.split(counts), batch_first=True), counts
