"""Test parts of an evaluation's page: its audio, pictures and plots."""

import base64
import io
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import soundfile

from graft.audio.clip import AudioClip, read_audio
from jobs.evaluation.predict import write_clip_index
from jobs.evaluation.report_page.audio import MOST_COLUMNS, embed_audio, log_mel, read_clips
from jobs.evaluation.report_page.plots import group_plot, histogram_plot, speed_plot
from jobs.evaluation.test_sets import labelled
from tests.support import media
from tests.support.speech_corpus import BROKEN, corpus, row

PNG = b"\x89PNG"


def test_clips_are_found_again_by_set_and_id(tmp_path: Path) -> None:
    rows = [row("a", 0), row("b", 1), row("broken", 2, **BROKEN)]
    items = labelled("dev", corpus(tmp_path / "dev.parquet", rows), limit=None)
    write_clip_index(items, tmp_path / "clips.parquet", work=tmp_path / "work")
    keys = [("dev", "b"), ("dev", "broken"), ("dev", "unknown"), ("other", "a"), ("dev", "a")]
    found = dict(read_clips(tmp_path, keys))
    assert list(found) == [("dev", "b"), ("dev", "a")]
    for place, name in enumerate("ab"):
        np.testing.assert_array_equal(found["dev", name].samples, read_audio(rows[place]["wav"]["bytes"]).samples)
    assert list(read_clips(tmp_path / "nowhere", keys)) == []


def test_audio_survives_and_the_picture_is_of_all_of_the_clip() -> None:
    clip = read_audio(media.SHORTEST_FIRST[20])
    made = embed_audio(clip)
    content = base64.b64decode(made["audio"])
    samples, rate = soundfile.read(io.BytesIO(content))
    assert rate == 16_000
    assert abs(len(samples) - len(clip.samples)) < 0.1 * rate
    assert len(content) * 8 / clip.duration_s < 50_000
    assert base64.b64decode(made["mel"]).startswith(PNG)
    assert embed_audio(clip) == made
    long = log_mel(AudioClip(np.tile(clip.samples, 20)))
    assert long.shape[0] == 80
    assert long.shape[1] <= MOST_COLUMNS
    tone = np.sin(2 * np.pi * 440 * np.arange(32_000) / 16_000).astype(np.float32)
    mel = log_mel(AudioClip(np.concatenate([np.zeros(16_000, np.float32), tone])))
    assert mel[:, :90].max() < mel[:, 110:].max()


def test_plots_are_svg_with_texts_in_the_page_s_colours() -> None:
    rates = {"wer": 0.1, "wer_low": 0.05, "wer_high": 0.2}
    groups = {
        f"{number} $x$ <b>": {"clips": number + 1, "systems": {"graft": rates, "whisper": rates}}
        for number in range(60)
    }
    histogram = {"dev": {"histogram": {"edges_s": [0, 1, 2], "clips": [3, 4]}, "duration_s": {"0.5": 1.0}}}
    plots = [
        speed_plot({"graft": (0.1, 20.0), "a & b": (0.2, 3.0)}),
        group_plot("dev", "speaker", groups, ["graft", "whisper"]),
        histogram_plot(histogram),
    ]
    for plot in plots:
        tree = ET.fromstring(plot.svg.replace("xlink:href", "href"))
        texts = [element.text for element in tree.iter() if element.tag.endswith("text")]
        assert texts
        assert "var(--series-0)" in plot.svg
        assert "width=" not in plot.svg[: plot.svg.index(">")]
        assert plot.label
    assert "a & b" in "".join(filter(None, ET.fromstring(plots[0].svg.replace("xlink:href", "href")).itertext()))
    assert "The 40 largest of 60 groups." in plots[1].caption
    again = speed_plot({"graft": (0.1, 20.0), "a & b": (0.2, 3.0)})
    assert again == plots[0]
