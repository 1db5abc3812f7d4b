"""The transformers engine on tiny random weights: generate's tokens, whoever shares the batch, and rows that leave it."""

import asyncio
import contextlib

import pytest
import tiny
import torch

from graft.engines import EngineRequest, Token
from graft.engines.transformers_engine import ENCODER_ROWS, TransformersEngine
from graft.features import Features

PLACEHOLDERS = [100, 101, 102, 103, 110, 111, 112]
VARIANTS = [
    {"audio_pool": 2, "audio_context": "valid"},
    {"audio_pool": 4, "audio_context": "trim"},
    {"audio_pool": 1, "audio_context": "full"},
]
FRAME_COUNTS = [37, 250, 8, 120, 121]


def make_model(**audio):
    model = tiny.graft_model(**audio)
    model.generation_config.suppress_tokens = PLACEHOLDERS
    return model


def make_request(model, index, frame_count, *, max_new_tokens=12) -> EngineRequest:
    features, _ = tiny.log_mels([frame_count], seed=index)
    text = [7, 8, 9] + [10 + index % 5] * (index % 3)
    return EngineRequest(f"r{index}", Features(features[0].numpy(), frame_count), tiny.prompt(model, frame_count, text), max_new_tokens)


def generated(model, request, eos_ids=()) -> tuple[list[int], list[float]]:
    """What transformers' own generate answers to this request alone."""
    output = model.generate(
        input_ids=torch.tensor([request.prompt_ids]),
        input_features=torch.from_numpy(request.features.mel)[None],
        audio_frame_counts=torch.tensor([request.features.frame_count]),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=0,
        suppress_tokens=PLACEHOLDERS,
        return_dict_in_generate=True,
        output_scores=True,
    )
    ids = output.sequences[0, len(request.prompt_ids) :].tolist()
    logprobs = [scores[0].log_softmax(-1)[id].item() for id, scores in zip(ids, output.scores, strict=True)]
    end = len(ids) - 1 if ids[-1] in eos_ids else len(ids)
    return ids[:end], logprobs[:end]


async def collect(engine, request) -> list[Token]:
    return [token async for token in engine.stream(request)]


async def collect_all(engine, requests):
    return await asyncio.gather(*(collect(engine, request) for request in requests), return_exceptions=True)


@contextlib.contextmanager
def running(model, *, eos_ids=(), **options):
    engine = TransformersEngine(model, pad_id=0, eos_ids=eos_ids, **options)
    try:
        yield engine
    finally:
        engine.close()


def watch_rows(model) -> tuple[list[int], list[int]]:
    """Row counts of every forward pass, and clip counts of every encoding, as they come."""
    rows, clips = [], []
    model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    model.audio_tower.conv1.register_forward_hook(lambda _, inputs, __: clips.append(inputs[0].shape[0]))
    return rows, clips


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant["audio_context"])
def test_tokens_and_logprobs_equal_generate_in_a_batch_and_alone(variant):
    model = make_model(**variant)
    requests = [make_request(model, index, count) for index, count in enumerate(FRAME_COUNTS)]
    # Ending tokens from the middle of two answers: rows end at different steps.
    eos_ids = {generated(model, requests[0])[0][3], generated(model, requests[1])[0][7]}
    expected = [generated(model, request, eos_ids) for request in requests]
    assert len({len(ids) for ids, _ in expected}) > 1
    rows, clips = watch_rows(model)
    with running(model, eos_ids=eos_ids) as engine:
        together = asyncio.run(collect_all(engine, requests))
        assert rows[0] == len(requests)
        assert rows == sorted(rows, reverse=True)
        assert rows[-1] < len(requests)
        assert clips == [len(requests)]
        alone = [asyncio.run(collect(engine, request)) for request in requests]
    for tokens, single, (ids, logprobs) in zip(together, alone, expected, strict=True):
        assert [token.id for token in tokens] == [token.id for token in single] == ids
        torch.testing.assert_close([token.logprob for token in tokens], logprobs, rtol=0, atol=1e-4)


def test_max_new_tokens_is_each_rows_own():
    model = make_model()
    requests = [make_request(model, index, 60, max_new_tokens=count) for index, count in enumerate([1, 5, 3])]
    with running(model) as engine:
        answers = asyncio.run(collect_all(engine, requests))
    assert [len(tokens) for tokens in answers] == [1, 5, 3]


def test_suppressed_ids_never_come():
    model = make_model()
    request = make_request(model, 0, 60)
    with running(model) as engine:
        first = asyncio.run(collect(engine, request))[0].id
    model.generation_config.suppress_tokens = [*PLACEHOLDERS, first]
    with running(model) as engine:
        assert first not in {token.id for token in asyncio.run(collect(engine, request))}


def test_batches_keep_to_the_token_budget_and_rows_of_like_length_share_them():
    model = make_model()
    requests = [make_request(model, index, count, max_new_tokens=4) for index, count in enumerate([40, 400, 44, 404, 2000])]
    expected = [generated(model, request)[0] for request in requests]
    _, clips = watch_rows(model)
    longest = max(len(request.prompt_ids) + 4 for request in requests[:4])
    with running(model, max_batch_tokens=2 * longest, gather_s=0.05) as engine:
        answers = asyncio.run(collect_all(engine, requests))
    assert clips == [2, 2, 1]
    assert [[token.id for token in tokens] for tokens in answers] == expected


def test_many_clips_are_encoded_in_parts():
    model = make_model()
    requests = [make_request(model, index, 30 + index, max_new_tokens=2) for index in range(ENCODER_ROWS + 3)]
    rows, clips = watch_rows(model)
    with running(model, gather_s=0.05) as engine:
        answers = asyncio.run(collect_all(engine, requests))
    assert (rows[0], clips) == (ENCODER_ROWS + 3, [ENCODER_ROWS, 3])
    assert [[token.id for token in tokens] for tokens in answers] == [generated(model, request)[0] for request in requests]


def test_an_aborted_row_leaves_the_batch_and_the_others_go_on():
    model = make_model()
    requests = [make_request(model, index, 60 + 10 * index, max_new_tokens=400) for index in range(3)]
    expected = [generated(model, request)[0] for request in requests]
    rows, _ = watch_rows(model)

    async def run(engine):
        async def abort_after_three():
            async with contextlib.aclosing(engine.stream(requests[0])) as stream:
                return [token.id async for token, _ in zip_async(stream, range(3))]

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
    assert len(aborted) < 400
    assert [token.id for token in whole] == expected[2]
    assert [token.id for token in again] == expected[0]
    assert rows[0] == 3
    assert rows.count(3) < 200
    assert rows.count(1) >= 200


async def zip_async(stream, items):
    for item in items:
        yield await anext(stream), item


def test_a_waiting_request_that_is_cancelled_is_never_decoded():
    model = make_model()
    requests = [make_request(model, index, 60, max_new_tokens=300) for index in range(2)]
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


def test_an_error_in_the_model_reaches_every_stream_of_the_batch_and_the_engine_goes_on():
    model = make_model()
    good, other = make_request(model, 0, 60), make_request(model, 1, 62)
    bad = EngineRequest("bad", good.features, [*good.prompt_ids, tiny.AUDIO_ID], 12)
    with running(model, gather_s=0.05) as engine:
        results = asyncio.run(collect_all(engine, [good, bad]))
        assert [type(error) for error in results] == [ValueError, ValueError]
        assert "31 audio placeholders in input_ids, but 30 audio tokens" in str(results[0])
        assert [token.id for token in asyncio.run(collect(engine, other))] == generated(model, other)[0]


def test_an_id_that_is_under_way_is_refused():
    model = make_model()
    request = make_request(model, 0, 60)
    with running(model, gather_s=0.05) as engine:
        first, second = asyncio.run(collect_all(engine, [request, request]))
    assert len(first) == 12
    assert isinstance(second, ValueError)


def test_a_closed_engine_ends_its_streams_with_an_error():
    model = make_model()
    engine = TransformersEngine(model, pad_id=0, eos_ids=())
    requests = [make_request(model, index, 60, max_new_tokens=3000) for index in range(2)]

    async def run():
        async for _ in engine.stream(requests[0]):
            await asyncio.to_thread(engine.close)

    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(run())
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(collect(engine, requests[1]))
