"""The transformers engine returns the tokens of generate in any batch, while rows join and leave: graft and Whisper."""

import asyncio
import contextlib
import itertools
import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    WhisperFeatureExtractor,
)

from graft.audio.clip import read_audio
from graft.audio.features import Features
from graft.checkpoints.build import build_graft
from graft.checkpoints.bundled.cache import bundled_qwen2vl, bundled_whisper
from graft.checkpoints.whisper import open_whisper
from graft.inference.engines.graft_decoder import GraftDecoder
from graft.inference.engines.kv_cache import COLUMNS
from graft.inference.engines.protocol import EngineCounts, EngineRequest, Token
from graft.inference.engines.sampling import choose_tokens, has_repeated_ngram, repeating_ids
from graft.inference.engines.scheduler import ENCODER_ROWS
from graft.inference.engines.transformers_engine import TransformersEngine
from graft.inference.engines.whisper_decoder import WhisperDecoder
from graft.model.configuration import WINDOW_FRAMES
from graft.model.encoder import pad_with_silence
from tests.support import tiny_models
from tests.support.paths import ROOT

PROMPTS = ROOT / "jobs" / "data" / "prompts"
PLACEHOLDERS = [100, 101, 102, 103, 110, 111, 112]
VARIANTS = [
    {"audio_pool": 2, "audio_context": "valid"},
    {"audio_pool": 4, "audio_context": "trim"},
    {"audio_pool": 1, "audio_context": "full"},
]
FRAME_COUNTS = [37, 250, 8, 120, 121]


@dataclass(frozen=True)
class Kind:
    """A kind of model that the engine runs: how a tiny one is made and asked, and where its parts are."""

    decoder: Any
    layer: str
    """Name of a module that all tokens pass: (rows, length, width)."""
    conv: str
    head: str

    def model(self, **audio):
        if self is WHISPER:
            return tiny_models.whisper_for_generation()
        model = tiny_models.pay_attention(tiny_models.graft_model(**audio))
        model.generation_config.suppress_tokens = PLACEHOLDERS
        return model

    def request(self, model, index, frame_count, *, max_new_tokens=12) -> EngineRequest:
        features, _ = tiny_models.log_mels([frame_count], seed=index)
        text = [7, 8, 9] + [10 + index % 5] * (index % 3)
        prompt = text if self is WHISPER else tiny_models.prompt(model, frame_count, text)
        return EngineRequest(f"r{index}", Features(features[0].numpy(), frame_count), prompt, max_new_tokens)

    def inputs(self, request: EngineRequest) -> dict[str, torch.Tensor]:
        """Return what transformers' own generate takes for a request."""
        ids, mel = torch.tensor([request.prompt_ids]), torch.from_numpy(request.features.mel)[None]
        count = torch.tensor([request.features.frame_count])
        if self is WHISPER:
            return {"decoder_input_ids": ids, "input_features": pad_with_silence(mel, count, WINDOW_FRAMES)}
        return {"input_ids": ids, "input_features": mel, "audio_frame_counts": count}


GRAFT = Kind(GraftDecoder, "model.language_model.layers.1.mlp", "audio_tower.conv1", "lm_head")
WHISPER = Kind(WhisperDecoder, "model.decoder.layers.0.fc1", "model.encoder.conv1", "proj_out")
BUDGETS = {"max_batch_tokens": 40 * (WINDOW_FRAMES // 2 + COLUMNS), "max_prefill_tokens": 40 * WINDOW_FRAMES}
"""Budgets of forty rows of a Whisper, as the default ones are of as many rows of a graft or more."""
BOTH = pytest.mark.parametrize("kind", [GRAFT, WHISPER], ids=["graft", "whisper"])


class AnswerOnly(LogitsProcessor):
    """Passes only the answer's tokens to a processor, which is not called for the first of them."""

    def __init__(self, processor: LogitsProcessor, prompt_length: int) -> None:
        self.processor, self.prompt_length = processor, prompt_length

    def __call__(self, input_ids, scores):
        answer = input_ids[:, self.prompt_length :]
        return self.processor(answer, scores) if answer.shape[1] else scores


def kind_of(model) -> Kind:
    return GRAFT if hasattr(model, "audio_tower") else WHISPER


def generated(model, request, eos_ids=()) -> tuple[list[int], list[float]]:
    """Return the answer of transformers' own greedy decoding to this request alone: ids and log-probabilities."""
    blocking = [NoRepeatNGramLogitsProcessor(request.no_repeat_ngram)] if request.no_repeat_ngram else []
    output = GenerationMixin.generate(  # Whisper's own generate calls it with a prompt that it chooses
        model,
        **kind_of(model).inputs(request),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=0,
        suppress_tokens=model.generation_config.suppress_tokens,
        begin_suppress_tokens=model.generation_config.begin_suppress_tokens,
        logits_processor=LogitsProcessorList([AnswerOnly(one, len(request.prompt_ids)) for one in blocking]),
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids = output.sequences[0, len(request.prompt_ids) :].tolist()
    suppressed = torch.tensor(model.generation_config.suppress_tokens)
    first = torch.tensor([*suppressed, *(model.generation_config.begin_suppress_tokens or [])])
    logprobs = [
        logits[0].index_fill(0, suppressed if place else first, float("-inf")).log_softmax(-1)[id].item()
        for place, (id, logits) in enumerate(zip(ids, output.logits, strict=True))
    ]
    end = len(ids) - 1 if ids[-1] in eos_ids else len(ids)
    return ids[:end], logprobs[:end]


async def collect(engine, request) -> list[Token]:
    return [token async for token in engine.stream(request)]


async def some(stream, count: int) -> list[Token]:
    """Return the first tokens of a stream, or all of a shorter one."""
    tokens = []
    while len(tokens) < count and (token := await anext(stream, None)) is not None:
        tokens.append(token)
    return tokens


async def collect_all(engine, requests):
    return await asyncio.gather(*(collect(engine, request) for request in requests), return_exceptions=True)


@contextlib.contextmanager
def running(model, *, eos_ids=(), graphs=None, **budgets):
    budgets = (BUDGETS if kind_of(model) is WHISPER else {}) | budgets
    engine = TransformersEngine(kind_of(model).decoder(model, pad_id=0, graphs=graphs), eos_ids=eos_ids, **budgets)
    try:
        yield engine
    finally:
        engine.close()


def watch_rows(model) -> tuple[list[int], list[int]]:
    """Record the number of rows of every forward pass, and the number of clips of every encoding."""
    rows, clips = [], []
    for counts, name in ((rows, kind_of(model).head), (clips, kind_of(model).conv)):
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, __, counts=counts: counts.append(inputs[0].shape[0])
        )
    return rows, clips


@pytest.mark.seconds
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant["audio_context"])
def test_tokens_and_logprobs_equal_generate_in_a_batch_and_alone(variant):
    model = GRAFT.model(**variant)
    requests = [GRAFT.request(model, index, count) for index, count in enumerate(FRAME_COUNTS)]
    # Ending tokens from the middle of two answers: rows end at different steps.
    eos_ids = {generated(model, requests[0])[0][3], generated(model, requests[1])[0][7]}
    expected = [generated(model, request, eos_ids) for request in requests]
    assert len({len(ids) for ids, _ in expected}) > 1
    rows, clips = watch_rows(model)
    with running(model, eos_ids=eos_ids, max_prefill_tokens=16_384) as engine:
        together = asyncio.run(collect_all(engine, requests))
        assert rows[0] == len(requests)
        assert rows == sorted(rows, reverse=True)
        assert rows[-1] < len(requests)
        assert clips == [len(requests)]
        alone = [asyncio.run(collect(engine, request)) for request in requests]
    for tokens, single, (ids, logprobs) in zip(together, alone, expected, strict=True):
        assert [token.id for token in tokens] == [token.id for token in single] == ids
        assert_close(tokens, logprobs)


def assert_close(tokens, logprobs) -> None:
    torch.testing.assert_close([token.logprob for token in tokens], logprobs, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def crowd(request):
    """A model, requests of mixed lengths, some with blocked n-grams, the ids that end answers, generate's answers."""
    kind, count = request.param
    model = kind.model()
    mixed = random.Random(0)
    requests = []
    for index in range(count):
        frame_count = mixed.choice([mixed.randint(8, 60), mixed.randint(60, 400), mixed.randint(400, 1100)])
        one = kind.request(model, index, frame_count, max_new_tokens=mixed.choice([1, 2, 10, 25, 40]))
        requests.append(replace(one, no_repeat_ngram=mixed.choice([0, 0, 1, 2, 4])))
    # Ids from the middle of some answers end those of others.
    eos_ids = {generated(model, requests[index])[0][-1] for index in (3, 11)}
    return model, requests, eos_ids, [generated(model, request, eos_ids) for request in requests]


async def come_and_go(engine, requests, seed) -> dict[str, list[Token]]:
    """Send requests in random order, 3 to 20 at a time, and abort and repeat some; returns the whole answers by id."""
    generator = random.Random(seed)
    order = generator.sample(requests, len(requests))
    answers = {}

    async def send(number, request) -> None:
        others_first = number - generator.randint(3, 20)
        while len(answers) < others_first:
            await asyncio.sleep(0.001)
        if generator.random() < 0.25:
            async with contextlib.aclosing(engine.stream(request)) as stream:
                await some(stream, generator.randint(0, 6))
        elif generator.random() < 0.1:
            waiting = asyncio.create_task(collect(engine, request))
            await asyncio.sleep(generator.uniform(0, 0.02))
            waiting.cancel()
            await asyncio.wait([waiting])
        answers[request.request_id] = await collect(engine, request)

    await asyncio.gather(*map(send, range(len(order)), order))
    return answers


CROWD_RUNS = [(0, False, 0), (1, False, 0.01), (2, True, 0), (3, True, 0.01)]
"""Seed, graphs and gather_s."""


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("crowd", "seed", "graphs", "gather_s"),
    [((GRAFT, 44), *run) for run in CROWD_RUNS] + [((WHISPER, 24), *run) for run in CROWD_RUNS[1:3]],
    indirect=["crowd"],
)
def test_tokens_equal_generate_while_rows_join_and_leave(crowd, seed, graphs, gather_s):
    model, requests, eos_ids, expected = crowd
    rows, _ = watch_rows(model)
    window = WINDOW_FRAMES // 2 if kind_of(model) is WHISPER else 0
    budgets = {"max_batch_tokens": 9 * (window + COLUMNS), "max_prefill_tokens": 2 * window + 400}
    with running(model, eos_ids=eos_ids, graphs=graphs, gather_s=gather_s, **budgets) as engine:
        answers = asyncio.run(come_and_go(engine, requests, seed))
        assert (engine.counts().running, engine.counts().waiting) == (0, 0)
    for request, (ids, logprobs) in zip(requests, expected, strict=True):
        assert [token.id for token in answers[request.request_id]] == ids
        assert_close(answers[request.request_id], logprobs)
    assert len({len(ids) for ids, _ in expected}) > 4
    joins = sum(later > earlier for earlier, later in itertools.pairwise(rows))
    assert joins > 5
    assert max(rows) >= 4


@pytest.mark.seconds
@BOTH
def test_n_grams_are_blocked_by_row_and_log_probabilities_stay(kind):
    model = kind.model()
    requests = [kind.request(model, index, 100 + index, max_new_tokens=40) for index in range(6)]
    mixed = [replace(request, no_repeat_ngram=index % 3) for index, request in enumerate(requests)]
    plain, expected = (
        [generated(model, request) for request in requests],
        [generated(model, request) for request in mixed],
    )
    with running(model, gather_s=0.05) as engine:
        answers = asyncio.run(collect_all(engine, mixed))
    for index, (tokens, (ids, logprobs)) in enumerate(zip(answers, expected, strict=True)):
        assert [token.id for token in tokens] == ids
        assert_close(tokens, logprobs)
        assert (ids == plain[index][0]) is not (index % 3 and has_repeated_ngram(plain[index][0], index % 3))
        assert not index % 3 or not has_repeated_ngram(ids, index % 3)
    assert sum(has_repeated_ngram(ids, 2) for ids, _ in plain) > 3  # tiny random models do loop


def test_ids_that_would_repeat_an_n_gram():
    assert repeating_ids([1, 2, 3, 1, 2, 4, 1, 2], 3) == [3, 4]
    assert repeating_ids([1, 2, 1], 1) == [1, 2, 1]
    assert repeating_ids([1, 1], 2) == [1]
    assert repeating_ids([1, 2], 3) == repeating_ids([], 1) == repeating_ids([1, 1, 1], 0) == []
    assert has_repeated_ngram([1, 2, 3, 1, 2], 2)
    assert not has_repeated_ngram([1, 2, 3, 1, 2], 3)
    assert not has_repeated_ngram([], 5)


def test_blocked_ids_keep_their_probability_and_suppressed_ids_have_none():
    ids, logprobs = choose_tokens(
        torch.tensor([[1.0, 2.0, 0.0, 9.0], [1.0, 2.0, 0.0, 9.0]]), torch.tensor([3]), {1: [1]}
    )
    assert ids == [1, 0]
    assert logprobs == pytest.approx(torch.tensor([1.0, 2.0, 0.0]).log_softmax(-1)[[1, 0]].tolist())


@BOTH
def test_a_prefix_of_the_answer_is_continued_as_the_answer_goes_on(kind):
    model = kind.model()
    requests = [
        replace(kind.request(model, index, count), no_repeat_ngram=2 * (index % 2))
        for index, count in enumerate(FRAME_COUNTS)
    ]
    # A token that no answer may begin with follows later in one: only first tokens are concerned.
    late = generated(model, requests[0])[0][6]
    model.generation_config.begin_suppress_tokens = [late]
    answers = [generated(model, request) for request in requests]
    assert any(late in ids[1:] for ids, _ in answers)
    given = [(index, count) for index in range(len(requests)) for count in (0, 1, 5, 6, 11)]
    mixed = [
        replace(requests[index], request_id=f"{index}-{count}", prefix_ids=tuple(answers[index][0][:count]))
        for index, count in given
    ]
    with running(model, gather_s=0.05) as engine:
        rest = asyncio.run(collect_all(engine, mixed))
    for (index, count), tokens in zip(given, rest, strict=True):
        ids, logprobs = answers[index]
        assert [token.id for token in tokens] == ids[count:]
        assert_close(tokens, logprobs[count:])


@BOTH
def test_another_prefix_is_read_as_the_end_of_the_prompt(kind):
    model = kind.model()
    request = kind.request(model, 0, 60)
    other = (5, 6, 7)
    asked = replace(request, prompt_ids=[*request.prompt_ids, *other], max_new_tokens=12 - len(other))
    with running(model) as engine:
        tokens = asyncio.run(collect(engine, replace(request, prefix_ids=other)))
        assert [token.id for token in tokens] == generated(model, asked)[0] != generated(model, request)[0][3:]
        with pytest.raises(ValueError, match="the prefix has 12 tokens, and the answer may have 12"):
            asyncio.run(collect(engine, replace(request, prefix_ids=(5,) * 12)))


@BOTH
def test_max_new_tokens_holds_for_each_row(kind):
    model = kind.model()
    requests = [kind.request(model, index, 60, max_new_tokens=count) for index, count in enumerate([1, 5, 3])]
    with running(model) as engine:
        answers = asyncio.run(collect_all(engine, requests))
    assert [len(tokens) for tokens in answers] == [1, 5, 3]


@BOTH
def test_suppressed_ids_are_never_chosen(kind):
    model = kind.model()
    request = kind.request(model, 0, 60)
    with running(model) as engine:
        first = asyncio.run(collect(engine, request))[0].id
    model.generation_config.suppress_tokens = [*model.generation_config.suppress_tokens, first]
    with running(model) as engine:
        assert first not in {token.id for token in asyncio.run(collect(engine, request))}


def test_batches_keep_to_the_token_budget_and_rows_of_similar_length_share_them():
    model = GRAFT.model()
    requests = [
        GRAFT.request(model, index, count, max_new_tokens=4) for index, count in enumerate([40, 800, 44, 804, 2000])
    ]
    expected = [generated(model, request)[0] for request in requests]
    rows, clips = watch_rows(model)
    with running(model, max_batch_tokens=4 * COLUMNS, gather_s=0.05) as engine:
        answers = asyncio.run(collect_all(engine, requests))
    assert (clips, max(rows)) == ([2, 2, 1], 2)
    assert [[token.id for token in tokens] for tokens in answers] == expected


def test_between_two_prefills_there_is_a_step_and_no_prefill_is_over_its_budget():
    model = GRAFT.model()
    requests = [GRAFT.request(model, index, 200 + index, max_new_tokens=20) for index in range(12)]
    rows, clips = watch_rows(model)
    longest = max(len(request.prompt_ids) for request in requests)
    with running(model, max_prefill_tokens=2 * longest, gather_s=0.05) as engine:
        asyncio.run(collect_all(engine, requests))
    assert clips == [2] * 6
    assert rows[:12] == [2, 2, 2, 4, 2, 6, 2, 8, 2, 10, 2, 12]  # prefill, step, prefill, step, ...


def test_the_row_that_has_waited_longest_is_next_even_where_others_would_fit():
    model = GRAFT.model()
    short = [GRAFT.request(model, index, 40, max_new_tokens=60) for index in range(12)]
    long = GRAFT.request(model, 12, 1100, max_new_tokens=60)
    order = []

    async def send(engine, request) -> None:
        async with contextlib.aclosing(engine.stream(request)) as stream:
            async for _ in stream:
                order.append(request.request_id)
                break

    async def run(engine):
        first = [asyncio.create_task(collect(engine, request)) for request in short[:3]]
        while engine.counts().running < 3:
            await asyncio.sleep(0.001)
        await asyncio.gather(*first, *(send(engine, request) for request in [long, *short[3:]]))

    with running(model, max_batch_tokens=4 * COLUMNS, max_prefill_tokens=1) as engine:
        asyncio.run(run(engine))
    assert order[0] == long.request_id


def test_slots_shrink_to_the_rows_that_are_left():
    model = GRAFT.model()
    short, long = GRAFT.request(model, 0, 40, max_new_tokens=200), GRAFT.request(model, 1, 2000, max_new_tokens=3)
    expected = [generated(model, request)[0] for request in (short, long)]
    columns = []

    async def run(engine):
        model.lm_head.register_forward_hook(lambda *_: columns.append(engine._decoder.slots.columns))
        first = asyncio.create_task(collect(engine, short))
        while engine.counts().steps < 5:
            await asyncio.sleep(0.001)
        return await asyncio.gather(first, collect(engine, long))

    with running(model) as engine:
        answers = asyncio.run(run(engine))
    assert [[token.id for token in tokens] for tokens in answers] == expected
    assert [size for size, _ in itertools.groupby(columns)] == [COLUMNS, 4 * COLUMNS, COLUMNS, 2 * COLUMNS]


@BOTH
def test_counts(kind):
    model = kind.model()
    requests = [kind.request(model, index, 60, max_new_tokens=5 + index) for index in range(3)]
    with running(model, gather_s=0.05) as engine:
        assert engine.counts() == EngineCounts(0, 0, 0, 0, 0, 0.0)
        asyncio.run(collect_all(engine, requests))
    counts = engine.counts()
    assert replace(counts, busy_s=0) == EngineCounts(running=0, waiting=0, prefills=1, steps=6, tokens=18, busy_s=0)
    assert counts.busy_s > 0


@pytest.mark.seconds
@BOTH
def test_many_clips_are_encoded_in_parts(kind):
    model = kind.model()
    requests = [kind.request(model, index, 30 + index, max_new_tokens=2) for index in range(ENCODER_ROWS + 3)]
    rows, clips = watch_rows(model)
    with running(model, gather_s=0.05) as engine:
        answers = asyncio.run(collect_all(engine, requests))
    assert (rows, clips) == ([ENCODER_ROWS, ENCODER_ROWS, 3, 3], [ENCODER_ROWS, 3])
    assert [[token.id for token in tokens] for tokens in answers] == [
        generated(model, request)[0] for request in requests
    ]


@pytest.mark.seconds
@BOTH
def test_an_aborted_row_leaves_the_batch_and_the_others_go_on(kind):
    model = kind.model()
    requests = [kind.request(model, index, 60 + 10 * index, max_new_tokens=200) for index in range(3)]
    expected = [generated(model, request)[0] for request in requests]
    rows, _ = watch_rows(model)

    async def run(engine):
        async def abort_after_three():
            async with contextlib.aclosing(engine.stream(requests[0])) as stream:
                return [token.id for token in await some(stream, 3)]

        async def abort_by_id():
            tokens = []
            async for token in engine.stream(requests[1]):
                tokens.append(token.id)
                if len(tokens) == 5:
                    engine.abort(requests[1].request_id)
            return tokens

        return await asyncio.gather(abort_after_three(), abort_by_id(), collect(engine, requests[2]))

    with running(model) as engine:
        broken_off, aborted, whole = asyncio.run(run(engine))
        again = asyncio.run(collect(engine, requests[0]))
    assert broken_off == expected[0][:3]
    assert aborted == expected[1][: len(aborted)]
    assert len(aborted) < 200
    assert [token.id for token in whole] == expected[2]
    assert [token.id for token in again] == expected[0]
    assert rows[0] == 3
    assert rows.count(3) < 100
    assert rows.count(1) >= 100


@BOTH
def test_a_waiting_request_that_is_cancelled_is_never_decoded(kind):
    model = kind.model()
    requests = [kind.request(model, index, 60, max_new_tokens=300) for index in range(2)]
    _, clips = watch_rows(model)

    async def run(engine):
        first = asyncio.create_task(collect(engine, requests[0]))
        while not clips:
            await asyncio.sleep(0.005)
        second = asyncio.create_task(collect(engine, requests[1]))
        await asyncio.sleep(0.01)
        second.cancel()
        return await first

    with running(model, max_batch_tokens=1) as engine:
        assert len(asyncio.run(run(engine))) == 300
        assert clips == [1]


@BOTH
def test_an_error_of_one_clip_ends_that_row_alone(kind):
    model = kind.model()
    requests = [kind.request(model, index, 60 + index) for index in range(5)]
    expected = [generated(model, request)[0] for request in requests]
    if kind is GRAFT:
        requests[2] = replace(requests[2], prompt_ids=[*requests[2].prompt_ids, tiny_models.AUDIO_ID])
    else:
        requests[2] = replace(requests[2], features=Features(requests[2].features.mel[:40], 62))
    with running(model, gather_s=0.05) as engine:
        answers = asyncio.run(collect_all(engine, requests))
        assert isinstance(answers[2], ValueError if kind is GRAFT else RuntimeError)
        fault = "16 audio placeholders in input_ids, but 15 audio tokens" if kind is GRAFT else "to have 80 channels"
        assert fault in str(answers[2])
        assert [[token.id for token in tokens] for tokens in answers[:2] + answers[3:]] == expected[:2] + expected[3:]


@pytest.mark.seconds
@BOTH
@pytest.mark.parametrize("graphs", [False, True])
def test_an_error_in_a_step_ends_only_the_rows_that_it_concerns(kind, graphs):
    model = kind.model()
    requests = [kind.request(model, index, 60 + 9 * index, max_new_tokens=30) for index in range(10)]
    expected = {request.request_id: generated(model, request) for request in requests}
    ((bad_id, _),) = Counter(id for ids, _ in expected.values() for id in set(ids[:-1])).most_common()[-1:]
    # Rows that fail come last: the others are decoded in halves and quarters of the batch.
    requests.sort(key=lambda request: bad_id in expected[request.request_id][0])
    fine = [request for request in requests if bad_id not in expected[request.request_id][0][:-1]]
    assert 5 < len(fine) < len(requests)

    def fail(_, inputs) -> None:
        if inputs[0].shape[1] == 1 and bad_id in inputs[0]:
            raise ValueError("a bad token")

    model.get_input_embeddings().register_forward_pre_hook(fail)
    with running(model, gather_s=0.05, graphs=graphs) as engine:
        answers = asyncio.run(collect_all(engine, requests))
        again = asyncio.run(collect_all(engine, fine))
    assert all("a bad token" in str(answer) for answer in answers[len(fine) :])
    for request, *both in zip(fine, answers, again, strict=False):
        for tokens in both:
            assert [token.id for token in tokens] == expected[request.request_id][0]
            assert_close(tokens, expected[request.request_id][1])


@pytest.mark.seconds
@BOTH
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate")]
)
def test_without_memory_halves_are_tried_and_a_row_too_large_alone_ends_with_an_error(kind, error):
    model = kind.model()
    requests = [kind.request(model, index, 60 + index) for index in range(5)]
    expected = [generated(model, request)[0] for request in requests]
    huge = kind.request(model, 5, 900)
    if kind is WHISPER:
        huge = replace(huge, prompt_ids=[7] * 200)

    def fail(_, inputs) -> None:
        rows, length, _ = inputs[0].shape
        if rows > 2 or rows * length > 150:
            raise error

    model.get_submodule(kind.layer).register_forward_pre_hook(fail)
    with running(model, gather_s=0.05) as engine:
        *answers, failed = asyncio.run(collect_all(engine, [*requests, huge]))
    assert [[token.id for token in tokens] for tokens in answers] == expected
    assert isinstance(failed, MemoryError)
    budget = 16384 if kind is GRAFT else BUDGETS["max_batch_tokens"]
    assert str(failed) == f"not enough memory for one request: lower max_batch_tokens, now {budget}"
    assert failed.__cause__ is error


@BOTH
def test_an_error_outside_the_model_ends_all_streams_and_the_engine_goes_on(kind):
    model = kind.model()
    requests = [kind.request(model, index, 60, max_new_tokens=8 + index) for index in range(3)]
    with running(model, gather_s=0.05) as engine:
        keep = engine._decoder.slots.keep

        def lose(kept):
            if kept:
                raise IndexError("lost")
            return keep(kept)

        engine._decoder.slots.keep = lose
        first, *others = asyncio.run(collect_all(engine, requests))
        assert len(first) == 8
        assert [str(error) for error in others] == ["lost", "lost"]
        engine._decoder.slots.keep = keep
        assert [token.id for token in asyncio.run(collect(engine, requests[2]))] == generated(model, requests[2])[0]


@BOTH
def test_an_id_that_is_under_way_is_refused(kind):
    model = kind.model()
    request = kind.request(model, 0, 60)
    with running(model, gather_s=0.05) as engine:
        first, second = asyncio.run(collect_all(engine, [request, request]))
    assert len(first) == 12
    assert isinstance(second, ValueError)


@BOTH
def test_a_closed_engine_ends_its_streams_with_an_error(kind):
    model = kind.model()
    engine = TransformersEngine(kind.decoder(model, pad_id=0), eos_ids=())
    requests = [kind.request(model, index, 60, max_new_tokens=440) for index in range(2)]

    async def run():
        async for _ in engine.stream(requests[0]):
            await asyncio.to_thread(engine.close)

    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(run())
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(collect(engine, requests[1]))


def test_a_whispers_rows_keep_to_the_budgets_with_their_windows():
    model = WHISPER.model()
    requests = [WHISPER.request(model, index, 60, max_new_tokens=20) for index in range(7)]
    expected = [generated(model, request)[0] for request in requests]
    rows, clips = watch_rows(model)
    row = WINDOW_FRAMES // 2 + COLUMNS
    with running(model, max_batch_tokens=3 * row + 50, max_prefill_tokens=2 * row, gather_s=0.05) as engine:
        answers = asyncio.run(collect_all(engine, requests))
        tokens = engine._decoder.slots.windows[0].shape[0]
    assert (clips, max(rows), tokens) == ([2, 1, 2, 1, 1], 3, 3)
    assert [[token.id for token in tokens] for tokens in answers] == expected


def test_an_answer_that_a_whisper_has_no_positions_for_is_refused():
    model = WHISPER.model()
    request = WHISPER.request(model, 0, 60, max_new_tokens=446)
    with running(model) as engine:
        assert len(asyncio.run(collect(engine, replace(request, max_new_tokens=445)))) == 445
        with pytest.raises(ValueError, match="prompt and answer may have 449 tokens: the model takes 448"):
            asyncio.run(collect(engine, request))
        assert engine.counts().waiting == 0


def test_what_may_not_begin_an_answer_may_come_later():
    model = WHISPER.model()
    request = WHISPER.request(model, 0, 60, max_new_tokens=60)
    ids, _ = generated(model, request)
    assert ids[0] in ids[1:]
    model.generation_config.begin_suppress_tokens = [ids[0]]
    expected, logprobs = generated(model, request)
    with running(model) as engine:
        tokens = asyncio.run(collect(engine, request))
    assert [token.id for token in tokens] == expected
    assert_close(tokens, logprobs)
    assert expected[0] != ids[0] in expected


@pytest.mark.slow
@pytest.mark.bundled
def test_on_bundled_weights_tokens_equal_those_of_whispers_own_generate():
    """It takes audio through transformers' extractor, and begins the text by itself."""
    model, processor = open_whisper(bundled_whisper())
    extractor = WhisperFeatureExtractor.from_pretrained(bundled_whisper())
    rows = [json.loads(line) for line in (PROMPTS / "train.jsonl").read_text().splitlines()[:12]]
    clips = [read_audio(PROMPTS / row["audio"]) for row in rows]
    requests, expected = [], []
    for index, clip in enumerate(clips):
        features = processor.featurizer(clip)
        requests.append(EngineRequest(f"r{index}", features, processor.prompt_ids(features.frame_count), 60))
        mel = extractor(clip.samples, sampling_rate=16_000, return_tensors="pt").input_features
        ids = model.generate(mel, language="en", task="transcribe", do_sample=False, max_new_tokens=60)[0].tolist()
        expected.append([id for id in ids if id < 50257])  # without the ids that begin and end a text
    assert all(len(ids) > 2 for ids in expected)
    with running(model, eos_ids=processor.end_ids(model.generation_config), max_prefill_tokens=3_100) as engine:
        answers = asyncio.run(come_and_go(engine, requests, seed=0))
    for request, ids in zip(requests, expected, strict=True):
        assert [token.id for token in answers[request.request_id]] == ids
        end_ids = processor.end_ids(model.generation_config)
        assert_close(answers[request.request_id], generated(model, request, end_ids)[1])


@pytest.mark.slow
@pytest.mark.bundled
def test_on_bundled_weights_tokens_equal_generate_while_rows_join_and_leave():
    model, processor = build_graft(str(bundled_whisper()), str(bundled_qwen2vl()))
    rows = [json.loads(line) for line in (PROMPTS / "train.jsonl").read_text().splitlines()[:16]]
    requests = []
    for index, row in enumerate(rows):
        features = processor.featurizer(read_audio(PROMPTS / row["audio"]))
        prompt_ids = processor.prompt_ids(features.frame_count)
        requests.append(EngineRequest(f"r{index}", features, prompt_ids, 8 + index, no_repeat_ngram=3 * (index % 2)))
    eos_ids = set(model.generation_config.eos_token_id)
    expected = [generated(model, request, eos_ids) for request in requests]
    with running(model, eos_ids=eos_ids, max_batch_tokens=8 * COLUMNS, max_prefill_tokens=300, gather_s=0) as engine:
        answers = asyncio.run(come_and_go(engine, requests, seed=0))
    for request, (ids, logprobs) in zip(requests, expected, strict=True):
        assert [token.id for token in answers[request.request_id]] == ids
        assert_close(answers[request.request_id], logprobs)
