"""Labels take case and punctuation from transcripts, but never words."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from graft.text.prompts import style_text
from graft.text.punctuation import transfer_formatting


@pytest.mark.parametrize(
    ("label", "transcript", "expected", "agreed"),
    [
        ("HELLO MISTER SMITH HOW ARE YOU", "Hello, Mister Smith. How are you?", "Hello, Mister Smith. How are you?", 6),
        (
            "HELLO MISTER SMYTHE HOW ARE YOU",
            "Hello, Mister Smith. How are you?",
            "Hello, Mister smythe How are you?",
            5,
        ),
        ("SO WE PAID TWENTY ONE EUROS", "So we paid 21 euros.", "So we paid twenty one euros.", 4),
        ("THE TWENTY ONE E MAILS", "The twenty-one e-mails.", "The twenty-one e-mails.", 5),
        ("THE U S ARMY", "The U.S. Army", "The U.S. Army", 4),
        ("THE U N ARMY", "The U.S. Army", "The U n Army", 3),
        ("YES UH I DO", "Yes. I do!", "Yes. Uh I do!", 3),
        ("THEN I'D SAY I'M OFF", "Then he'd say he's off.", "Then I'd say I'm off.", 3),
        ("HE SAID NO AND LEFT", 'He said "No!" and left.', "He said No! and left.", 5),
        ("IT'S THE BOYS' TURN", "It’s the boys turn.", "It's the boys' turn.", 4),
        ("DONT GO", "Don't go.", "Dont go.", 1),
        ("WE WAITED", "We waited...", "We waited...", 2),
        ("WE WAITED", "We waited. Thank you for watching!", "We waited.", 2),
        ("NOTHING OF THE KIND", "", "Nothing of the kind", 0),
        ("", "Thank you.", "", 0),
        ("Already, it HAS some", "already it has some", "already, it has some", 4),
        ("YES, I DO!", "Yes. I do.", "Yes, I do!", 3),
        ("ONE  TWO\tTHREE", "One, two -- three", "One, two three", 3),
        ("PAID 5 20 NOW", "Paid 5.20 now.", "Paid 5 20 now.", 4),
        ("ПРИВЕТ МИР КАК ДЕЛА", "Привет, мир! Как дела?", "Привет, мир! Как дела?", 4),
        ("cómo estás muy bien", "¿Cómo estás? ¡Muy bien!", "¿Cómo estás? ¡Muy bien!", 4),
        ("यह एक परीक्षण है क्या", "यह एक परीक्षण है। क्या?", "यह एक परीक्षण है। क्या?", 5),
        ("こんにちは世界元気ですか", "こんにちは、世界。元気ですか?", "こんにちは、世界。元気ですか?", 12),
        ("TIE\u0302\u0301NG VIỆT", "Tiếng Việt.", "Tiếng Việt.", 2),
    ],
)
def test_what_agrees_is_written_as_it_was_heard(label, transcript, expected, agreed):
    formatted = transfer_formatting(label, transcript)
    assert (formatted.text, formatted.agreed) == (expected, agreed)


def test_only_english_writes_i_as_a_capital():
    assert transfer_formatting("JA I TY", "Tak a ty").text == "Ja I ty"
    assert transfer_formatting("JA I TY", "Tak a ty", language="pl").text == "Ja i ty"


def test_agreement_is_a_share_of_the_labels_words():
    assert transfer_formatting("ONE TWO THREE FOUR", "one two free").agreement == 0.5
    assert transfer_formatting("", "one").agreement == 0.0


WORDS = st.lists(
    st.sampled_from(
        [
            *("A", "be", "It's", "U", "S", "e-mail", "Don’t", "I", "42", "-5.2", ".", "—", "No!", '"Yes"', "x.y"),
            *("世界", "コー、", "हैं।", "¿Qué", "$3", "и"),
        ]
    ),
    max_size=9,
)


@given(st.one_of(WORDS.map(" ".join), st.text(max_size=40)), st.one_of(WORDS.map(" ".join), st.text(max_size=40)))
@example("A B", "a#b")
@example("ﬁNE ıF", "")
@example("STRASSE ß", "Straße ß")
def test_words_never_change(label, transcript):
    formatted = transfer_formatting(label, transcript)
    assert style_text(formatted.text, "lower") == style_text(label, "lower")
    assert 0 <= formatted.agreed <= formatted.words


@given(WORDS.map(" ".join))
def test_a_transcript_of_itself_changes_little(label):
    formatted = transfer_formatting(label.upper(), label)
    assert formatted.agreement in (0.0, 1.0)
    assert formatted.agreed == formatted.words
