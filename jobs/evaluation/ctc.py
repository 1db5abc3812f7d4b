"""What a projector spells after stage 1 by CTC, against the letters of what was said: the language model can't read it yet, people can."""

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
    """Set -> the rates of what recipe.model, a stage 1, spells, as of graft.text.wer.Score; not anew where an earlier run left them.

    Clips that can't be read are left out. Raises DataError for rows without text, and ModelError.
    """
    report = claim_output(recipe.out, recipe, ignore=EXECUTION_KEYS) / REPORT_FILE
    if not report.exists():
        write_atomic(report, json.dumps(_scores(recipe, letters), indent=2) + "\n")
    return json.loads(report.read_text())


def _scores(recipe: EvaluateRecipe, letters: str) -> dict[str, dict[str, float]]:
    model, processor = open_graft(recipe.model, device="cpu", dtype=torch.float32)
    speller = CtcPrealignment(model, processor.tokenizer, letters).eval()
    scores = {}
    for name, sources in recipe.data.items():
        texts, heard = [], []
        rows = as_rows(labelled(name, sources, limit=recipe.limit))
        for _, text, clip in readable(rows, RowReader(rows.files)):
            inputs = processor(audio=clip)
            texts.append(speller.normalize(text))
            heard.append(speller.greedy_decode(inputs["input_features"], inputs["audio_frame_counts"])[0])
        scores[name] = score(texts, heard).to_dict()
    return scores
