"""How many answers a batch changes in bf16: clips transcribed one by one, and once more all together, by the same model."""

from collections.abc import Sequence

import torch

from graft.text.wer import score

from ..common.console import quiet_libraries
from .bulk_peers import open_graft_peer
from .bulk_speech import labelled_speech
from .measuring import Findings, Numbers, list_numbers

ABOUT = "the same clips in bf16, one by one and all together: texts that differ, and both word error rates"


def bench_bf16(model: str, manifests: Sequence[str], *, threads: int) -> Findings:
    """Compare a graft's answers in bf16 one by one and in batches."""
    quiet_libraries()
    torch.set_num_threads(threads)
    speech = labelled_speech(manifests)
    transcribe = open_graft_peer(model, "bf16")
    alone = [transcribe([one.clip])[0] for one in speech]
    together = transcribe([one.clip for one in speech])
    changed = sum(one != other for one, other in zip(alone, together, strict=True))
    texts = [one.text for one in speech]
    numbers: Numbers = {
        "clips": len(speech),
        "changed": changed,
        "changed_percent": 100 * changed / len(speech),
        "alone_wer_percent": 100 * score(texts, alone).wer,
        "together_wer_percent": 100 * score(texts, together).wer,
    }
    return Findings(numbers, f"{ABOUT}\n{list_numbers(numbers)}")
