"""Check the numbers that `make demo` has written: python3 .ci/check_demo.py runs/demo/summary.json."""

import json
import sys
from pathlib import Path

summary = json.loads(Path(sys.argv[1]).read_text())
print(json.dumps(summary, indent=2))
expected = {
    "stage1": {"loss_first", "loss_last", "seconds"},
    "stage2": {"loss_first", "loss_last", "seconds"},
    "wer": {"trained", "unseen", "swapped", "unseen_as_it_comes", "whisper_trained", "whisper_unseen"},
    "clips": {"trained", "unseen"},
    "seconds": {"total"},
}
for group, keys in expected.items():
    missing = keys - summary[group].keys()
    assert not missing, f"{group} lacks {sorted(missing)}"
assert summary["rtfx"] > 0, f"rtfx is {summary['rtfx']}"
stage1, stage2, wer = summary["stage1"], summary["stage2"], summary["wer"]
# An untrained projector has a loss of 6.
assert stage1["loss_last"] < 0.3, f"stage 1 lost what the small graft's projector knew: loss {stage1['loss_last']}"
assert stage2["loss_last"] < stage2["loss_first"], (
    f"stage 2 did not learn: loss {stage2['loss_first']} -> {stage2['loss_last']}"
)
assert wer["unseen_as_it_comes"] < 0.2, f"the small graft does not hear: WER {wer['unseen_as_it_comes']:.1%}"
assert wer["trained"] < 0.10, f"WER on the trained clips is {wer['trained']:.1%}, not under 10 %"
assert wer["swapped"] > 0.5, f"WER with swapped audio is {wer['swapped']:.1%}: the model does not listen"
