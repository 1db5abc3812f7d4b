"""Tests that jobs.prepare turns manifests into disjoint, reproducible splits and reports every dropped line."""

import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from graft.audio.clip import SAMPLE_RATE, read_audio
from graft.config import read_recipe
from graft.data.dataset import RowReader, read_rows
from graft.data.splits import Candidate, assign_splits, comparable_text
from graft.errors import DataError, OutputError, RecipeError
from jobs.prepare import PrepareRecipe, run


def tone(path: Path, seconds: float = 1.0, rate: int = 16_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.sin(np.arange(int(seconds * rate)) * 0.1), rate)


def manifest(folder: Path, rows: list, name: str = "rows.jsonl") -> str:
    """Write a manifest of rows (dicts, or whole lines), and a second of sound for each row that names no audio."""
    lines = []
    for row in rows:
        if isinstance(row, dict) and "audio" not in row:
            row = {**row, "audio": f"audio/{row['id']}.flac"}
            tone(folder / row["audio"])
        lines.append(row if isinstance(row, str) else json.dumps(row))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


def prepare(
    tmp_path: Path, sources: list, **more
) -> tuple[Path, dict[str, set[str]], dict[tuple[int, str | None], str]]:
    """Run jobs.prepare; returns its folder, the ids of each split, and the reasons of dropped rows by (line, id)."""
    out = tmp_path / "out"
    run(PrepareRecipe(sources=sources, out=str(out), **more))
    ids = {folder.name: set(read_rows(str(folder)).ids.to_pylist()) for folder in out.iterdir() if folder.is_dir()}
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    return out, ids, {(row["line"], row["id"]): row["reason"] for row in dropped}


def tree(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


ALL = {"splits": {"train": 1.0}}


def test_rows_keep_their_files_bytes_and_get_their_measured_duration(tmp_path):
    tone(tmp_path / "in" / "low.wav", seconds=1.5, rate=8000)
    rows = [{"id": 7, "audio": "low.wav", "text": " Seven words. ", "duration_s": 99, "speaker": "s", "sex": "female"}]
    source = manifest(tmp_path / "in", [*rows, *({"id": f"x{i}", "text": f"text {i}"} for i in range(11))])
    out, ids, dropped = prepare(tmp_path, [source], rows_per_file=5, rows_per_group=2, **ALL)
    assert dropped == {}
    assert ids["train"] == {"7", *(f"x{i}" for i in range(11))}
    assert sorted(path.name for path in (out / "train").iterdir()) == [f"part-0000{part}.parquet" for part in range(3)]
    table = read_rows(str(out / "train"))
    index = table.ids.to_pylist().index("7")
    assert (table.duration_s[index], table.text(index)) == (1.5, "Seven words.")
    audio, name = RowReader(table.files).wav(table.file[index], table.row_group[index], table.row[index])
    assert (audio, name) == ((tmp_path / "in" / "low.wav").read_bytes(), "low.wav")
    summary = json.loads((out / "summary.json").read_text())
    assert summary == {"splits": {"train": {"rows": 12, "hours": round(12.5 / 3600, 4), "speakers": 1}}, "dropped": {}}


def test_every_bad_row_is_dropped_with_its_reason(tmp_path):
    folder = tmp_path / "in"
    for name, seconds in [("short.wav", 0.05), ("long.wav", 31), ("fine.wav", 1), ("slow.wav", 2)]:
        tone(folder / name, seconds)
    (folder / "text.wav").write_text("not audio")
    (folder / "text.raw").write_text("not audio")
    (folder / "cut.flac").write_bytes(b"")
    (folder / "none.wav").write_bytes((folder / "fine.wav").read_bytes()[:44])
    rows = [
        {"id": "good", "audio": "fine.wav", "text": "good one"},
        "{broken",
        "[1, 2]",
        {"id": "", "audio": "fine.wav", "text": "no id"},
        {"id": "a", "text": "no audio", "audio": None},
        {"id": "b", "audio": "fine.wav", "text": None},
        {"id": "c", "audio": "fine.wav", "text": " ... "},
        {"id": "d", "audio": "fine.wav", "text": "x"},
        {"id": "e", "audio": "short.wav", "text": "too short"},
        {"id": "f", "audio": "long.wav", "text": "too long"},
        {"id": "g", "audio": "text.wav", "text": "no sound"},
        {"id": "h", "audio": "cut.flac", "text": "no bytes"},
        {"id": "i", "audio": "gone.flac", "text": "no file"},
        {"id": "j", "audio": "none.wav", "text": "no samples"},
        {"id": "k", "audio": "fine.wav", "text": "far too many words " * 9},
        {"id": "good", "audio": "slow.wav", "text": "good again"},
        "",
        {"id": "l", "audio": "text.raw", "text": "no header"},
        '{"id": "m", "audio": "fine.wav", "text": "half a pair \\ud800"}',
    ]
    out, ids, dropped = prepare(tmp_path, [manifest(folder, rows)], **ALL)
    assert ids == {"train": {"good"}}
    unreadable = {
        (line, name): "unreadable audio" for line, name in [(11, "g"), (12, "h"), (13, "i"), (14, "j"), (18, "l")]
    }
    assert dropped == {
        (2, None): "not JSON",
        (3, None): "not JSON",
        (4, None): "no id",
        (5, "a"): "no audio",
        (6, "b"): "no text",
        (7, "c"): "no text",
        (8, "d"): "text too short",
        (9, "e"): "too short",
        (10, "f"): "too long",
        **unreadable,
        (15, "k"): "speech rate",
        (16, "good"): "duplicate id",
        (19, None): "not JSON",
    }
    details = {row["id"]: row["detail"] for row in map(json.loads, (out / "dropped.jsonl").read_text().splitlines())}
    assert str(folder / "gone.flac") in details["i"]
    assert details["f"] == "31.000 s, at most 30 s"
    counted = json.loads((out / "summary.json").read_text())["dropped"]
    several = {"not JSON": 3, "no text": 2, "unreadable audio": 5}
    once = ("no id", "no audio", "text too short", "too short", "too long", "speech rate", "duplicate id")
    assert counted == several | dict.fromkeys(once, 1)


def test_same_input_same_bytes_and_the_order_of_lines_moves_nothing(tmp_path):
    rows = [{"id": f"r{i}", "text": f"Text {i % 25}", "speaker": f"s{i % 50}"} for i in range(60)]
    rows += [{"id": "r3", "text": "another text", "audio": "audio/r3.flac"}]
    shares = {"splits": {"train": 0.6, "dev": 0.4}, "seed": 5}
    source = manifest(tmp_path / "in", rows)
    out, ids, dropped = prepare(tmp_path, [source], **shares)
    first = tree(out)
    out.rename(tmp_path / "first")
    prepare(tmp_path, [source], **shares)
    assert tree(out) == first
    out.rename(tmp_path / "second")
    random.Random(0).shuffle(rows)
    manifest(tmp_path / "in", rows)
    _, shuffled_ids, shuffled_dropped = prepare(tmp_path, [source], **shares)
    assert shuffled_ids == ids
    assert {name: digest for name, digest in tree(out).items() if "part" in name} == {
        n: d for n, d in first.items() if "part" in n
    }
    assert list(dropped.values()) == list(shuffled_dropped.values()) == ["duplicate id"]


def test_pinned_rows_win(tmp_path):
    pinned = manifest(tmp_path / "pinned", [{"id": "p", "text": "Hello, World!"}, {"id": "both", "text": "in both"}])
    other = manifest(tmp_path / "other", [{"id": "q", "text": "in both"}, {"id": "r", "text": "only train"}])
    free = manifest(
        tmp_path / "free",
        [{"id": "u", "text": "HELLO WORLD"}, {"id": "v", "text": "free"}, {"id": "p", "text": "id of p"}],
    )
    sources = [free, {"manifest": pinned, "split": "test"}, {"manifest": other, "split": "train"}]
    _, ids, dropped = prepare(tmp_path, sources, **ALL)
    assert ids == {"test": {"p", "both"}, "train": {"r", "v"}}
    assert dropped == {
        (1, "u"): "text stands in split test",
        (1, "q"): "text stands in split test",
        (3, "p"): "duplicate id",
    }


def test_splits_may_all_be_pinned(tmp_path):
    sources = [
        {"manifest": manifest(tmp_path / name, [{"id": name, "text": f"said in {name}"}]), "split": name}
        for name in ("test", "extra")
    ]
    _, ids, dropped = prepare(tmp_path, sources, splits={})
    assert ids == {"test": {"test"}, "extra": {"extra"}}
    assert not dropped


def test_disjoint_speakers_drops_rows_without_one(tmp_path):
    rows = [{"id": f"r{i}", "text": f"text {i}", "speaker": f"s{i % 6}"} for i in range(24)] + [
        {"id": "nobody", "text": "who"}
    ]
    _, ids, dropped = prepare(
        tmp_path, [manifest(tmp_path / "in", rows)], disjoint_speakers=True, splits={"a": 0.5, "b": 0.5}
    )
    speakers = {split: {int(name[1:]) % 6 for name in names} for split, names in ids.items()}
    assert speakers["a"] | speakers["b"] == set(range(6))
    assert not speakers["a"] & speakers["b"]
    assert dropped == {(25, "nobody"): "no speaker"}


@pytest.mark.parametrize("with_speakers", [False, True])
def test_splits_are_disjoint_whatever_is_pinned(with_speakers):
    draw = random.Random(1)
    for round_ in range(60):
        candidates = [
            Candidate(
                text=draw.choice(["{}", "{}!", "  {}, "]).format(
                    draw.choice(["Word ", "word "]) + str(draw.randrange(40))
                ),
                speaker=f"s{draw.randrange(15)}" if with_speakers else None,
                pinned=draw.choice([None, None, None, "test", "train", "extra"]) if round_ % 2 else None,
            )
            for _ in range(30)
        ]
        placements = assign_splits(candidates, {"train": 0.7, "dev": 0.3}, seed=round_)
        kept = [(c, p.split) for c, p in zip(candidates, placements, strict=True) if not p.conflict]
        for tie in (lambda c: comparable_text(c.text), lambda c: c.speaker or id(c)):
            homes: dict = {}
            assert all(homes.setdefault(tie(c), split) == split for c, split in kept)
        assert all(c.pinned in (None, split) for c, split in kept)
        assert {p.split for p in placements} <= {"train", "dev", "test", "extra"}
        if not round_ % 2:
            assert len(kept) == len(candidates)
        backwards = assign_splits(candidates[::-1], {"train": 0.7, "dev": 0.3}, seed=round_)
        assert backwards[::-1] == placements


def test_shares_are_met_and_stay_when_rows_are_added():
    texts = [f"sentence {index}" for index in range(4000)]
    shares = {"train": 0.9, "dev": 0.07, "test": 0.03}
    splits = [placement.split for placement in assign_splits([Candidate(text) for text in texts], shares, seed=1)]
    for split, share in shares.items():
        assert splits.count(split) / 4000 == pytest.approx(share, abs=0.015)
    half = assign_splits([Candidate(text) for text in texts[::2]], shares, seed=1)
    assert [placement.split for placement in half] == splits[::2]
    assert [p.split for p in assign_splits([Candidate(text) for text in texts], shares, seed=2)] != splits


def test_a_pinned_split_that_takes_a_share_draws_its_mates():
    group = [
        Candidate("one", "ann", "dev"),
        Candidate("two", "ann"),
        Candidate("two", "bob"),
        Candidate("three", "bob"),
    ]
    assert {(p.split, p.conflict) for p in assign_splits(group, {"train": 0.99, "dev": 0.01}, seed=0)} == {
        ("dev", None)
    }
    placements = assign_splits(group, {"train": 1.0}, seed=0)
    assert [p.conflict for p in placements] == [None, "speaker stands in split dev", None, None]


def test_clips_without_text_share_it_with_none():
    unlabelled = [Candidate("", name=f"clip{index}") for index in range(1000)] + [
        Candidate("...", pinned="dev", name="pinned")
    ]
    placements = assign_splits(unlabelled, {"train": 0.9, "dev": 0.1}, seed=0)
    assert not any(placement.conflict for placement in placements)
    assert [placement.split for placement in placements].count("dev") == pytest.approx(100, abs=30)
    mates = [Candidate("", "ann", "dev", "a"), Candidate("", "ann", None, "b"), Candidate("words", "ann", None, "c")]
    assert {placement.split for placement in assign_splits(mates, {"train": 0.9, "dev": 0.1}, seed=0)} == {"dev"}


def test_unlabelled_lines_are_written_where_a_source_keeps_them(tmp_path):
    rows = [
        {"id": "none"},
        {"id": "null", "text": None},
        {"id": "dots", "text": " ... "},
        {"id": "x", "text": "x"},
        {"id": "said", "text": "yes"},
    ]
    source = manifest(tmp_path / "in", rows)
    out, ids, dropped = prepare(tmp_path, [{"manifest": source, "unlabelled": "keep"}], **ALL)
    assert ids == {"train": {"none", "null", "dots", "said"}}
    assert dropped == {(4, "x"): "text too short"}
    table = read_rows(str(out / "train"))
    assert dict(zip(table.ids.to_pylist(), table.texts.to_pylist(), strict=True)) == {
        "none": "",
        "null": "",
        "dots": "",
        "said": "yes",
    }


def test_a_manifest_serves_a_source_for_each_split_that_it_holds(tmp_path):
    rows = [
        {"id": f"{corpus}{index}", "text": f"{corpus} {index}", "source": f"{corpus} v1"}
        for corpus in "ab"
        for index in range(3)
    ]
    source = manifest(tmp_path / "in", [*rows, {"id": "c", "text": "no source"}, "{broken"])
    sources = [{"manifest": source, "split": split, "only": {"source": f"{split}*"}} for split in "ab"]
    _, ids, dropped = prepare(tmp_path, sources, splits={})
    assert ids == {split: {f"{split}{index}" for index in range(3)} for split in "ab"}
    assert dropped == {(8, None): "not JSON"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["dropped"] == {"not JSON": 1}


def test_texts_are_compared_without_case_and_punctuation():
    assert comparable_text(" It's  HALF-past\n2! ") == comparable_text("it\u2019s half past 2") == "its half past 2"
    assert comparable_text("\u0915\u093f") != comparable_text("\u0915\u093e")  # vowel signs are no punctuation
    assert comparable_text("...!?") == ""


def test_results_are_kept_and_other_recipes_are_refused(tmp_path, capsys):
    source = manifest(tmp_path / "in", [{"id": "a", "text": "some text"}])
    out, _, _ = prepare(tmp_path, [source], **ALL)
    before = tree(out)
    manifest(tmp_path / "in", [{"id": "b", "text": "more text"}])
    prepare(tmp_path, [source], **ALL)
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(OutputError, match="seed was 0 there and is 1 now"):
        prepare(tmp_path, [source], seed=1, **ALL)
    assert tree(out) == before


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["nonsense", "{more"], "none of its 2 lines is JSON"),
        ([], "none of its 0 lines is JSON"),
        (
            [{"id": "a", "audio": "gone.wav", "text": "some text"}, {"id": "b"}],
            r"all rows were dropped \(",
        ),
        ([{"id": "a", "text": "some text"}], "split train got none of 1 rows for its share 0.95"),
    ],
)
def test_no_rows_is_a_data_error_and_leaves_nothing_behind(tmp_path, lines, words):
    lines = [{"audio": "gone.wav", **line} if isinstance(line, dict) and line["id"] == "b" else line for line in lines]
    source = manifest(tmp_path / "in", lines)
    with pytest.raises(DataError, match=words) as caught:
        prepare(tmp_path, [source])
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_wrong_splits_are_recipe_errors():
    for override, words in [
        ("splits={train: 0.5}", "splits add up to 0.5, want 1"),
        ("splits={a/b: 1}", "key splits.a/b: string should match pattern"),
        ("sources=[]", "sources"),
    ]:
        with pytest.raises(RecipeError, match=words):
            read_recipe(PrepareRecipe, None, ["out=x", "sources=[a.jsonl]", override])
    pinned = ["out=x", "sources=[{manifest: a.jsonl, split: train}]", "splits={}"]
    assert read_recipe(PrepareRecipe, None, pinned).long_sources()[0].split == "train"


JOINED = {"share": 0.8, "shortest_s": 3.0, "longest_s": 5.0, "pause_s": [0.1, 0.3]}


def sentences(folder: Path, speakers: list[str | None], count: int = 8) -> list[dict]:
    """Write clips of half a second to two for each speaker; each has noise of its own, and its id as text."""
    rows = []
    for speaker in speakers:
        for number in range(count):
            name = f"{folder.name}-{speaker}-{number}"
            noise = np.random.default_rng(len(rows)).uniform(-0.3, 0.3, 8000 + (5077 * len(rows)) % 24_000)
            (folder / "audio").mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / "audio" / f"{name}.flac", noise, SAMPLE_RATE)
            sex = {"ann": "female", "bob": "male"}.get(speaker or "")
            rows.append({"id": name, "audio": f"audio/{name}.flac", "text": f"{name}.", "speaker": speaker, "sex": sex})
    return rows


def columns(out: Path, split: str) -> tuple[dict[str, dict], dict[str, dict]]:
    """Read the single rows of a split and the joined ones by id, in the order of the files, with their samples."""
    rows = [row for path in sorted((out / split).iterdir()) for row in pq.read_table(path).to_pylist()]
    by_id = {row["ID"]: {**row, "samples": read_audio(row["wav"]["bytes"]).samples} for row in rows}
    assert len(by_id) == len(rows)
    joined = {name: row for name, row in by_id.items() if name.startswith("joined-")}
    return {name: row for name, row in by_id.items() if name not in joined}, joined


def test_joined_clips_are_clips_of_one_speaker_with_pauses_between_them(tmp_path, capsys):
    named = [*sentences(tmp_path / "in", ["ann", "bob"]), {"id": "silent", "speaker": "ann"}]
    named[3]["text"] = "in-ann-3"  # no full stop
    nameless = [{"manifest": manifest(tmp_path / name, sentences(tmp_path / name, [None]))} for name in ("x", "y")]
    sources = [{"manifest": manifest(tmp_path / "in", named), "unlabelled": "keep"}, *nameless]
    out, ids, dropped = prepare(tmp_path, sources, joined={**JOINED, "share": 2}, **ALL)
    single, joined = columns(out, "train")
    assert not dropped
    assert single.keys() | joined.keys() == ids["train"]
    assert len(single) == 8 * 4 + 1
    heard, orders = set(), []
    for row in joined.values():
        parts = [single[text.removesuffix(".")] for text in row["text"].split(" ")]
        assert row["text"] == " ".join(part["text"] for part in parts)
        assert len({part["ID"] for part in parts}) == len(parts) > 1
        assert len({part["ID"].rpartition("-")[0] for part in parts}) == 1  # one speaker, and without one, one source
        assert {(part["spk_id"], part["sex"]) for part in parts} == {(row["spk_id"], row["sex"])}
        assert row["wav"]["path"] == row["ID"] + ".flac"
        assert 3 <= len(row["samples"]) / SAMPLE_RATE <= 5
        assert row["duration"] == np.float32(len(row["samples"]) / SAMPLE_RATE)
        gaps = without(row["samples"], [part["samples"] for part in parts])
        assert all(1600 <= len(gap) <= 4800 and not gap.any() for gap in gaps)
        heard.add(parts[0]["ID"].rpartition("-")[0])
        orders.append([part["ID"] for part in parts])
    assert heard == {"in-ann", "in-bob", "x-None", "y-None"}
    assert orders != [sorted(order) for order in orders]
    single_s, joined_s = (
        sum(row["duration"] for row in single.values()) - 1,
        sum(row["duration"] for row in joined.values()),
    )
    assert 2 * single_s <= joined_s < 2 * single_s + 5
    summary = json.loads((out / "summary.json").read_text())
    assert summary["joined"] == {"train": {"rows": len(joined), "hours": pytest.approx(joined_s / 3600, abs=1e-4)}}
    assert summary["splits"]["train"]["rows"] == len(single)
    assert re.search(rf"^train joined +{len(joined)} +0\.02$", capsys.readouterr().out, re.MULTILINE)


def without(samples: np.ndarray, parts: list[np.ndarray]) -> list[np.ndarray]:
    """Return the samples between consecutive parts, which begin and end the samples; fails if a part is missing."""
    gaps, end = [], 0
    for part in parts:
        start = next(at for at in range(end, len(samples)) if np.array_equal(samples[at : at + 50], part[:50]))
        assert np.array_equal(samples[start : start + len(part)], part)
        gaps.append(samples[end:start])
        end = start + len(part)
    assert (len(gaps[0]), end) == (0, len(samples))
    return gaps[1:]


def test_joined_clips_hang_on_ids_and_seed_and_leave_other_rows_as_they_are(tmp_path):
    rows = sentences(tmp_path / "in", ["ann", "bob"], 30)
    in_train = {"joined": {**JOINED, "splits": ["train"]}}
    parquets, trains = [], []
    for number, more in enumerate([{}, in_train, in_train, {"joined": JOINED, "seed": 1}]):
        random.Random(number).shuffle(rows)
        source = manifest(tmp_path / "in", rows)
        out, _, _ = prepare(tmp_path, [source], splits={"train": 0.7, "dev": 0.3}, rows_per_file=16, **more)
        parquets.append({name: digest for name, digest in tree(out).items() if "part" in name})
        trains.append(columns(out, "train"))
        out.rename(tmp_path / f"out{number}")
    assert parquets[1] == parquets[2]
    assert (
        parquets[0].items() & parquets[1].items() == {item for item in parquets[0].items() if "dev" in item[0]} != set()
    )
    assert not trains[0][1]
    assert list(trains[0][0]) == list(trains[1][0])  # the single rows, in their order
    first_names = pq.read_table(min((tmp_path / "out1" / "train").iterdir()))["ID"].to_pylist()
    assert {name.startswith("joined-") for name in first_names} == {True, False}
    assert not {row["text"] for row in trains[1][1].values()} & {row["text"] for row in trains[3][1].values()}
    assert json.loads((tmp_path / "out3" / "summary.json").read_text())["joined"].keys() == {"train", "dev"}


def test_clips_that_cannot_be_joined_are_a_data_error(tmp_path):
    source = manifest(tmp_path / "in", [{"id": f"r{i}", "text": f"text {i}", "speaker": f"s{i}"} for i in range(6)])
    with pytest.raises(DataError, match=r"share=0.5 of split train is 0.00083 h, .* make 0 h of 3 to 5 s") as caught:
        prepare(tmp_path, [source], joined={**JOINED, "share": 0.5}, **ALL)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("joined", "words"),
    [
        ("{}", "joined.share is required"),
        ("{share: 0}", "joined.share=0: give a number over 0 and of at most 10"),
        ("{share: 1, shortest_s: 29}", r"shortest_s and longest_s are \[29.0, 28.0\]: give the smaller number first"),
        ("{share: 1, pause_s: [1, 0.5]}", r"pause_s is \[1.0, 0.5\]: give the smaller number first"),
        ("{share: 1, longest_s: 31}", "joined.longest_s is 31, over max_duration_s 30"),
        ("{share: 1, splits: [trian]}", "joined.splits names trian, the splits are dev, test, train"),
    ],
)
def test_wrong_joining_is_a_recipe_error(joined, words):
    with pytest.raises(RecipeError, match=words) as caught:
        read_recipe(
            PrepareRecipe, None, ["out=x", "sources=[a.jsonl, {manifest: b.jsonl, split: test}]", f"joined={joined}"]
        )
    assert "\n" not in str(caught.value)
