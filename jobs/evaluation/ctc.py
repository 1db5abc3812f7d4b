"""Score a projector after CTC pre-alignment: the letters that CTC decodes against the letters of the reference text."""

import json

import torch

from graft.checkpoints.loading import open_graft
from graft.data.dataset import RowReader
from graft.model.ctc import CtcPrealignment
from graft.storage.atomic import write_atomic
from graft.text.wer import score

from ..common.outputs import claim_output
from ..training.recipe import EXECUTION_KEYS
from ..training.validation import readable
from .recipe import EvaluateRecipe
from .scoring import REPORT_FILE
from .test_sets import as_rows, labelled


def score_ctc(recipe: EvaluateRecipe, letters: str) -> dict[str, dict[str, float]]:
    """Score the CTC transcripts of recipe.model, a stage 1; returns graft.text.wer.Score's rates by test set.

    An earlier run's report is returned as it is. Clips that cannot be read are left out. Raises DataError for rows
    without text, and ModelError.
    """
    report = claim_output(recipe.out, recipe, ignore=EXECUTION_KEYS) / REPORT_FILE
    if not report.exists():
        write_atomic(report, json.dumps(_scores(recipe, letters), indent=2) + "\n")
    return json.loads(report.read_text())


def _scores(recipe: EvaluateRecipe, letters: str) -> dict[str, dict[str, float]]:
    model, processor = open_graft(recipe.model, device="cpu", dtype=torch.float32)
    prealignment = CtcPrealignment(model, processor.tokenizer, letters).eval()
    scores = {}
    for name, sources in recipe.data.items():
        texts, transcripts = [], []
        rows = as_rows(labelled(name, sources, limit=recipe.limit))
        for _, text, clip in readable(rows, RowReader(rows.files)):
            inputs = processor(audio=clip)
            texts.append(prealignment.normalize(text))
            transcripts.append(prealignment.greedy_decode(inputs["input_features"], inputs["audio_frame_counts"])[0])
        scores[name] = score(texts, transcripts).to_dict()
    return scores
