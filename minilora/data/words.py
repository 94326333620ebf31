"""Words in any script: what search, keyword recall, the check for leaks and copied fields take for a word.

Python's `\\w` has no combining marks, so a word in Hindi would be several; and Japanese, without a space, would be one.
"""

from __future__ import annotations

import re
from unicodedata import category, is_normalized, normalize

UNSPACED = (  # Thai, Lao, Burmese, Khmer, Japanese, Chinese; Korean, whose particles are written onto the word
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff"
)
_UNSPACED, _PAIR = re.compile(f"[{UNSPACED}]"), re.compile(f"[{UNSPACED}]{{1,2}}")
_IDEOGRAPHS = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_DOTS = {0x0307: None, 0x0131: "i"}  # of the Turkish İ and ı: both count as i
_OPTIONAL = re.compile(  # joiners, soft hyphens, the vowel marks of Hebrew and Arabic, and what stretches a word
    "[\u00ad\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06dc\u200c\u200d]"
)


class _Kinds(dict[int, str]):
    """For `str.translate`: M for a combining mark or a joiner, U for a letter of a script without spaces, w for another
    letter or a digit, _ for itself, and a space for all else.
    """

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if category(character)[0] == "M" or code in (0x200C, 0x200D):
            kind = "M"
        elif character.isalnum():
            kind = "U" if _UNSPACED.match(character) else "w"
        else:
            kind = "_" if character == "_" else " "
        self[code] = kind
        return kind


KINDS = _Kinds()


def folded(text: str) -> str:
    """A text as it is compared: without case, with single spaces, and however its accents, digits and letters are
    encoded or how wide.

    >>> folded("Caf\\u0065\\u0301  １４") == folded("CAFÉ 14")
    True
    """
    text = text.lower() if text.isascii() else normalize("NFKC", normalize("NFKC", text).casefold()).translate(_DOTS)
    return " ".join(text.split())


def words(text: str) -> list[str]:
    """The words of a text, `folded`. Where words have no spaces between them, pairs of characters take their place, as
    in Lucene's CJKAnalyzer, and single ideographs, many of which are words.

    >>> words("Is it naïve?"), words("返品です")
    (['is', 'it', 'naïve'], ['返品', '品で', 'です', '返', '品'])
    """
    text, found = _OPTIONAL.sub("", folded(text)), list[str]()
    if text.isascii():
        return re.findall(r"\w+", text)
    for run in re.finditer("U[UM]*|[wM_]+", text.translate(KINDS)):
        part = text[slice(*run.span())]
        if run[0][0] == "U":
            found += [part[i : i + 2] for i in range(max(1, len(part) - 1))]
            found += _IDEOGRAPHS.findall(part) if len(part) > 1 else []
        else:
            found.append(part)
    return found


def length(text: str) -> int:
    """About how many words a text has; two characters count as one where there are no spaces.

    >>> length("a well-known word"), length("返品です")
    (3, 2)
    """
    return len(_PAIR.sub(" x ", text).split())


def spelled(text: str) -> str:
    """A text that is not in the usual normal form with escapes: it would look like another one.

    >>> print(spelled("é"), spelled("e\\u0301"))
    é e\\u0301
    """
    return text if is_normalized("NFC", text) else ascii(text)[1:-1]
