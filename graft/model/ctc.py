"""CTC pre-alignment, a quick first training of the projector that needs the language model's text embeddings only.

A CTC loss (Graves et al., 2006) pulls each projected audio token towards the text embedding of the letter that is
spoken there, or of a line break as the blank, so that the language model later starts from inputs close to those it
knows. Aligning speech to text embeddings by CTC before the language model takes part follows Soundwave (Zhang et al.,
2025).
"""

import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from .encoder import encode_audio, token_counts
from .modeling import AnyGraft

BLANK, SPACE = "\n", " "
LOGIT_MARGIN = 8.0
"""How much higher a symbol's logit is for its own text embedding than for the mean embedding, on average."""
MOST_LETTERS = 8192
"""Letters that are symbols at most, the most frequent ones: Chinese texts have about 6,000."""


class CtcPrealignment(nn.Module):
    """A graft's encoder and projector with the text embeddings of CTC's symbols as a fixed classifier.

    The symbols are the blank (index 0), the space and `letters`, each one token of `tokenizer`. Raises ValueError for a
    letter that is not.
    """

    def __init__(self, model: AnyGraft, tokenizer: Any, letters: str):
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
        indices = {symbol: index for index, symbol in enumerate(self.symbols)}
        targets = [indices[symbol] for symbol in "".join(texts)]  # all clips' symbols, end to end
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
        """Reduce a text to the symbols: lower case, each letter by `spell`, and any other character becomes a space."""
        known, lowered = frozenset(self.symbols), _lower(text)
        spelled = {character: spell(character, known) for character in set(lowered)}
        return " ".join("".join(map(spelled.__getitem__, lowered)).split())

    def _symbol_logits(
        self, frame_counts: Tensor, features: Tensor | None, states: Tensor | None
    ) -> tuple[Tensor, list[int]]:
        """Score the audio tokens; returns logits (clips, tokens, symbols), padded, and each clip's number of tokens."""
        if states is None:
            if features is None:
                raise ValueError("neither input_features nor audio_states are given")
            states = encode_audio(self.audio_tower, features, frame_counts, self.config)
        counts = token_counts(frame_counts, self.config)
        audio_embeds = self.audio_projector(states, counts)  # (tokens of all clips, hidden_size)
        with torch.autocast(audio_embeds.device.type, enabled=False):
            logits = audio_embeds.float() @ self.symbol_weight.T  # -> (tokens of all clips, symbols)
        return nn.utils.rnn.pad_sequence(logits.split(counts), batch_first=True), counts


def count_letters(texts: Iterable[str]) -> Counter[str]:
    """Count the letters, marks, digits and apostrophes of texts in lower case."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_lower(text))
    return Counter({one: count for one, count in counts.items() if one == "'" or _is_spoken(one)})


def find_letters(counts: Mapping[str, int], tokenizer: Any) -> str:
    """Choose the letters of texts that are symbols, sorted, from the counts of count_letters.

    They are those that are one token each. In the place of any other come its base letter and its marks, where these
    are one token each (Unicode's compatibility decomposition). Of more than MOST_LETTERS the rarest are left out.
    """
    found: Counter[str] = Counter()
    for letter, count in counts.items():
        parts = letter if _is_one_token(letter, tokenizer) else unicodedata.normalize("NFKD", letter)
        for part in parts:
            found[part] += count
    letters = (one for one, _ in found.most_common() if _is_one_token(one, tokenizer))
    return "".join(sorted([*letters][:MOST_LETTERS]))


def spelled_share(counts: Mapping[str, int], letters: str) -> float:
    """Compute the share of texts, given by the counts of count_letters, that is spelled with letters.

    Of a letter that is spelled in part, its decomposition counts: é without its accent is half of it.
    """
    known, total = frozenset(letters), sum(counts.values())
    spelled = 0.0
    for letter, count in counts.items():
        parts = unicodedata.normalize("NFKD", letter)
        spelled += count * (1.0 if letter in known else sum(part in known for part in parts) / len(parts))
    return spelled / max(1, total)


def spell(character: str, known: Collection[str]) -> str:
    """Write a character with known ones: itself, the known parts of its decomposition, or else a space.

    A mark that is not known is left out.
    """
    if character in known and character != BLANK:
        return character
    parts = unicodedata.normalize("NFKD", character)
    marks = "".join(part for part in parts if part in known or not unicodedata.category(part).startswith("M"))
    return "".join(part if part in known and part != BLANK else SPACE for part in marks)


def _lower(text: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower()).replace("’", "'")


def _is_spoken(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"


def _is_one_token(text: str, tokenizer: Any) -> bool:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return len(ids) == 1 and tokenizer.decode(ids) == text
