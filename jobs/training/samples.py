"""Training samples: a row of the data and a sample seed, which decides all that varies, from speed to instruction.

The plan counts a sample's tokens before a loader in another process makes the sample; both ask the same Variation.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from graft.audio.clip import SAMPLE_RATE
from graft.audio.features import HOP_LENGTH, MIN_FRAMES
from graft.data.augmentation import no_speech_durations, sample_speeds
from graft.data.dataset import RowTable, read_rows
from graft.data.settings import AugmentRecipe
from graft.errors import DataError
from graft.model.configuration import WINDOW_FRAMES
from graft.model.ctc import count_letters, find_letters, spelled_share
from graft.processor import ENGLISH_TOKENS_PER_S, GraftProcessor
from graft.text.instructions import InstructionRecipe, InstructionSampler, make_instruction_sampler
from graft.text.prompts import DEFAULT_INSTRUCTION, PLAIN_INSTRUCTION, Instruction
from graft.training.plan import Plan, PlanColumns, PlanSettings

MAX_DURATION_S = 30.0
MIN_DURATION_S = 0.08
LEAST_SPELLED = 0.5
"""Least share of the letters of the texts that CTC pre-alignment must be able to write."""
MOST_LETTER_TEXTS = 100_000
"""Texts that are searched for letters, evenly spread over all."""
_BLOCK = 65_536


@dataclass(frozen=True, eq=False)
class Variation:
    """How a run's samples vary; NO_VARIATION leaves every clip as it is."""

    no_speech_s: np.ndarray
    """Seconds of each generated sample without speech; these follow the table's last row."""
    augment: AugmentRecipe | None = None
    noise: RowTable | None = None
    """Noise recordings of augment.noise.data."""
    instruction_sampler: InstructionSampler | None = None
    token_noise: float = 0.0
    """Share of the answers' input tokens that are replaced by tokens of other answers."""

    @property
    def changes_lengths(self) -> bool:
        """Whether a sample's number of tokens depends on its sample seed."""
        varies_prompt = self.instruction_sampler is not None and not self.instruction_sampler.is_default
        return varies_prompt or (self.augment is not None and set(self.augment.speed) != {1.0})

    def instruction(self, text: str, sample_seed: int, language: str | None = None) -> Instruction:
        """Choose the instruction of a sample, whose language may be known."""
        if self.instruction_sampler is None:
            return PLAIN_INSTRUCTION
        return self.instruction_sampler.sample(text, sample_seed, language)


NO_VARIATION = Variation(np.zeros(0))


def trainable(rows: RowTable) -> tuple[RowTable, dict[str, np.ndarray]]:
    """Select the rows that can be trained on; returns them and the indices of others by the first reason that applies.

    Raises DataError when none is left.
    """
    lengths = rows.duration_s
    faults = {
        "no words": ~pc.match_substring_regex(rows.texts, r"[\pL\pN]").to_numpy(zero_copy_only=False),
        "no valid duration": ~(np.isfinite(lengths) & (lengths > 0)),
        f"over {MAX_DURATION_S:.0f} s": lengths > MAX_DURATION_S,
        f"under {MIN_DURATION_S} s": lengths < MIN_DURATION_S,
    }
    is_usable, left_out = np.ones(len(rows), bool), {}  # (rows,)
    for reason, faulty in faults.items():
        if len(found := np.flatnonzero(is_usable & faulty)):
            left_out[reason] = found
        is_usable &= ~faulty
    if not is_usable.any():
        reasons = ", ".join(f"{len(found)} {reason}" for reason, found in left_out.items())
        raise DataError(
            f"none of {len(rows)} rows can be trained on ({reasons}): check the data and which of its columns are named"
        )
    return (rows if is_usable.all() else rows.select(is_usable)), left_out


def check_ctc_lengths(rows: RowTable, processor: GraftProcessor) -> None:
    """Raise DataError where CTC cannot align most clips, because they have more letters than audio tokens."""
    letters = pc.utf8_length(pc.replace_substring_regex(rows.texts, r"[^\pL\pM\pN' ]", "")).to_numpy()
    if (count := int((letters > audio_counts(processor, rows.duration_s)).sum())) > len(rows) / 2:
        raise DataError(
            f"{count} of {len(rows)} clips have more letters than audio tokens, so CTC cannot align them: "
            "build the graft with a smaller audio_pool, or give objective=transcript"
        )


def choose_letters(rows: RowTable, processor: GraftProcessor, given: str) -> tuple[str, float]:
    """Choose the symbols of CTC pre-alignment, those `given` or the letters of the texts.

    Returns them and the share of the texts that they spell. Raises DataError where that is under LEAST_SPELLED.
    """
    chosen = np.unique(np.linspace(0, len(rows) - 1, MOST_LETTER_TEXTS).astype(np.int64))
    counts = count_letters(rows.texts.take(pa.array(chosen)).to_pylist())
    letters = given or find_letters(counts, processor.tokenizer)
    if (share := spelled_share(counts, letters)) < LEAST_SPELLED:
        raise DataError(
            f"{len(letters)} letters spell {share:.1%} of the texts, under {LEAST_SPELLED:.0%}, "
            "so CTC cannot learn them: "
            + ("leave letters out, " if given else "")
            + "give objective=transcript, or build on a language model with these letters among its tokens"
        )
    return letters, share


def most_tokens_per_s(rows: RowTable, plan: Plan) -> float:
    """Return how many tokens a second of speech has at most: what all but 1 in 1,000 texts have, and a quarter more.

    It is English's where that is more. Clips of less than a second count as one.
    """
    rates = plan.columns.label_counts[: len(rows)] / np.maximum(rows.duration_s, 1.0)
    return max(ENGLISH_TOKENS_PER_S, round(1.25 * float(np.quantile(rates, 0.999)), 1))


def vary(
    rows: RowTable,
    processor: GraftProcessor,
    *,
    seed: int = 0,
    no_speech: float = 0.0,
    augment: AugmentRecipe | None = None,
    words: InstructionRecipe | None = None,
    token_noise: float = 0.0,
) -> Variation:
    """Make a run's Variation from a recipe's settings; `no_speech` is a share of an epoch's other samples.

    Raises DataError for a noise corpus that cannot be read, and what make_instruction_sampler raises.
    """
    count = round(no_speech * float(np.asarray(rows.weights)[rows.source].sum()))
    noise = augment.noise.data if augment and augment.noise else None
    styles = {"prompt_style": processor.prompt_style, "text_style": processor.text_style}
    return Variation(
        no_speech_s=no_speech_durations(count, seed),
        augment=augment,
        noise=read_rows(noise) if noise else None,
        instruction_sampler=make_instruction_sampler(words, rows.texts, **styles) if words else None,
        token_noise=token_noise,
    )


def plain_variation(processor: GraftProcessor) -> Variation:
    """Make the Variation of unchanged clips; an unformatted label keeps its lower-case instruction.

    Unlike those of training, all of the labels may be unformatted.
    """
    style = "raw" if processor.prompt_style == "reference" else processor.text_style
    return Variation(np.zeros(0), instruction_sampler=InstructionSampler(InstructionRecipe(), style))


def plan_training(
    rows: RowTable, processor: GraftProcessor, settings: PlanSettings, variation: Variation = NO_VARIATION
) -> Plan:
    """Plan a run over rows that can be trained on."""
    columns = plan_columns(rows, processor, variation)
    count = functools.partial(_count_samples, rows, processor, variation, columns.label_counts)
    return Plan(columns, settings, count if variation.changes_lengths else None)


def plan_columns(rows: RowTable, processor: GraftProcessor, variation: Variation = NO_VARIATION) -> PlanColumns:
    """Count the tokens of rows and then of generated samples, unchanged and with the default instruction."""
    free = len(variation.no_speech_s)
    silent = processor.target_lengths([""]).astype(np.int32)
    label_counts = np.concatenate([processor.corpus_target_lengths(rows.texts), np.repeat(silent, free)])
    # The rows of a row group stand together.
    is_first = (np.diff(rows.file, prepend=-1) != 0) | (np.diff(rows.row_group, prepend=-1) != 0)
    groups = np.cumsum(is_first, dtype=np.int32) - np.int32(1)
    counts = audio_counts(processor, np.concatenate([rows.duration_s, variation.no_speech_s]))
    return PlanColumns(
        processor.prompt_lengths([DEFAULT_INSTRUCTION]).astype(np.int32)[0] + counts + label_counts,
        label_counts,
        np.concatenate([groups, np.full(free, -1, np.int32)]),
        np.concatenate([rows.source, np.full(free, len(rows.weights), np.int16)]),
        (*rows.weights, 1.0),
    )


def _count_samples(
    table: RowTable,
    processor: GraftProcessor,
    variation: Variation,
    default_label_counts: np.ndarray,
    rows: np.ndarray,
    sample_seeds: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Count the tokens and label tokens of samples where speed or instruction vary, each (samples,).

    `default_label_counts` are those of all rows with the default instruction.
    """
    durations_s = np.concatenate([table.duration_s, variation.no_speech_s])[rows]
    if variation.augment:
        speeds = sample_speeds(variation.augment.speed, durations_s, sample_seeds)
        durations_s = np.where(rows < len(table), durations_s / speeds, durations_s)
    prompt_counts = processor.prompt_lengths([DEFAULT_INSTRUCTION])[0]
    label_counts = default_label_counts[rows]
    if variation.instruction_sampler and not variation.instruction_sampler.is_default:
        prompt_counts = np.empty(len(rows), int)
        for start, stop in _blocks(len(rows)):
            block, texts = rows[start:stop], np.full(stop - start, "", object)
            speaks = block < len(table)
            texts[speaks] = table.texts.take(block[speaks]).to_pylist()
            seeds = sample_seeds[start:stop].tolist()
            languages = [table.language_of(row) if row < len(table) else None for row in block.tolist()]
            samples = zip(texts, seeds, languages, strict=True)
            instructions = [variation.instruction(*sample) for sample in samples]
            prompt_counts[start:stop] = processor.prompt_lengths([one.text for one in instructions])
            styled = [index for index, one in enumerate(instructions) if one.style]
            styles = [instructions[index].style for index in styled]
            label_counts[start + np.array(styled, int)] = processor.target_lengths(texts[styled].tolist(), styles)
    return prompt_counts + audio_counts(processor, durations_s) + label_counts, label_counts


def audio_counts(processor: GraftProcessor, durations_s: np.ndarray) -> np.ndarray:
    """Count the audio tokens of clips of these lengths in seconds (clips,)."""
    frames = np.ceil(np.round(durations_s * SAMPLE_RATE) / HOP_LENGTH).clip(MIN_FRAMES, WINDOW_FRAMES).astype(int)
    counts = np.array([processor.audio_token_count(count) for count in range(MIN_FRAMES, WINDOW_FRAMES + 1)], np.int32)
    return counts[frames - MIN_FRAMES]


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))
