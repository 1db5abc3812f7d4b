"""Tests that lhotse, NeMo tarred, WebDataset, Hugging Face and Qwen data become rows, however damaged or hostile."""

import functools
import gzip
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graft.errors import DataError
from jobs.common.inputs import check_inputs
from jobs.preparation.audio_places import AudioReader
from jobs.preparation.formats.sources import expand_braces, list_files
from jobs.preparation.manifests import DroppedLine, Row, list_manifests, read_manifests
from jobs.preparation.recipe import Manifest
from jobs.prepare import PrepareRecipe, run
from tests.support import hub_server, media, s3


@functools.cache
def wav(seconds: float) -> bytes:
    return media.encode(media.speech(16_000, seconds=seconds), 16_000, "pcm_s16le", "wav")


def read(location: str | Path, **more: Any) -> tuple[list[Row], dict[tuple[int, str | None], str]]:
    """Read a source; returns its rows, and the reasons of dropped lines by (line, id)."""
    results = list(read_manifests(list_manifests([Manifest(manifest=str(location), **more)])))
    dropped = [result for result in results if isinstance(result, DroppedLine)]
    return [result for result in results if isinstance(result, Row)], {
        (row.line, row.id): row.reason for row in dropped
    }


def audio(row: Row) -> bytes:
    with AudioReader().open(row.audio) as file:
        return file.read()


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write_tar(path: Path, members: Mapping[str, bytes | tarfile.TarInfo], **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **more) as file:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                file.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


# Text


def test_json_lines_and_arrays_are_read_gzipped_or_not_and_ids_are_made_of_paths(tmp_path):
    lines = [{"audio": f"a/{i}.wav", "text": f"number [{{ {i}"} for i in range(3)]
    (tmp_path / "array.json").write_text(json.dumps(lines, indent=1))
    (tmp_path / "array.json.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(lines).encode()))
    places = [write_lines(tmp_path / name, lines) for name in ("lines.jsonl", "lines.jsonl.gz")]
    for place in [*places, tmp_path / "array.json", tmp_path / "array.json.gz"]:
        rows, dropped = read(place)
        assert dropped == {}
        assert [(row.line, row.id, row.text) for row in rows] == [
            (i + 1, f"a/{i}.wav", f"number [{{ {i}") for i in range(3)
        ]
        assert rows[0].audio.uri == str(tmp_path / "a" / "0.wav")
    (tmp_path / "table.csv.gz").write_bytes(gzip.compress(b"audio,text\na.wav,words\n"))
    assert [row.id for row in read(tmp_path / "table.csv.gz")[0]] == ["a.wav"]


def test_an_array_is_read_an_object_at_a_time_and_its_faults_are_named(tmp_path):
    place = tmp_path / "a.json"
    place.write_text('[{"audio": "a.wav", "text": "%s"}, 3, [1], {"text": "none"}]' % ("long " * 200_000))
    rows, dropped = read(place)
    assert [len(row.text) for row in rows] == [999_999]
    assert dropped == {(2, None): "not JSON", (3, None): "not JSON", (4, None): "no id"}
    for content, words in [
        ('[{"audio": "a.wav", "text": "x y"}, {"audio": "b', "its array is damaged after its object 1"),
        ('[{"audio": "a.wav", "text": "x y"}] {}', "goes on after the end of its array"),
        ('[{"audio": "caf\xe9"}]'.encode("latin-1"), "not UTF-8"),
        ('[{"a": ' + "[" * 100_000, "nested too deeply"),
    ]:
        place.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError, match=f"^manifest {place}: .*{words}"):
            read(place)


def test_qwen_texts_name_their_language(tmp_path):
    texts = [
        "language English<asr_text>This is a test.",
        "language None<asr_text>Unknown.",
        "language Elvish<asr_text>X",
    ]
    lines = [{"audio": f"/data/{i}.wav", "text": text} for i, text in enumerate(texts)]
    rows, dropped = read(write_lines(tmp_path / "train.jsonl", lines))
    assert [(row.id, row.text, row.language) for row in rows] == [
        ("/data/0.wav", "This is a test.", "en"),
        ("/data/1.wav", "Unknown.", None),
    ]
    assert dropped == {(3, "/data/2.wav"): "no such language"}


def test_damaged_and_foreign_files_are_one_line(tmp_path):
    place = write_lines(tmp_path / "a.jsonl.gz", [{"audio": f"{i}.wav", "text": f"number {i}"} for i in range(999)])
    whole = place.read_bytes()
    for content, words in [
        (whole[: len(whole) // 2], "its gzip data end or are damaged"),
        (b"\x1f\x8bhello", "its gzip data end or are damaged"),
        (gzip.compress(b"\0" * 70_000_000, 1), "a line of over 67,108,864 bytes"),
        (gzip.compress(write_tar(tmp_path / "b.tar", {"a.txt": b"x"}).read_bytes()), "is a compressed tar file"),
        (b"BZh91AY", "compressed with bzip2"),
        (b"ARROW1\0\0", "a Feather file"),
    ]:
        place.write_bytes(content)
        with pytest.raises(DataError, match=words) as caught:
            read(place)
        assert str(caught.value).startswith(f"manifest {place}: ")
        assert "\n" not in str(caught.value)


# lhotse, as version 1.33 writes it


def cut(name: str, *, start: float = 0, duration: float = 2, **more: Any) -> dict[str, Any]:
    """Return a cut of a recording of 2 s with one supervision."""
    supervision = {"id": f"s-{name}", "recording_id": "rec", "start": 0, "duration": duration, "channel": 0}
    supervision |= {"text": f"text of {name}", "language": "English", "speaker": "ann", "gender": "f"}
    recording = {"id": "rec", "sources": [{"type": "file", "channels": [0], "source": "wav/a.wav"}]}
    recording |= {"sampling_rate": 16000, "num_samples": 32000, "duration": 2.0, "channel_ids": [0]}
    values = {"id": name, "start": start, "duration": duration, "channel": 0, "supervisions": [supervision]}
    return {**values, "recording": recording, "type": "MonoCut", **more}


def test_cuts_of_lhotse_become_clips_and_what_they_do_to_audio_is_refused(tmp_path):
    plain = cut("plain")
    parts = [
        {**plain["supervisions"][0], "id": f"p{i}", "start": i, "duration": 1, "text": f"part {i}"} for i in (0, 1)
    ]
    recording = plain["recording"]
    stereo = {**recording, "sources": [{"type": "file", "channels": [0, 1], "source": "wav/st.wav"}]}
    padding = {"cut": {"id": "pad", "duration": 1.0, "type": "PaddingCut"}, "type": "PaddingCut", "offset": 2.0}
    lines = [
        plain,
        cut("part", start=0.5, duration=1),
        cut("two", supervisions=parts),
        cut("none", supervisions=[]),
        {"id": "padded", "tracks": [{"cut": plain, "type": "MonoCut", "offset": 0.0}, padding], "type": "MixedCut"},
        cut("both", channel=[0, 1], recording=stereo, type="MultiCut"),
        cut("url", recording={**recording, "sources": [{"type": "url", "channels": [0], "source": "https://x/a.wav"}]}),
        cut("resampled", recording={**recording, "transforms": [{"name": "Resample", "kwargs": {}}]}),
        # From here on cuts that are no clips of a file.
        cut("right", channel=1, recording=stereo),
        {"id": "mix", "tracks": [{"cut": plain, "type": "MonoCut", "offset": 0.0}] * 2, "type": "MixedCut"},
        cut("fast", recording={**recording, "transforms": [{"name": "Speed", "kwargs": {"factor": 1.1}}]}),
        cut("late", supervisions=[{**parts[0], "start": -1, "duration": 3}]),
        cut("shell", recording={**recording, "sources": [{"type": "command", "channels": [0], "source": "touch x"}]}),
        cut("features", recording=None),
        cut("odd", recording={**recording, "sources": 3}),
        {**recording, "id": "recording"},
        parts[0],
    ]
    for name in ("cuts.jsonl", "cuts.jsonl.gz"):
        rows, dropped = read(write_lines(tmp_path / name, lines))
        times = {row.id: (row.offset_s, row.length_s) for row in rows}
        whole = dict.fromkeys(["plain", "padded", "both", "url", "resampled"], (0, None))
        assert times == {"part": (0.5, 1), "p0": (0, 1), "p1": (1, 1), **whole}
        first = rows[0]
        assert (first.text, first.speaker, first.sex, first.language) == ("text of plain", "ann", "f", "en")
        assert {row.id: row.audio.uri for row in rows} == {
            **dict.fromkeys(times, str(tmp_path / "wav/a.wav")),
            "both": str(tmp_path / "wav/st.wav"),
            "url": "https://x/a.wav",
        }
        assert dropped == {
            (4, "none"): "no text",
            (9, "right"): "channel of several",
            (10, "mix"): "mixed cut",
            (11, "fast"): "transformed audio",
            (12, "late"): "cut off text",
            (13, "shell"): "no audio file",
            (14, "features"): "no audio",
            (15, "odd"): "no cut",
            (16, "recording"): "no cut",
            (17, "p0"): "no cut",
        }


def test_recordings_of_lhotse_shar_are_read_out_of_their_tar_files(tmp_path):
    recording = {**cut("a")["recording"], "sources": [{"type": "shar", "channels": [0], "source": ""}]}
    write_lines(tmp_path / "cuts.000000.jsonl.gz", [cut(name, recording=recording) for name in ("a-0", "gone")])
    content = wav(2)
    write_tar(tmp_path / "recording.000000.tar", {"a-0.wav": content, "a-0.json": b"{}"})
    (row,), dropped = read(tmp_path)
    assert (row.id, audio(row)) == ("a-0", content)
    assert dropped == {(2, "gone.flac"): "not in tar file"}


# Tar files


def test_a_tarred_set_of_nemo_is_read_by_ranges_of_its_tar_files(tmp_path):
    """Lines of one file are called FILE-sub1 and so on; manifests may be one for each shard."""
    files = {f"data_u{i}.wav": wav(1 + i / 10) for i in range(4)}
    lines = []
    for shard in (0, 1):
        names = [f"data_u{2 * shard + i}.wav" for i in (0, 1)]
        write_tar(tmp_path / f"audio_{shard}.tar", {name: files[name] for name in names})
        own = [{"audio_filepath": name, "duration": 1.0, "text": f"text of {name}"} for name in names]
        own.append({"audio_filepath": f"{names[1][:-4]}-sub1.wav", "offset": 0.25, "duration": 0.5, "text": "a part"})
        own = [{**line, "shard_id": shard} for line in own]
        write_lines(tmp_path / "sharded_manifests" / f"manifest_{shard}.json", own)
        lines += own
    lines += [{"audio_filepath": "gone.wav", "duration": 1.0, "text": "gone", "shard_id": shard} for shard in (0, 7)]
    write_lines(tmp_path / "tarred_audio_manifest.json", lines)
    whole, dropped = read(tmp_path)
    assert dropped == {(7, "gone.wav"): "not in tar file", (8, "gone.wav"): "no tar file"}
    assert [row.id for row in whole][:3] == ["data_u0.wav", "data_u1.wav", "data_u1-sub1.wav@0.25"]
    assert [audio(row) for row in whole] == [files[f"data_u{i}.wav"] for i in (0, 1, 1, 2, 3, 3)]
    assert (whole[2].offset_s, whole[2].length_s) == (0.25, 0.5)
    pattern = tmp_path / "sharded_manifests" / "manifest__OP_0..1_CL_.json"
    check_inputs(PrepareRecipe(sources=[str(pattern)], out="x"))
    for tars in ([], ["../audio__OP_0..1_CL_.tar"], ["../audio_{0,1}.tar"]):
        rows, dropped = read(pattern, tars=tars)
        assert dropped == {}
        assert [(row.id, audio(row)) for row in rows] == [(row.id, audio(row)) for row in whole]


def test_samples_of_webdataset_are_read_and_every_other_member_has_its_reason(tmp_path):
    link = tarfile.TarInfo("link.wav")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    sound = wav(1)
    values = {"text": "of json", "speaker": "ann", "lang": "de", "offset": 9, "duration": 1, "path": "/etc/passwd"}
    members = {
        "000.wav": sound,
        "000.txt": b"of a text\n",
        "d/001.flac": sound,
        "d/001.json": json.dumps(values).encode(),
        "002.WAV": sound,
        "002.cls": b"seven",
        "../../003.mp3": sound,
        "../../003.txt": b"above",
        "noext": b"x",
        "005.txt": b"alone",
        "link.wav": link,
        "link.txt": b"a link",
        "007.wav": sound,
        "007.txt": b"\xff\xfe",
        "008.wav": sound,
        "008.json": b"{bad",
        "a.1.wav": sound,
        "a.2.wav": sound,
    }
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        place = write_tar(tmp_path / "s-0.tar", members, format=form)
        rows, dropped = read(place)
        stem = str(tmp_path / "s-0")
        assert [(row.id, row.text, row.speaker, row.language) for row in rows] == [
            (f"{stem}/000", "of a text", None, None),
            (f"{stem}/d/001", "of json", "ann", "de"),
            (f"{stem}/002", "seven", None, None),
            (f"{stem}/../../003", "above", None, None),
        ]
        assert [row.audio.name for row in rows] == ["000.wav", "001.flac", "002.WAV", "003.mp3"]
        assert all(audio(row) == sound and row.offset_s == 0 and row.length_s is None for row in rows)
        assert dropped == {
            (5, "noext"): "no sample",
            (6, f"{stem}/005"): "no audio",
            (7, f"{stem}/link"): "unreadable member",
            (8, f"{stem}/007"): "not UTF-8",
            (9, f"{stem}/008"): "not JSON",
            (10, f"{stem}/a"): "several audio files",
        }


def test_damaged_and_hostile_tar_files_lose_what_follows_the_damage_and_no_more(tmp_path):
    place = write_tar(
        tmp_path / "s.tar",
        {f"{i}.{suffix}": wav(1) if suffix == "wav" else b"words" for i in range(3) for suffix in ("wav", "txt")},
    )
    whole = place.read_bytes()
    at = whole.index(b"1.wav\0")
    backwards = bytearray(whole)
    backwards[at + 124 : at + 136] = (-4096 & (256**12 - 1)).to_bytes(12, "big")  # a size below 0
    backwards[at + 148 : at + 156] = b" " * 8
    backwards[at + 148 : at + 156] = b"%06o\0 " % sum(backwards[at : at + 512])
    huge = tarfile.TarInfo("huge")
    huge.type, huge.size = tarfile.XHDTYPE, 2**40
    for content, kept, lost in [
        (whole[: at + 20_000], [1], {(2, f"{tmp_path}/s/1"): "unreadable member", (3, None): "damaged tar"}),
        (whole[:at] + b"\x55" * 600 + whole[at + 600 :], [1], {(2, None): "damaged tar"}),
        (bytes(backwards), [1], {(2, None): "damaged tar"}),
        (whole[:at] + huge.tobuf(tarfile.GNU_FORMAT) + whole[at:], [1], {(2, None): "damaged tar"}),
        (whole[: whole.index(b"2.wav\0")], [1, 2], {}),  # without the blocks that end it
    ]:
        place.write_bytes(content)
        rows, dropped = read(place)
        assert ([row.line for row in rows], dropped) == (kept, lost)
    for content in (b"", b"no tar" * 500):
        place.write_bytes(content)
        with pytest.raises(DataError, match=f"^manifest {place}: is no tar file"):
            read(place)


def test_tar_files_are_read_from_a_web_server(tmp_path):
    home = tmp_path / "speech" / "talks" / "main"
    sound = wav(1)
    write_tar(home / "audio_0.tar", {"a.wav": sound})
    write_lines(home / "manifest_0.json", [{"audio_filepath": "a.wav", "duration": 1, "text": "words", "shard_id": 0}])
    write_tar(home / "s-0.tar", {"k.wav": sound, "k.txt": b"words"})
    with hub_server.serve(tmp_path) as hub:
        folder = f"{hub.url}/files/speech/talks/main"
        for name, identity in (("manifest__OP_0..0_CL_.json", "a.wav"), ("s-{0..0}.tar", f"{folder}/s-0/k")):
            (row,), dropped = read(f"{folder}/{name}")
            assert (row.id, audio(row), dropped) == (identity, sound, {})


@pytest.mark.slow  # the server takes seconds to start
def test_folders_and_shards_are_read_from_a_bucket(tmp_path):
    sound = wav(1)
    for index in range(2):
        write_tar(tmp_path / "w" / f"s-{index}.tar", {"k.wav": sound, "k.txt": b"words"})
    tables = [pa.Table.from_pylist([{"audio": {"bytes": sound, "path": "u.wav"}, "text": "words"}])]
    write_dataset(tmp_path / "saved", tables)
    pq.write_table(tables[0], tmp_path / "saved" / "t.parquet")
    with s3.serve(tmp_path, "speech/data v1.0") as address:
        options = f"?endpoint_override={address}&scheme=http&region=us-east-1"
        home = "s3://speech/data%20v1.0"
        for name, count in [("w", 2), ("w/s-{0..1}.tar", 2), ("w/s-*.tar", 2), ("saved", 1), ("saved/t.parquet", 1)]:
            rows, dropped = read(f"{home}/{name}{options}")
            assert dropped == {}
            assert [audio(row) for row in rows] == [sound] * count
            assert all(row.id.startswith(home) and "?" not in row.id for row in rows)


# Tables


def huggingface() -> pa.Schema:
    """Return the schema that `datasets` writes."""
    features = {"audio": {"sampling_rate": 16000, "_type": "Audio"}, "text": {"dtype": "string", "_type": "Value"}}
    features["language"] = {"names": ["en", "de"], "_type": "ClassLabel"}
    fields = [
        ("audio", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("text", pa.string()),
        ("language", pa.int64()),
    ]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def write_dataset(folder: Path, shards: list[pa.Table]) -> Path:
    """Write a folder as `Dataset.save_to_disk` does."""
    folder.mkdir(parents=True)
    names = [f"data-{index:05d}-of-{len(shards):05d}.arrow" for index in range(len(shards))]
    for name, table in zip(names, shards, strict=True):
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_tables_of_hugging_face_are_read_with_their_audio_inside_or_beside_them(tmp_path):
    sound = [wav(1 + i / 10) for i in range(3)]
    (tmp_path / "beside.wav").write_bytes(b"RIFF beside")
    rows = [
        {"audio": {"bytes": sound[i], "path": f"u{i}.wav"}, "text": f"text {i}", "language": i % 2} for i in range(3)
    ]
    rows[1]["audio"]["path"] = None
    rows.append({"audio": {"bytes": None, "path": str(tmp_path / "beside.wav")}, "text": "beside", "language": None})
    rows.append({"audio": None, "text": "nowhere", "language": 7})
    table = pa.Table.from_pylist(rows, schema=huggingface())
    folder = write_dataset(tmp_path / "saved" / "train", [table.slice(0, 3), table.slice(3)])
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    stems = [f"{folder}/data-0000{i}-of-00002" for i in (0, 1)]
    found, dropped = read(folder)
    assert [(row.id, row.line, row.text, row.language, row.audio.name) for row in found] == [
        (f"{stems[0]}:0", 1, "text 0", "en", "u0.wav"),
        (f"{stems[0]}:1", 2, "text 1", "de", "1"),
        (f"{stems[0]}:2", 3, "text 2", "en", "u2.wav"),
        (f"{stems[1]}:0", 1, "beside", None, "beside.wav"),
    ]
    assert [audio(row) for row in found] == [*sound, b"RIFF beside"]
    assert dropped == {(2, f"{stems[1]}:1"): "no audio"}
    for size, statistics in ((2, True), (2, False), (99, True)):
        pq.write_table(
            table.slice(0, 5 if statistics else 3), tmp_path / "t.parquet", size, write_statistics=statistics
        )
        some, _ = read(tmp_path / "t.parquet")
        assert [audio(row) for row in some] == [*sound, b"RIFF beside"][: len(some)]
        assert [row.text for row in some] == [row.text for row in found][: len(some)]
    with pytest.raises(DataError, match="holds the splits train: give a source for each"):
        read(tmp_path / "saved")


def test_a_table_may_hold_plain_bytes_or_paths_and_others_say_what_they_hold(tmp_path):
    place, sound = tmp_path / "t.parquet", wav(1)
    pq.write_table(pa.table({"ID": ["a"], "wav": pa.array([sound], pa.binary()), "transcript": ["words"]}), place)
    (row,), _ = read(place)
    assert (row.id, row.text, audio(row)) == ("a", "words", sound)
    pq.write_table(pa.table({"id": [7], "path": ["a.wav"], "text": ["words"], "set": ["dev"]}), place)
    (row,), _ = read(f"{tmp_path}/*.parquet", only={"set": "d*"})
    assert (row.id, row.audio.uri) == ("7", str(tmp_path / "a.wav"))
    with pytest.raises(DataError, match=r"has no column sound, but id, path, text, set: correct `columns` or `only`"):
        read(place, columns={"audio": "sound"})
    pq.write_table(pa.table({"audio": [[0.1, 0.2]], "text": ["words"]}), place)
    with pytest.raises(
        DataError, match=r"no column holds audio as bytes.* audio \(list.*say `columns: \{audio: NAME\}`"
    ):
        read(place)
    for content in (b"PAR1 and no more", b"text"):
        place.write_bytes(content)
        with pytest.raises(DataError, match=f"^manifest {place}: cannot be read as a table .*again$") as caught:
            read(place)
        assert "\n" not in str(caught.value)


def test_a_damaged_arrow_stream_is_one_line(tmp_path):
    table = pa.Table.from_pylist([{"audio": {"bytes": b"x" * 999, "path": "a"}, "text": "words"}] * 9)
    folder = write_dataset(tmp_path / "d", [table])
    (place,) = folder.glob("*.arrow")
    whole = place.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:60] + b"\x99" * 200 + whole[260:]):
        place.write_bytes(content)
        with pytest.raises(DataError, match=f"^manifest {place}: cannot be read as a table"):
            read(folder)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "../../etc/passwd"}]}')
    with pytest.raises(DataError, match=r"state\.json names no file that is there, but \.\./\.\./etc/passwd"):
        read(folder)


# Sources of several files


def test_braces_folders_and_globs_name_files(tmp_path, monkeypatch):
    assert expand_braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert expand_braces("s3://x/{b,c}_OP_2..1_CL_.tar") == [
        "s3://x/b2.tar",
        "s3://x/b1.tar",
        "s3://x/c2.tar",
        "s3://x/c1.tar",
    ]
    assert expand_braces("plain{}{x}") == ["plain{}{x}"]
    for location in ("{0..99999999999999999999}", "{0..999}{0..999}"):
        with pytest.raises(DataError, match="its braces name over 100,000 files"):
            expand_braces(location)
    monkeypatch.chdir(tmp_path)
    write_tar(Path("w/b.tar"), {})
    write_tar(Path("w/a.tar"), {})
    write_tar(Path("odd{1,2}.tar"), {})
    assert list_files("w") == list_files("w/*.tar") == ["w/a.tar", "w/b.tar"]
    assert list_files("odd{1,2}.tar") == ["odd{1,2}.tar"]
    Path("w/c.parquet").touch()
    with pytest.raises(DataError, match=r"this folder holds several of .*name the files, as w/\*\.parquet"):
        list_files("w")
    with pytest.raises(DataError, match=r"manifest w/\*\.csv: no file is called so"):
        list_files("w/*.csv")


def test_only_may_match_in_one_of_several_files(tmp_path):
    for index, kind in enumerate(("clean", "other")):
        write_lines(tmp_path / f"{index}.jsonl", [{"audio": "a.wav", "text": "words", "kind": kind}])
    (row,), _ = read(tmp_path / "{0..1}.jsonl", only={"kind": "clean"})
    assert row.source == str(tmp_path / "0.jsonl")
    with pytest.raises(DataError, match=r"manifest .*\{0\.\.1\}\.jsonl: no line matches only="):
        read(tmp_path / "{0..1}.jsonl", only={"kind": "none"})


def test_a_corpus_is_prepared_from_tar_files_and_tables(tmp_path):
    """Every sample, row and line is in a split or in dropped.jsonl."""
    words = ["one two", "three four", "five six"]
    write_tar(
        tmp_path / "w-0.tar",
        {
            name: data
            for i, text in enumerate(words)
            for name, data in ((f"{i}.wav", wav(1)), (f"{i}.txt", text.encode()))
        },
    )
    schema = pa.schema([field for field in huggingface() if field.name != "language"])
    row = {"audio": {"bytes": wav(1.5), "path": "u.wav"}, "text": "seven eight"}
    pq.write_table(pa.Table.from_pylist([row, {**row, "text": None}], schema=schema), tmp_path / "t.parquet")
    write_lines(tmp_path / "cuts.jsonl", [cut("c", start=0.5, duration=1), cut("d", channel=[0, 1])])
    (tmp_path / "wav").mkdir()
    (tmp_path / "wav" / "a.wav").write_bytes(wav(2))
    sources = [str(tmp_path / name) for name in ("w-{0..0}.tar", "t.parquet", "cuts.jsonl")]
    run(PrepareRecipe(sources=sources, out=str(tmp_path / "out"), splits={"train": 1}))
    table = pq.read_table(tmp_path / "out" / "train")
    assert sorted(table["text"].to_pylist()) == sorted([*words, "seven eight", "text of c"])
    assert sorted(table["duration"].to_pylist()) == [1, 1, 1, 1, 1.5]
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [(line["id"], line["reason"]) for line in dropped] == [
        ("d", "channel of several"),
        (str(tmp_path / "t:1"), "no text"),
    ]
