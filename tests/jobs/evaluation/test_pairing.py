"""Answers find their clips, and what does not fit is counted or refused as it is documented."""

import pytest

from graft.errors import DataError
from jobs.evaluation.pairing import pair
from jobs.evaluation.predictions import Prediction


def reference(clip_id: str, text: str = "good morning", set_name: str | None = None, **known: object) -> Prediction:
    return Prediction(clip_id, set_name, reference=text, **known)  # type: ignore[arg-type]


def answer(clip_id: str, text: str | None = "good", system: str = "one", **known: object) -> Prediction:
    return Prediction(clip_id, system=system, hypothesis=text, **known)  # type: ignore[arg-type]


def test_answers_are_put_beside_references_in_the_order_of_those() -> None:
    (found,), misfits = pair(
        [answer("b", "b1"), reference("a"), reference("b"), answer("a", "a2", "two"), answer("a", "a1")]
    )
    assert (found.name, found.systems) == ("all", ["one", "two"])
    assert [(clip.known.id, clip.text_of("one"), clip.text_of("two")) for clip in found.clips] == [
        ("a", "a1", "a2"),
        ("b", "b1", None),
    ]
    assert misfits.to_json() == {"unknown": {}, "doubled": {}}


def test_ids_without_a_reference_are_listed() -> None:
    (found,), misfits = pair([reference("a"), answer("a"), answer("x"), answer("y")])
    assert len(found.clips) == 1
    assert misfits.to_json()["unknown"] == {"one": ["x", "y"]}
    with pytest.raises(DataError, match=r"no id of a hypothesis .*: one has 'x', the references have 'a': give both"):
        pair([reference("a"), answer("x")])


def test_doubled_answers_are_listed_and_the_last_one_counts_unless_it_failed() -> None:
    (found,), misfits = pair(
        [
            *map(reference, "abc"),
            *(answer("a", "early"), answer("a", "late")),
            *(answer("b", "same"), answer("b", "same")),
            *(answer("c", None, error="killed"), answer("c", "text"), answer("c", None, error="killed")),
        ]
    )
    assert [clip.text_of("one") for clip in found.clips] == ["late", "same", "text"]
    assert misfits.to_json()["doubled"] == {"one": ["a", "c", "c"]}


def test_doubled_references_count_once_unless_they_differ() -> None:
    (found,), _ = pair([reference("a"), reference("a", "good  morning"), answer("a")])
    assert len(found.clips) == 1
    with pytest.raises(DataError, match="clip a has two references, 'good morning' and 'good night'"):
        pair([reference("a"), reference("a", "good night"), answer("a")])


def test_sets_keep_equal_ids_apart() -> None:
    references = [reference("a", "x", "dev"), reference("a", "y", "test"), reference("b", "z", "test")]
    sets, _ = pair([*references, answer("a", set_name="test"), answer("b")])  # b is in one set alone
    assert [(one.name, [clip.text_of("one") for clip in one.clips]) for one in sets] == [
        ("dev", [None]),
        ("test", ["good", "good"]),
    ]
    assert [list(one.systems) for one in sets] == [[], ["one"]]
    with pytest.raises(DataError, match="the id a is that of clips in several places"):
        pair([*references, answer("a")])
    with pytest.raises(DataError, match="no id of a hypothesis"):
        pair([*references, answer("a", set_name="train")])


def test_paths_fit_by_their_file_names_where_no_id_does() -> None:
    (found,), _ = pair([reference("a"), reference("b.1"), answer("wav/a.flac"), answer("wav/b.1.wav")])
    assert [clip.text_of("one") for clip in found.clips] == ["good", "good"]
    (found,), misfits = pair([reference("a"), reference("b"), answer("a"), answer("wav/b.flac")])
    assert [clip.text_of("one") for clip in found.clips] == ["good", None]
    assert misfits.to_json()["unknown"] == {"one": ["wav/b.flac"]}


def test_the_references_of_answers_count_unless_others_are_given() -> None:
    lines = [reference("a"), answer("a"), answer("b", reference="more")]
    (found,), _ = pair(lines)
    assert [clip.reference for clip in found.clips] == ["good morning", "more"]
    (found,), misfits = pair(lines, own_references=False)
    assert [clip.reference for clip in found.clips] == ["good morning"]
    assert misfits.to_json()["unknown"] == {"one": ["b"]}


def test_what_only_answers_tell_of_a_clip_is_known() -> None:
    (found,), _ = pair([reference("a", sex="f"), answer("a", duration_s=2.0, sex="m", more={"snr": 5})])
    known = found.clips[0].known
    assert (known.duration_s, known.sex, known.more) == (2.0, "f", {"snr": 5})


def test_files_of_one_kind_alone_are_refused() -> None:
    with pytest.raises(DataError, match="none of the files holds a reference"):
        pair([answer("a")])
    with pytest.raises(DataError, match="there are references, but no hypotheses"):
        pair([reference("a")])
