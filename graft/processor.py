"""Turn clips, images and texts into the model's inputs, for training, bulk transcription and serving alike.

A GraftProcessor serves training and inference of a graft, a PlainWhisperProcessor inference of a Whisper checkpoint.
What a Transcriber uses of either is a SpeechProcessor.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from graft.audio.clip import AudioClip
from graft.audio.features import Features, Featurizer
from graft.errors import ModelError
from graft.model.configuration import AnyGraftConfig, GraftConfig, TextGraftConfig, audio_token_count, read_graft_config
from graft.model.tokens import AUDIO_PAD_TOKEN
from graft.text.prompts import (
    CHATML,
    DEFAULT_INSTRUCTION,
    PLAIN_INSTRUCTION,
    TEMPLATES,
    ChatFormat,
    Instruction,
    check_language,
    find_chat_format,
    prompt_text,
    request_instruction,
    style_text,
)
from graft.text.word_counts import count_tokens

IGNORED_LABEL = -100
IMAGE_TOKEN = "<|image_pad|>"
TOKENIZED_TOGETHER = 8192


class SpeechProcessor(Protocol):
    """Makes the features and the prompt of a clip that is to be transcribed, and has the tokenizer of its answer."""

    @property
    def featurizer(self) -> Featurizer:
        """Computes a clip's features."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Decodes the ids of an answer."""
        ...

    @property
    def trained_context(self) -> bool:
        """Whether the model takes lists of words that may occur."""
        ...

    @property
    def languages(self) -> Sequence[str]:
        """Languages (ISO 639-1) that a prompt may name; none where the model is not told the language."""
        ...

    @property
    def language_ids(self) -> Mapping[str, int]:
        """Tokens of languages, one of which follows `start_ids`; none where the model does not find out languages."""
        ...

    @property
    def start_ids(self) -> list[int]:
        """Ids after which a model with `language_ids` writes the language of a clip."""
        ...

    def instruction(
        self, instruction: str | None = None, context: Sequence[str] | None = None, language: str | None = None
    ) -> str:
        """Write what `prompt_ids` takes for a request: a style's name or phrasing, words that may occur, a language.

        Raises ModelError for a request that the model does not take.
        """
        ...

    def prompt_ids(self, frame_count: int, instruction: str = ...) -> list[int]:
        """Tokenize the prompt of a clip of `frame_count` mel frames."""
        ...

    def prefix_ids(self, text: str) -> list[int]:
        """Tokenize a text that an answer begins with; the next word begins with a space."""
        ...

    def end_ids(self, generation_config: Any) -> set[int]:
        """Return the ids that end an answer."""
        ...

    def max_new_tokens(self, duration_s: float, instruction: str) -> int:
        """Return the most tokens that the answer to a clip of so many seconds can need."""
        ...


ENGLISH_TOKENS_PER_S, OTHER_TOKENS_PER_S = 10.0, 30.0
"""Tokens in a second of speech at most. Vocabularies hold English words whole, but write Hindi letter by letter."""


def max_new_tokens(duration_s: float, tokens_per_s: float = ENGLISH_TOKENS_PER_S) -> int:
    """Return the most tokens that speech of this duration can need: so many a second and 16 more."""
    return 16 + math.ceil(tokens_per_s * duration_s)


@dataclass(frozen=True)
class Example:
    """One clip ready for training: features, prompt ids with placeholders, and target ids.

    Target ids are empty where the clip must not count. `decoder_input_ids`, one for each target, are what the model
    reads in their place; None stands for the targets themselves.
    """

    features: Features
    prompt_ids: list[int]
    target_ids: list[int]
    decoder_input_ids: list[int] | None = None


class GraftProcessor(ProcessorMixin):
    """Bundles Whisper's feature extractor, a tokenizer with the audio tokens and, for Qwen2-VL, its image processor.

    `audio_pool` and the parameters after it repeat the GraftConfig that it was built with; the model checks the tokens.
    """

    def __init__(
        self,
        feature_extractor: Any = None,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        audio_pool: int = 2,
        audio_context: str = "valid",
        prompt_style: str = "graft",
        text_style: str = "lower",
        trained_styles: Sequence[str] = (),
        trained_context: bool = False,
        trained_languages: Sequence[str] = (),
        tokens_per_s: float = ENGLISH_TOKENS_PER_S,
    ):
        self.audio_pool = audio_pool
        self.audio_context = audio_context
        self.prompt_style = prompt_style
        self.text_style = text_style
        self.trained_styles = list(trained_styles)
        self.trained_context = trained_context
        self.trained_languages = list(trained_languages)
        self.tokens_per_s = tokens_per_s
        parts = {"feature_extractor": feature_extractor, "image_processor": image_processor, "tokenizer": tokenizer}
        own = {name: parts[name] for name in self.get_attributes()}
        super().__init__(**own, chat_template=chat_template)

    @staticmethod
    def for_config(
        config: AnyGraftConfig, *, feature_extractor: Any, image_processor: Any, tokenizer: Any
    ) -> "GraftProcessor":
        """Make the processor that matches a graft's configuration; one for text alone has no image processor."""
        names = ("audio_pool", "audio_context", "prompt_style", "text_style")
        trained = ("trained_styles", "trained_context", "trained_languages", "tokens_per_s")
        settings = {name: getattr(config, name) for name in (*names, *trained)}
        parts = {"feature_extractor": feature_extractor, "tokenizer": tokenizer}
        parts |= {"chat_template": tokenizer.chat_template}
        if isinstance(config, TextGraftConfig):
            return TextGraftProcessor(**parts, **settings)
        return GraftProcessor(image_processor=image_processor, **parts, **settings)

    @cached_property
    def featurizer(self) -> Featurizer:
        return Featurizer(self.feature_extractor.feature_size)

    def audio_token_count(self, frame_count: int) -> int:
        return audio_token_count(frame_count, pool=self.audio_pool, context=self.audio_context)

    @property
    def languages(self) -> Sequence[str]:
        """See SpeechProcessor: the languages that training named."""
        return self.trained_languages

    @property
    def language_ids(self) -> Mapping[str, int]:
        """See SpeechProcessor: a graft does not find out languages."""
        return {}

    @property
    def start_ids(self) -> list[int]:
        """See SpeechProcessor."""
        return []

    def instruction(
        self, instruction: str | None = None, context: Sequence[str] | None = None, language: str | None = None
    ) -> str:
        """Write the instruction of a request: a style or a trained phrasing, words that may occur, and a language.

        Raises ModelError for a request that the checkpoint was not trained for, with those that it was.
        """
        return request_instruction(
            instruction,
            context,
            text_style=self.text_style,
            trained_styles=self.trained_styles,
            trained_context=self.trained_context,
            language=language,
            trained_languages=self.trained_languages,
        )

    def prompt_ids(self, frame_count: int, instruction: str = DEFAULT_INSTRUCTION) -> list[int]:
        """Tokenize the transcription prompt of a clip of `frame_count` mel frames, placeholders included.

        Special tokens in the instruction are tokenized as text. Where the prompt is the reference's, raises ModelError
        for any instruction other than the default one.
        """
        before, after, end = self._prompt_parts
        audio_pad_id = self.tokenizer.convert_tokens_to_ids(AUDIO_PAD_TOKEN)
        placeholders = [audio_pad_id] * self.audio_token_count(frame_count)
        return before + placeholders + after + self._plain_ids([self._question(instruction)])[0] + end

    def prompt_lengths(self, instructions: Sequence[str]) -> np.ndarray:
        """Count the tokens of prompts with these instructions, without audio tokens: int64 (instructions,).

        Raises ModelError.
        """
        # Each distinct instruction is tokenized once.
        indices = {instruction: index for index, instruction in enumerate(dict.fromkeys(instructions))}
        lengths = self._plain_lengths(map(self._question, indices)) + sum(map(len, self._prompt_parts))
        return lengths[[indices[instruction] for instruction in instructions]] if indices else lengths

    def prompt_end_ids(self) -> list[int]:
        """Return the ids that end every prompt, which the answer follows."""
        return list(self._prompt_parts[2])

    def prefix_ids(self, text: str) -> list[int]:
        """See SpeechProcessor. The text is in the answer's style already."""
        return self._plain_ids([TEMPLATES[self.prompt_style].answer.format(text=text)])[0]

    def end_ids(self, generation_config: Any) -> set[int]:
        """Return the ids that end an answer: that of trained answers and those of the generation configuration."""
        return {self.target_ids("")[-1], *_as_ids(generation_config.eos_token_id)}

    def max_new_tokens(self, duration_s: float, instruction: str = DEFAULT_INSTRUCTION) -> int:
        """See SpeechProcessor: as many as the texts of the training data had, at most."""
        return max_new_tokens(duration_s, self.tokens_per_s)

    def target_ids(self, text: str, style: str | None = None) -> list[int]:
        """Tokenize the answer to train for a transcript, in a text style or the graft's own.

        Special tokens in the transcript are tokenized as text.
        """
        return self._plain_ids([self._answer(text, style)])[0] + self._answer_end_ids

    def target_lengths(self, texts: Sequence[str], styles: Sequence[str | None] | None = None) -> np.ndarray:
        """Count the ids of transcripts' answers, each in its style or, with None, in the graft's: int64 (texts,)."""
        answers = map(self._answer, texts, styles if styles is not None else itertools.repeat(None))
        return self._plain_lengths(answers) + len(self._answer_end_ids)

    def corpus_target_lengths(self, texts: Any) -> np.ndarray:
        """Count what target_lengths does, of the millions of texts of a LargeStringArray: int32 (texts,)."""
        counts = count_tokens(
            texts,
            self._plain_lengths,
            write=functools.partial(style_text, style=self.text_style),
            template=TEMPLATES[self.prompt_style].answer,
        )
        return counts + np.int32(len(self._answer_end_ids))

    def example(self, clip: AudioClip, text: str, instruction: Instruction = PLAIN_INSTRUCTION) -> Example:
        """Make the training example of a labelled clip.

        Raises AudioError for a clip over 30 s, ModelError as prompt_ids does.
        """
        return self.example_from_features(self.featurizer(clip), text, instruction)

    def example_from_features(
        self, features: Features, text: str, instruction: Instruction = PLAIN_INSTRUCTION
    ) -> Example:
        """Make the training example of a clip's features. Raises ModelError as prompt_ids does."""
        return Example(
            features, self.prompt_ids(features.frame_count, instruction.text), self.target_ids(text, instruction.style)
        )

    def training_batch(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Pad examples on the right: input_ids, attention_mask, labels (rows, length), and collate their features."""
        rows = [example.prompt_ids + (example.decoder_input_ids or example.target_ids) for example in examples]
        labels = [[IGNORED_LABEL] * len(example.prompt_ids) + example.target_ids for example in examples]
        return {
            "input_ids": _pad(rows, self._pad_id),
            "attention_mask": _pad([[1] * len(row) for row in rows], 0),
            "labels": _pad(labels, IGNORED_LABEL),
            **collate_features([example.features for example in examples]),
        }

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: AudioClip | Sequence[AudioClip] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare prompts, clips and images for generation, with rows padded on the left.

        Each `<|audio_pad|>` in a text stands for the next clip, each `<|image_pad|>` for the next image; without text
        every clip gets the transcription prompt. Raises ValueError when placeholders and clips or images differ in
        number, and for videos.
        """
        if videos is not None:
            raise ValueError("videos are not supported: pass their frames as images")
        clips = [audio] if isinstance(audio, AudioClip) else list(audio or [])
        if text is None:
            text = [prompt_text(self.prompt_style, chat=self._chat)] * len(clips)
        texts = [text] if isinstance(text, str) else list(text)
        image_inputs = dict(self.image_processor(images=images, return_tensors="pt")) if images is not None else {}
        grids = image_inputs.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.long))  # (images, time height width)
        features = [self.featurizer(clip) for clip in clips]
        for what, given, token in (("clips", len(clips), AUDIO_PAD_TOKEN), ("images", len(grids), IMAGE_TOKEN)):
            if given != (placeholders := "".join(texts).count(token)):
                raise ValueError(f"{given} {what}, but {placeholders} placeholders in the text")
        merged = self.image_processor.merge_size**2 if images is not None else 1  # patches of one image token
        image_counts = iter((grids.prod(dim=1) // merged).tolist())
        audio_counts = iter([self.audio_token_count(one.frame_count) for one in features])
        expanded = [_expand(_expand(one, AUDIO_PAD_TOKEN, audio_counts), IMAGE_TOKEN, image_counts) for one in texts]
        rows = [self.tokenizer(one, add_special_tokens=False)["input_ids"] for one in expanded]
        ids, mask = map(torch.from_numpy, pad_prompts(rows, self._pad_id))
        types = (ids == self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).int() if images is not None else None
        audio_inputs = (
            {key: torch.from_numpy(value) for key, value in collate_features(features).items()} if features else {}
        )
        vision = {**image_inputs, "mm_token_type_ids": types} if images is not None else {}
        return BatchFeature({"input_ids": ids, "attention_mask": mask, **audio_inputs, **vision})

    def _question(self, instruction: str) -> str:
        if self.prompt_style == "reference" and instruction != DEFAULT_INSTRUCTION:
            raise ModelError(
                "the reference's prompt is fixed: leave instructions and context out, "
                "or use a graft built with prompt_style=graft"
            )
        return TEMPLATES[self.prompt_style].question.format(instruction=instruction)

    def _answer(self, text: str, style: str | None) -> str:
        return TEMPLATES[self.prompt_style].answer.format(text=style_text(text, style or self.text_style))

    @cached_property
    def _chat(self) -> ChatFormat:
        return find_chat_format(self.tokenizer.get_added_vocab(), self._answer_start()) or CHATML

    def _answer_start(self) -> str:
        """Render what the language model's own chat template begins an answer without thoughts with; "" without one."""
        if not self.tokenizer.chat_template:
            return ""
        chat = [{"role": "user", "content": DEFAULT_INSTRUCTION}]
        question, prompt = (
            self.tokenizer.apply_chat_template(chat, tokenize=False, enable_thinking=False, add_generation_prompt=end)
            for end in (False, True)
        )
        return prompt.removeprefix(question) if prompt.startswith(question) else ""

    @property
    def _pad_id(self) -> int:
        """The id of padding, which is masked; Llama's tokenizers name none."""
        return self.tokenizer.pad_token_id or 0

    @cached_property
    def _prompt_parts(self) -> tuple[list[int], list[int], list[int]]:
        """Tokenize a prompt's text before the placeholders, between them and the question, and after the question."""
        template = TEMPLATES[self.prompt_style]
        texts = [self._chat.user + template.before, template.after, self._chat.prompt_end]
        before, after, end = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return before, after, end

    @cached_property
    def _answer_end_ids(self) -> list[int]:
        return self.tokenizer(self._chat.answer_end, add_special_tokens=False)["input_ids"]

    def _plain_ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)[
            "input_ids"
        ]

    def _plain_lengths(self, texts: Iterable[str]) -> np.ndarray:
        self._plain_ids([""])  # This sets the backend to no padding, no truncation and splitting of special tokens.
        encode, waiting = self.tokenizer.backend_tokenizer.encode_batch_fast, iter(texts)
        lengths: list[int] = []
        while block := list(itertools.islice(waiting, TOKENIZED_TOGETHER)):
            lengths += map(len, encode(block, add_special_tokens=False))
        return np.array(lengths, dtype=np.int64)


class TextGraftProcessor(GraftProcessor):
    """The GraftProcessor of a language model for text alone, which has no image processor."""

    # transformers saves what the signature names, and takes its processors for the parts.
    def __init__(
        self,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        audio_pool: int = 2,
        audio_context: str = "valid",
        prompt_style: str = "graft",
        text_style: str = "lower",
        trained_styles: Sequence[str] = (),
        trained_context: bool = False,
        trained_languages: Sequence[str] = (),
        tokens_per_s: float = ENGLISH_TOKENS_PER_S,
    ):
        super().__init__(
            feature_extractor,
            None,
            tokenizer,
            chat_template,
            audio_pool,
            audio_context,
            prompt_style,
            text_style,
            trained_styles,
            trained_context,
            trained_languages,
            tokens_per_s,
        )


def read_graft_processor(checkpoint: str) -> GraftProcessor:
    """Read the processor of a graft, in a folder or on the hub. Raises as read_graft_config."""
    is_text = isinstance(read_graft_config(checkpoint), TextGraftConfig)
    return (TextGraftProcessor if is_text else GraftProcessor).from_pretrained(checkpoint)


class PlainWhisperProcessor:
    """The SpeechProcessor of a plain Whisper, which writes without timestamps, in no other style than its own.

    Its prompts name the language, which a checkpoint of several languages finds out itself where it is not known.
    `generation_config` is that of the checkpoint: it says how a text begins. `max_length` is the number of tokens that
    the decoder takes, prompt included.
    """

    trained_context = False

    def __init__(self, *, mel_count: int, tokenizer: Any, generation_config: Any, max_length: int = 448) -> None:
        self.featurizer = Featurizer(mel_count)
        self.tokenizer = tokenizer
        # English-only checkpoints have no tokens of languages and tasks.
        found = getattr(generation_config, "lang_to_id", None) or {}
        self.language_ids: Mapping[str, int] = {token.strip("<|>"): index for token, index in found.items()}
        self._task = [generation_config.task_to_id["transcribe"]] if found else []
        self._start_id = generation_config.decoder_start_token_id
        self._max_length = max_length
        no_timestamps = getattr(generation_config, "no_timestamps_token_id", None)
        self._ending = [] if no_timestamps is None else [no_timestamps]

    @property
    def languages(self) -> Sequence[str]:
        """See SpeechProcessor: those that have a token, or English alone."""
        return list(self.language_ids) or ["en"]

    @property
    def start_ids(self) -> list[int]:
        """See SpeechProcessor."""
        return [self._start_id]

    def instruction(
        self, instruction: str | None = None, context: Sequence[str] | None = None, language: str | None = None
    ) -> str:
        """See SpeechProcessor: Whisper takes no instruction but `raw`, its own style, no words, and a language.

        Returns the code of the language, by default English. Raises ModelError for anything else.
        """
        request_instruction(instruction, context, text_style="raw", trained_styles=(), trained_context=False)
        return check_language(language or "en", self.languages)

    def prompt_ids(self, frame_count: int, instruction: str = "en") -> list[int]:
        """See SpeechProcessor: the start of every text in a language, which is the instruction."""
        language = [self.language_ids[instruction]] if self.language_ids else []
        return [self._start_id, *language, *self._task, *self._ending]

    def prefix_ids(self, text: str) -> list[int]:
        """See SpeechProcessor. Every text begins with a space."""
        return self.tokenizer(f" {text}", add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def end_ids(self, generation_config: Any) -> set[int]:
        """See SpeechProcessor."""
        return _as_ids(generation_config.eos_token_id)

    def max_new_tokens(self, duration_s: float, instruction: str = "en") -> int:
        """See SpeechProcessor: other languages than English have more tokens, but no more than the decoder takes."""
        if instruction == "en":
            return max_new_tokens(duration_s)
        room = self._max_length - len(self.prompt_ids(0, instruction))
        return min(max_new_tokens(duration_s, OTHER_TOKENS_PER_S), room)


def collate_features(features: Sequence[Features]) -> dict[str, np.ndarray]:
    """Pad log-mels with zeros to input_features, float32 (clips, mels, frames), with audio_frame_counts (clips,)."""
    length = max(one.mel.shape[1] for one in features)
    batch = np.zeros((len(features), features[0].mel.shape[0], length), dtype=np.float32)
    for row, one in zip(batch, features, strict=True):
        row[:, : one.mel.shape[1]] = one.mel
    return {
        "input_features": batch,
        "audio_frame_counts": np.array([one.frame_count for one in features], dtype=np.int64),
    }


def pad_prompts(rows: Sequence[list[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad prompts on the left: ids and attention mask, both int64 (rows, length)."""
    return _pad(rows, pad_id, left=True), _pad([[1] * len(row) for row in rows], 0, left=True)


def _as_ids(ids: int | Sequence[int] | None) -> set[int]:
    return {ids} if isinstance(ids, int) else set(ids or ())


def _pad(rows: Sequence[list[int]], value: int, *, left: bool = False) -> np.ndarray:
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[slice(-len(row), None) if left else slice(len(row))] = row
    return padded


def _expand(text: str, token: str, counts: Iterator[int]) -> str:
    """Repeat every placeholder in a text as often as the next count says."""
    first, *others = text.split(token)
    return first + "".join(token * next(counts) + piece for piece in others)


AutoProcessor.register(GraftConfig, GraftProcessor)
AutoProcessor.register(TextGraftConfig, TextGraftProcessor)
