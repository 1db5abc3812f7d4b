"""Tests that manifests of JSON lines, NeMo, CSV and Common Voice become rows or lines dropped with a reason."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from graft.audio.decoding import open_audio
from graft.config import read_recipe
from graft.data.dataset import RowReader, read_rows
from graft.data.settings import Source
from graft.errors import AudioError, DataError, RecipeError
from jobs.preparation.audio_places import AudioPlace, file_place
from jobs.preparation.clips import row_audio
from jobs.preparation.manifests import DroppedLine, Row, read_manifests
from jobs.preparation.recipe import Manifest
from jobs.prepare import PrepareRecipe, run
from tests.support import hub_server, media


def read(path: Path, content: str | bytes, **more) -> tuple[list[Row], dict[tuple[int, str | None], str]]:
    """Read a manifest; returns its rows, and the reasons of dropped lines by (line, id)."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    results = list(read_manifests([Manifest(manifest=str(path), **more)]))
    dropped = [result for result in results if isinstance(result, DroppedLine)]
    return [result for result in results if isinstance(result, Row)], {
        (row.line, row.id): row.reason for row in dropped
    }


def at(path: str | Path) -> AudioPlace:
    return file_place(str(path))


def sound(path: Path, seconds: float, **more) -> np.ndarray:
    """Write noise and return it as 16-bit samples."""
    samples = np.random.default_rng(0).integers(-20_000, 20_000, int(seconds * 16_000)).astype(np.int16)
    soundfile.write(path, samples, 16_000, **more)
    return samples


def test_a_csv_is_read_by_its_header_whatever_divides_it(tmp_path):
    for delimiter in ",;|\t":
        header = delimiter.join(["text", "audio", "id", "speaker", "extra"])
        lines = [
            header,
            delimiter.join(["One two.", "a/1.wav", "x1", "ann", "e"]),
            "",
            delimiter.join(["Three.", "/abs/2.wav", "x2", "", ""]),
        ]
        rows, dropped = read(tmp_path / "rows.csv", "\ufeff" + "\r\n".join(lines))
        assert dropped == {}
        assert rows == [
            Row("x1", at(tmp_path / "a" / "1.wav"), "One two.", "ann", None, None, str(tmp_path / "rows.csv"), 2),
            Row("x2", at("/abs/2.wav"), "Three.", None, None, None, str(tmp_path / "rows.csv"), 4),
        ]


def test_a_csv_quotes_and_a_tsv_does_not(tmp_path):
    (row,), _ = read(tmp_path / "rows.csv", 'id,audio,text\nx,a.wav,"Well, ""yes"",\nhe said."\n')
    assert row.text == 'Well, "yes",\nhe said.'
    (row,), _ = read(tmp_path / "rows.tsv", 'id\taudio\ttext\nx\ta.wav\t"Open, she said.\n')
    assert row.text == '"Open, she said.'
    (row,), _ = read(tmp_path / "rows.txt", "id audio text\nx a.wav yes\n", delimiter=" ")
    assert row.text == "yes"


def test_columns_and_folder_say_what_is_where(tmp_path):
    columns = {"id": "number", "audio": "file", "text": "words", "sex": "m/f"}
    (row,), _ = read(
        tmp_path / "rows.csv",
        "file,words,number,m/f,text\n1.wav,Right.,7,f,wrong\n",
        columns=columns,
        folder="audio",
        split="dev",
    )
    assert (row.id, row.audio, row.text, row.sex, row.pinned) == (
        "7",
        at(tmp_path / "audio" / "1.wav"),
        "Right.",
        "f",
        "dev",
    )
    with pytest.raises(RecipeError, match=r"columns\.sound"):
        read_recipe(PrepareRecipe, None, ["out=x", "sources=[{manifest: a.csv, columns: {sound: file}}]"])


def test_common_voice_as_it_is_delivered(tmp_path):
    lines = [
        "client_id\tpath\tsentence_id\tsentence\tgender\tlocale",
        'ann\tcv_1.mp3\t9\tShe said "no".\tfemale_feminine\ten',
    ]
    (row,), _ = read(tmp_path / "train.tsv", "\n".join(lines) + "\n", folder="clips")
    assert row == Row(
        "cv_1.mp3",
        at(tmp_path / "clips" / "cv_1.mp3"),
        'She said "no".',
        "ann",
        "female_feminine",
        None,
        str(tmp_path / "train.tsv"),
        2,
        language="en",
    )


def test_bad_lines_of_a_csv_are_dropped_with_their_reasons(tmp_path):
    lines = [
        "id,audio,text,offset,duration",
        "a,a.wav,fine,,",
        "b,b.wav",
        ",c.wav,no id,,",
        "d,,no audio,,",
        "e,e.wav,...,,",
    ]
    lines += ["f,f.wav,text,soon,1", "g,g.wav,text,-1,1", "h,h.wav,text,1,0", "i,i.wav,text,nan,1"]
    rows, dropped = read(tmp_path / "rows.csv", "\n".join(lines))
    assert [row.id for row in rows] == ["a"]
    assert dropped == {
        (3, None): "not CSV",
        (4, None): "no id",
        (5, "d"): "no audio",
        (6, "e"): "no text",
        **{(7 + index, name): "no such time" for index, name in enumerate("fghi")},
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"id,sound,words\na,b,c\n", r"its header \['id', 'sound', 'words'\] names no audio and no text: say `columns"),
        (b"", "names no audio and no text"),
        (b"id,audio,text\na,b,caf\xe9\n", "not UTF-8"),
        (b'id,audio,text\na,b,"never closed\n', "line 2: "),
    ],
)
def test_another_kind_of_file_is_a_data_error(tmp_path, content, words):
    with pytest.raises(DataError, match=words) as caught:
        read(tmp_path / "rows.csv", content)
    assert str(tmp_path / "rows.csv") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nemo_parts_of_a_file_become_clips_and_whole_files_stay_as_they_are(tmp_path):
    samples = sound(tmp_path / "talk.wav", 4)
    lines = [
        {"audio_filepath": "talk.wav", "duration": 4.0, "text": "all of it"},
        {"audio_filepath": "talk.wav", "duration": 3.96, "text": "all but rounding"},
        {"audio_filepath": "talk.wav", "offset": 0, "duration": 1.5, "text": "its beginning"},
        {"audio_filepath": "talk.wav", "offset": 1.25, "duration": 2, "text": "its middle"},
        {"audio_filepath": "talk.wav", "offset": 3, "text": "its end"},
        {"audio_filepath": "talk.wav", "offset": 3, "duration": 1.05, "text": "its end again"},
        {"id": "own", "audio": "talk.wav", "duration": 1, "text": "a duration alone is no part"},
    ]
    rows, dropped = read(tmp_path / "nemo.json", "\n".join(map(json.dumps, lines)))
    assert dropped == {}
    assert [row.id for row in rows] == [
        "talk.wav",
        "talk.wav",
        "talk.wav@0",
        "talk.wav@1.25",
        "talk.wav@3",
        "talk.wav@3",
        "own",
    ]
    clips = [row_audio(row) for row in rows]
    assert [name for _, name in clips] == ["talk.wav", "talk.wav", *["talk.flac"] * 4, "talk.wav"]
    assert {content for content, name in clips if name == "talk.wav"} == {(tmp_path / "talk.wav").read_bytes()}
    parts = [soundfile.read(io.BytesIO(content), dtype="int16") for content, _ in clips[2:6]]
    bounds = [(0, 24_000), (20_000, 52_000), (48_000, 64_000), (48_000, 64_000)]
    for (part, rate), (start, end) in zip(parts, bounds, strict=True):
        assert rate == 16_000
        assert np.array_equal(part, samples[start:end])  # FLAC of the very samples
    assert row_audio(rows[3]) == clips[3]


def test_a_part_keeps_its_rate_channels_and_depth(tmp_path):
    stereo = np.random.default_rng(0).integers(-(2**22), 2**22, (88_200, 2)).astype(np.int32) * 256
    soundfile.write(tmp_path / "a.wav", stereo, 44_100, subtype="PCM_24")
    (row,), _ = read(
        tmp_path / "nemo.json", json.dumps({"audio_filepath": "a.wav", "offset": 0.5, "duration": 1, "text": "words"})
    )
    clip, rate = soundfile.read(io.BytesIO(row_audio(row)[0]), dtype="int32")
    assert rate == 44_100
    assert np.array_equal(clip, stereo[22_050 : 22_050 + 44_100])


@pytest.mark.parametrize(
    ("codec", "kind", "name"),
    [
        ("aac", "ipod", "talk.m4a"),
        ("libopus", "webm", "talk.webm"),
        ("aac", "mp4", "film.mp4"),
        ("aac", "adts", "talk.aac"),
        ("libmp3lame", "mp3", "talk.mp3"),
        ("libopus", "ogg", "talk.opus"),
    ],
)
def test_parts_of_every_container_are_cut_to_the_sample(tmp_path, codec, kind, name):
    """A WebM that is not seekable states no duration."""
    rate = 48_000 if codec == "libopus" else 44_100
    content = media.encode(media.speech(rate, seconds=6), rate, codec, kind, seekable=kind != "webm")
    (tmp_path / name).write_bytes(content)
    with open_audio(tmp_path / name) as audio:
        whole = np.concatenate(list(audio.frames()))
    times = [{"offset": 0, "duration": 1.5}, {"offset": 1.25, "duration": 2}, {"offset": 5}]
    lines = [json.dumps({"audio_filepath": name, "text": "words", **one}) for one in times]
    rows, _ = read(tmp_path / "nemo.json", "\n".join(lines))
    bounds = [(0, 3 * rate // 2), (5 * rate // 4, 13 * rate // 4), (5 * rate, len(whole))]
    for row, (start, end) in zip(rows, bounds, strict=True):
        part, part_rate = soundfile.read(io.BytesIO(row_audio(row)[0]), dtype="float32")
        assert (part_rate, part.shape) == (rate, (end - start, 2))
        assert np.abs(part - whole[start:end]).max() <= 2**-16  # rounded to 16 bits
    late = json.dumps({"audio_filepath": name, "text": "words", "offset": 5, "duration": 2})
    ((row,), _) = read(tmp_path / "late.json", late)
    with pytest.raises(AudioError, match=f"{name}: ends before the clip that begins at 5 s and lasts 2 s"):
        row_audio(row)


def test_manifests_and_the_audio_beside_them_are_read_from_a_web_server(tmp_path):
    """An answer that fails in a way that may pass is asked for again."""
    home = tmp_path / "speech" / "talks" / "main"
    home.mkdir(parents=True)
    samples = sound(home / "a b.wav", 2)
    (home / "rows.csv").write_text("id,audio,text,offset\n" + "x,a b.wav,all of it,\ny,a b.wav,a part,1\n")
    with hub_server.serve(tmp_path) as hub:
        hub.faults["data"] = ["503", "", "drop"]
        place = f"{hub.url}/files/speech/talks/main/rows.csv?key=secret"
        whole, part = read_manifests([Manifest(manifest=place)])
        assert (whole.source, str(whole.audio)) == (place[:-11], f"{hub.url}/files/speech/talks/main/a%20b.wav")
        assert row_audio(whole) == ((home / "a b.wav").read_bytes(), "a b.wav")
        content, name = row_audio(part)
        assert name == "a b.flac"
        assert np.array_equal(soundfile.read(io.BytesIO(content), dtype="int16")[0], samples[16_000:])
        gone = place.replace("rows", "gone")
        with pytest.raises(DataError, match=f"^manifest {gone[:-11]}: no such file or folder: give the path or URI"):
            list(read_manifests([Manifest(manifest=gone)]))


def test_only_takes_the_lines_whose_fields_match_all(tmp_path):
    content = "id,audio,words,set\nx1,a.wav,one,clean 1\nx2,a.wav,two,other\n"
    content += "x3,a.wav,one two,clean 2\nbad,a.wav\nx4,a.wav,,clean 3\n"
    columns = {"text": "words"}
    rows, dropped = read(tmp_path / "rows.csv", content, columns=columns, only={"set": "clean*", "words": "one*"})
    assert [row.id for row in rows] == ["x1", "x3"]
    assert dropped == {(5, None): "not CSV"}
    rows, dropped = read(
        tmp_path / "rows.csv", content, columns=columns, only={"set": "clean [3-9]"}, unlabelled="keep"
    )
    assert [(row.id, row.text) for row in rows] == [("x4", "")]
    for only in ({"set": "Clean*"}, {"sett": "clean*"}, {"set": "clean"}):
        with pytest.raises(DataError, match=r"no line matches only=\{'set"):
            read(tmp_path / "rows.csv", content, columns=columns, only=only)


def test_a_csv_without_a_text_column_may_be_unlabelled(tmp_path):
    (row,), _ = read(tmp_path / "rows.csv", "id,audio\nx,a.wav\n", unlabelled="keep", delimiter=",")
    assert row.text == ""


def test_times_beyond_the_file_are_audio_errors(tmp_path):
    sound(tmp_path / "a.wav", 2)
    (tmp_path / "b.wav").write_text("no audio")
    for line in [
        {"offset": 2},
        {"offset": 1, "duration": 1.5},
        {"audio_filepath": "b.wav", "offset": 1},
        {"audio_filepath": "c.wav", "offset": 1},
    ]:
        (row,), _ = read(tmp_path / "nemo.json", json.dumps({"audio_filepath": "a.wav", "text": "words", **line}))
        with pytest.raises(AudioError, match=row.audio.name):
            row_audio(row)


def test_prepare_takes_every_kind_of_manifest_at_once(tmp_path):
    samples = sound(tmp_path / "talk.wav", 4)
    (tmp_path / "own.jsonl").write_text(json.dumps({"id": "own", "audio": "talk.wav", "text": "all of it"}))
    (tmp_path / "rows.csv").write_text("id,audio,text\ncomma,talk.wav,by comma\n")
    lines = [
        {"audio_filepath": "talk.wav", "offset": offset, "duration": 1, "text": f"part at {offset}"}
        for offset in (0, 1.5, 9)
    ]
    (tmp_path / "nemo.json").write_text("\n".join(map(json.dumps, lines)))
    sources = [str(tmp_path / name) for name in ("own.jsonl", "rows.csv", "nemo.json")]
    run(PrepareRecipe(sources=sources, out=str(tmp_path / "out"), splits={"train": 1}))
    rows = read_rows(str(tmp_path / "out" / "train"))
    found = {rows.id(row): row for row in range(len(rows))}
    assert set(found) == {"own", "comma", "talk.wav@0", "talk.wav@1.5"}
    row = found["talk.wav@1.5"]
    assert rows.duration_s[row] == 1
    content, name = RowReader(rows.files).wav(rows.file[row], rows.row_group[row], rows.row[row])
    assert name == "talk.flac"
    assert np.array_equal(soundfile.read(io.BytesIO(content), dtype="int16")[0], samples[24_000:40_000])
    (dropped,) = map(json.loads, (tmp_path / "out" / "dropped.jsonl").read_text().splitlines())
    assert (dropped["reason"], dropped["line"]) == ("unreadable audio", 3)


def test_languages_of_manifests_reach_the_corpus(tmp_path):
    sound(tmp_path / "talk.wav", 6)
    fields = [{"lang": "de"}, {"language": "pt-BR"}, {"lang": "Klingon"}, {"language": "German"}, {}]
    lines = [
        {"audio_filepath": "talk.wav", "offset": second, "duration": 1, "text": f"part at {second}", **field}
        for second, field in enumerate(fields)
    ]
    (tmp_path / "nemo.json").write_text("\n".join(map(json.dumps, lines)))
    joined = {"share": 0.5, "shortest_s": 2, "longest_s": 4, "pause_s": (0, 0.1)}
    run(
        PrepareRecipe(
            sources=[str(tmp_path / "nemo.json")], out=str(tmp_path / "out"), splits={"train": 1}, joined=joined
        )
    )
    (dropped,) = map(json.loads, (tmp_path / "out" / "dropped.jsonl").read_text().splitlines())
    assert (dropped["line"], dropped["reason"], dropped["detail"]) == (3, "no such language", "Klingon")
    source = {"files": str(tmp_path / "out" / "train"), "columns": {"language": "language"}}
    rows = read_rows(Source.model_validate(source))
    languages = {rows.id(row): rows.language_of(row) for row in range(len(rows))}
    together = [name for name in languages if name.startswith("joined-")]
    assert [languages.pop(name) for name in together] == ["de"]  # of the two German clips alone
    assert languages == {"talk.wav@0": "de", "talk.wav@1": "pt", "talk.wav@3": "de", "talk.wav@4": None}
