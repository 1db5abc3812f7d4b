"""Test that compiled layers stay compiled: preflight and validation neither recompile them nor run them eagerly."""

from pathlib import Path

import pytest
import torch

from graft.checkpoints.lora import LoraSettings
from graft.data.dataset import read_rows
from graft.processor import GraftProcessor
from graft.training.plan import PlanSettings
from graft.training.preflight import preflight
from graft.training.stages import ComputeSettings, Stage, make_backend, open_for_stage
from jobs.training.loader import BatchLoader, LoaderSpec, training_batches
from jobs.training.samples import plan_training
from jobs.training.validation import Validation
from tests.support import tiny_models
from tests.support.speech_corpus import corpus, row

pytestmark = pytest.mark.slow
MOST_GRAPHS = 9
"""Most compiled graphs of a layer.

The language model's layers have one each for validation, batches and single clips; the encoder's have each of these
with and without a mask. torch falls back to eager code after 8 of one kind.
"""


def test_preflight_and_validation_leave_layers_compiled(tmp_path: Path) -> None:
    graft = str(tiny_models.save_tiny_graft(tmp_path / "graft"))
    rows = read_rows(corpus(tmp_path / "clips.parquet", [row(f"c{seed}", seed) for seed in range(12)]))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    computing = ComputeSettings(dtype="fp32", attention="eager", compile=True)
    model, processor = open_for_stage(Stage(2, lora=LoraSettings(rank=4, alpha=4, dropout=0.0)), graft, computing)
    backend = make_backend(model, computing, accumulation=1, weight_decay=0.0, max_grad_norm=1.0)
    plan = plan_training(rows, GraftProcessor.from_pretrained(graft), PlanSettings(token_budget=400, max_batch_clips=3))
    spec = LoaderSpec(rows, plan.batches(position=0, step_batches=1), graft)
    loader = BatchLoader(spec)
    validation = Validation(spec, backend, processor, samples=2, is_sharded=False, max_masked=0)
    batches = list(training_batches(loader.blocks(range(len(spec.batches))), torch.device("cpu"), []))
    with backend.evaluating():
        preflight(model, batches[0].inputs, processor.prompt_end_ids())
    for batch in batches:
        backend.backward(batch.model_inputs(), label_count=batch.step_label_count, is_last=True)
        backend.step(1e-3)
        assert validation.summed_loss()[0] > 0
        assert [clip.id for clip in validation.transcripts()] == ["c0", "c1"]
    assert len({tuple(batch.inputs["input_ids"].shape) for batch in batches}) > 2
    assert 2 <= torch._dynamo.utils.counters["frames"]["ok"] <= MOST_GRAPHS
