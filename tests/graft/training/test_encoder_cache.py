"""Test the encoder cache: exact states, and separate entries for other clips, encoders and features."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import ray.data
import torch
from safetensors.torch import load_file, save_file

from graft.checkpoints.projector_file import encoder_digest
from graft.data.dataset import read_rows
from graft.processor import GraftProcessor
from graft.training.backends import TrainingBatch
from graft.training.encoder_cache import CachingEncoder, EncodedClip, EncoderCache, open_cache
from graft.training.plan import PlannedBatch
from graft.training.preflight import preflight
from graft.training.stages import ComputeSettings, Stage, open_for_stage
from jobs.training.loader import BatchLoader, LoaderSpec, training_batches
from jobs.training.samples import vary
from tests.support import tiny_models
from tests.support.speech_corpus import BROKEN, corpus, row
from tests.support.training import load

ROWS = 5
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tiny_models.save_tiny_graft(tmp_path_factory.mktemp("cache") / "graft"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    rows = [*(row(f"c{seed}", seed) for seed in range(ROWS - 1)), row("broken", 9, **BROKEN)]
    return corpus(tmp_path_factory.mktemp("data") / "clips.parquet", rows)


def loader(folder: str, data: str, cache: EncoderCache | None) -> BatchLoader:
    rows = read_rows(data)
    variation = vary(rows, GraftProcessor.from_pretrained(folder), no_speech=0.4, token_noise=0.3)
    return BatchLoader(LoaderSpec(rows, (), folder, variation, encoder_cache=cache))


def batches(
    folder: str, data: str, cache: EncoderCache | None, rows: Sequence[int], encoder: CachingEncoder | None
) -> list[TrainingBatch]:
    planned = PlannedBatch(tuple(rows), tuple(rows), 1, 1, 50)
    block = {name: value[None] for name, value in load(loader(folder, data, cache), planned).items()}
    return list(training_batches([block], CPU, [], encoder=encoder))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cached_or_not_the_loss_is_the_same_bit_for_bit(folder: str, data: str, tmp_path: Path, dtype: str) -> None:
    """One clip cannot be decoded and one has no speech; neither is cached."""
    model, processor = open_for_stage(Stage(1), folder, ComputeSettings(dtype, "torch"))
    cache = EncoderCache(tmp_path)
    losses = []
    everything = range(ROWS + 1)
    for _ in range(2):
        encoder = CachingEncoder(model, cache)
        (batch,) = batches(folder, data, cache, everything, encoder)
        assert "input_features" not in batch.inputs
        inputs = batch.model_inputs()
        encoder.close()
        losses.append(model(**inputs, label_count=50).loss)
        assert len(list(tmp_path.glob("*/*.safetensors"))) == ROWS - 1
    (plain,) = batches(folder, data, None, everything, None)
    assert losses[0] == losses[1] == model(**plain.inputs, label_count=50).loss
    assert plain.ids == batch.ids == ("c0", "c1", "c2", "c3", "no-speech")
    logit_change, _ = preflight(model, inputs, processor.prompt_end_ids(), token_noise=True)
    assert logit_change > 1e-6


def test_cached_clips_are_not_decoded_again(folder: str, data: str, tmp_path: Path) -> None:
    model, _ = open_for_stage(Stage(1), folder, ComputeSettings("fp32", "torch"))
    cache, encoder = EncoderCache(tmp_path), None
    for rows in ([0, 1], [1, 0, 2]):
        encoder = CachingEncoder(model, cache)
        for batch in batches(folder, data, cache, rows, encoder):
            batch.model_inputs()
        encoder.close()
    block = load(loader(folder, data, cache), PlannedBatch((2, 0), (0, 0), 1, 1, 50))
    assert block["input_features"].size == 0
    assert block["cached_states"].shape[1] == model.config.audio_config.d_model
    changed = corpus(tmp_path / "changed.parquet", [row("c0", 77)])
    block = load(loader(folder, changed, cache), PlannedBatch((0,), (0,), 1, 1, 50))
    assert block["cached_states"].size == 0
    assert len(block["input_features"]) == 1


def test_blocks_of_any_mixture_pass_through_ray(folder: str, data: str, tmp_path: Path) -> None:
    model, _ = open_for_stage(Stage(1), folder, ComputeSettings("bf16", "torch"))
    cache = EncoderCache(tmp_path)
    encoder = CachingEncoder(model, cache)
    for batch in batches(folder, data, cache, [0, 1], encoder):
        batch.model_inputs()
    encoder.close()
    one_loader = loader(folder, data, cache)
    planned = [PlannedBatch(rows, rows, 1, 1, 50) for rows in ((0, 1), (2, 3), (1, 2))]
    blocks = [{name: value[None] for name, value in load(one_loader, one).items()} for one in planned]
    through = [
        ray.data.block.BlockAccessor.for_block(ray.data.block.BlockAccessor.batch_to_block(block)).to_numpy()
        for block in blocks
    ]
    for before, after in zip(blocks, through, strict=True):
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)
        (one,) = training_batches([after], CPU, [], encoder=CachingEncoder(model, cache))
        assert len(one.model_inputs()["audio_states"]) == int(
            (one.inputs["input_ids"] == model.config.audio_token_id).sum()
        )


def test_another_encoder_features_or_precision_has_another_folder(folder: str, tmp_path: Path) -> None:
    config = tiny_models.graft_config()
    digests = {"encoder": "e", "features": "f", "dtype": "bf16"}
    first = open_cache(tmp_path, config, **digests).folder
    others = [open_cache(tmp_path, config, **{**digests, name: "other"}).folder for name in digests]
    changes = ({"audio_pool": 4}, {"audio_context": "trim"}, {"audio_margin_s": 0.5})
    others += [open_cache(tmp_path, tiny_models.graft_config(**change), **digests).folder for change in changes]
    assert len({first, *others}) == 7
    assert open_cache(tmp_path, config, **digests).folder == first

    before = encoder_digest(folder)
    copy = tmp_path / "graft"
    copy.mkdir()
    weights = load_file(Path(folder, "model.safetensors"))
    for name, same in (("audio_projector.linear.weight", True), ("audio_tower.layers.1.fc1.bias", False)):
        weights[name][0] += 1
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
        assert (encoder_digest(copy) == before) == same


def test_features_have_a_fingerprint(folder: str) -> None:
    featurizer = GraftProcessor.from_pretrained(folder).featurizer
    before = featurizer.fingerprint()
    assert before == featurizer.fingerprint()
    featurizer._window = torch.hamming_window(400)
    assert featurizer.fingerprint() != before


def test_a_truncated_entry_counts_as_missing(tmp_path: Path) -> None:
    cache, key = EncoderCache(tmp_path), EncoderCache.key(b"a clip")
    assert cache.get(key) is None
    cache.put(key, EncodedClip(torch.ones(3, 4, dtype=torch.bfloat16), 12))
    found = cache.get(key)
    assert found is not None
    assert (found.frame_count, found.states.dtype, float(found.states.sum())) == (12, torch.bfloat16, 12)
    (path,) = tmp_path.glob("*/*")
    path.write_bytes(path.read_bytes()[:-4])
    assert cache.get(key) is None


def test_an_entry_that_cannot_be_written_is_an_error(folder: str, data: str, tmp_path: Path) -> None:
    model, _ = open_for_stage(Stage(1), folder, ComputeSettings("fp32", "torch"))
    (tmp_path / "file").write_text("")
    encoder = CachingEncoder(model, EncoderCache(tmp_path / "file"))
    (batch,) = batches(folder, data, encoder.cache, [0, 1], encoder)
    batch.model_inputs()
    for later in (batch.model_inputs, encoder.close):
        with pytest.raises(NotADirectoryError):
            later()
