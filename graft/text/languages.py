"""Name languages by their codes (ISO 639-1), as Whisper does, which has a code of ISO 639-3 for those without one."""

import re

from graft.errors import DataError

_CODE = re.compile(r"([a-z]{2,3})(?:[-_][\w-]*)?")
_REGION = re.compile(r"\s*\(.*\)$")  # English (US)
_ISO_639_3 = """
afr:af alb:sq amh:am ara:ar arm:hy asm:as aze:az bak:ba baq:eu bel:be ben:bn bod:bo bos:bs bre:br bul:bg bur:my
cat:ca ces:cs chi:zh cym:cy cze:cs dan:da deu:de dut:nl ell:el eng:en est:et eus:eu fao:fo fas:fa fin:fi fra:fr
fre:fr geo:ka ger:de glg:gl gre:el guj:gu hat:ht hau:ha heb:he hin:hi hrv:hr hun:hu hye:hy ice:is ind:id isl:is
ita:it jav:jw jpn:ja kan:kn kat:ka kaz:kk khm:km kor:ko lao:lo lat:la lav:lv lin:ln lit:lt ltz:lb mac:mk mal:ml
mao:mi mar:mr may:ms mkd:mk mlg:mg mlt:mt mon:mn mri:mi msa:ms mya:my nep:ne nld:nl nno:nn nob:no nor:no oci:oc
pan:pa per:fa pol:pl por:pt pus:ps ron:ro rum:ro rus:ru san:sa sin:si slk:sk slo:sk slv:sl sna:sn snd:sd som:so
spa:es sqi:sq srp:sr sun:su swa:sw swe:sv tam:ta tat:tt tel:te tgk:tg tgl:tl tha:th tib:bo tuk:tk tur:tr ukr:uk
urd:ur uzb:uz vie:vi wel:cy yid:yi yor:yo zho:zh
"""
_OTHER_CODES = {"cmn": "zh", "fil": "tl", "iw": "he", "jv": "jw", "nb": "no"} | dict(
    pair.split(":") for pair in _ISO_639_3.split()
)
"""Codes that Whisper writes otherwise: older ones, and those of ISO 639-2 and 639-3."""


def language_code(language: str) -> str:
    """Return the code of a language that is given by a code, with or without a region, or by its English name.

    Raises DataError for any other text.
    """
    given = _REGION.sub("", language.strip().lower())
    if found := _CODE.fullmatch(given):
        return _OTHER_CODES.get(found[1], found[1])
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    if given not in TO_LANGUAGE_CODE:
        raise DataError(f"language {language!r:.80} is none that is known: give its code by ISO 639-1, such as de")
    return TO_LANGUAGE_CODE[given]


def language_name(code: str) -> str:
    """Return the English name of a language, or its code where Whisper does not know it."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    return LANGUAGES[code].title() if code in LANGUAGES else code
