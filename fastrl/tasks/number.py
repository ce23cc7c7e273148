"""Numbers as models write them: one exact value, or none.  A number is never read as another one: what could
be two of them, or goes on as an expression, is none.

    18   -5   +18   $18.00   \\$18   **18**   18 eggs   50%   90^\\circ   \\text{18}   x = 18   48/2 = 24
    1,234   1{,}234   1\\,234   1 234   1'234   1.234,56   1.234.567   1,00,000
    3/4   \\frac{3}{4}   \\frac34   1 1/2   1½   1.5e3   1.5 \\times 10^{3}
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

WINDOW = 240  # characters that an answer may take: what is read stays cheap
MAX_EXPONENT = 30
_SPACES = "\u00a0\u2009\u202f"
_MINUS = "\u2212\u2013\ufe63\uff0d"
_PARTS = re.compile("[\u00bc-\u00be\u2150-\u215e]")  # one half, three quarters, ... as one character

_STYLE = r"text(?:bf|it|rm|sf|tt|normal)?|math(?:bf|rm|sf|it)|mbox|emph|boldsymbol|bm|boxed|fbox"
_STYLED = re.compile(rf"\\(?:{_STYLE})\s*\{{([^{{}}]*)\}}")
_FRACTION = re.compile(
    r"\\[dtc]?frac\s*(?:\{\s*([0-9]{1,30})\s*\}|([0-9]))\s*(?:\{\s*([0-9]{1,30})\s*\}|([0-9]))"
)
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), instead)
    for pattern, instead in (
        (rf"[{_MINUS}]", "-"),
        (r"(?<=[-+])(?:\\?\$|[\u20ac\u00a3\u00a5\u20b9]) ?", ""),
        (r"\\(?:left|right|displaystyle|!)(?![a-zA-Z])", ""),
        (r"\{,\}", ","),
        (rf"(?<=[0-9])(?:\\[,;: ]|[{_SPACES} '\u2019_])(?=[0-9]{{3}}(?![0-9/]))", ","),
        (r"\\%", "%"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\u00b0|\\degree", " degrees"),
        (r"\\(?:times|cdot|ast)(?![a-zA-Z])|\u00d7|\u00b7", "*"),
        (r"\\approx(?![a-zA-Z])|\u2248|~", " "),
        (r"(?<![0-9])\*\*|\*\*(?![0-9])|__|`", " "),
        (r"\\[$()\[\],;: ]|\\quad|[$\u20ac\u00a3\u00a5\u20b9]", " "),
        (r"(?<![a-zA-Z])(?:USD|EUR|GBP|Rs\.?)(?![a-zA-Z])", " "),
    )
)
_PLAIN = r"[0-9]{1,30}(?:\.[0-9]{1,30})?|\.[0-9]{1,30}"
_COMMAS = (
    r"[0-9]{1,3}(?:,[0-9]{3}){1,9}(?:\.[0-9]{1,30})?|[0-9]{1,2}(?:,[0-9]{2}){1,9},[0-9]{3}(?:\.[0-9]{1,30})?"
)
_POINTS = r"[0-9]{1,3}(?:\.[0-9]{3}){1,9},[0-9]{1,30}|[0-9]{1,3}(?:\.[0-9]{3}){2,9}"
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)"
    r"(?:(?P<whole>[0-9]{1,30})\s+(?P<part>[0-9]{1,30})/(?P<of>[1-9][0-9]{0,29})"
    r"|10\s*\^\s*\{?(?P<power>[-+]?[0-9]{1,2})\}?"
    rf"|(?:(?P<points>{_POINTS})|(?P<top>{_COMMAS}|{_PLAIN}))"
    r"(?:\s*/\s*(?P<bottom>[1-9][0-9]{0,29}))?"
    r"(?:[eE](?P<e>[-+]?[0-9]{1,2})|\s*\*\s*10\s*\^\s*\{?(?P<ten>[-+]?[0-9]{1,2})\}?)?"
    r")"
)
# what makes of a number a part of something else
_GOES_ON = re.compile(
    r"[0-9]|[.,:'/][0-9]|[eE][-+]?[0-9]|\s+[0-9]|\s*[-+*/^]+\s*[0-9({\\.]|\s*\\[a-zA-Z]|\s*(?:\^|\u03c0)|/"
)
_ALONE = re.compile(r"[\s.})]*(?:degrees)?[\s.})]*$")
_NOISE = ' \t\r\n*=:>"{'


def read_number(text: str, *, alone: bool = False) -> Fraction | None:
    """The number that `text` begins with, after spaces, marks of LaTeX and Markdown, and currencies; or that
    stands behind the last `=` of its line.  None where there is none, or no single one; with `alone`, where
    anything but degrees follows.
    """
    line = _plain(text[:WINDOW].strip(_NOISE).partition("\n")[0])
    if alone:
        return _at_start(line, _ALONE)
    found = _at_start(line)
    if found is None and "=" in line:
        found = _at_start(line.rpartition("=")[2])
    return found


def boxed(text: str, start: int) -> str:
    """What a LaTeX box holds that opens before `start`, up to the brace that closes it."""
    depth = 1
    for end, mark in enumerate(text[start : start + WINDOW], start):
        depth += (mark == "{") - (mark == "}")
        if depth == 0:
            return text[start:end]
    return text[start : start + WINDOW]


def _plain(line: str) -> str:
    """The line without marks of LaTeX and Markdown."""
    line = _PARTS.sub(_written_out, line)
    for pattern, instead in _REWRITES:
        line = pattern.sub(instead, line)
    for _ in range(4):
        line = _STYLED.sub(r" \1 ", line)
    return _FRACTION.sub(_written_out, line)


def _written_out(match: re.Match[str]) -> str:
    """A fraction as `3/4`, apart from a whole number before it."""
    if match.re is _PARTS:
        fraction = unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/")
    else:
        fraction = f"{match[1] or match[2]}/{match[3] or match[4]}"
    before = match.string[: match.start()]
    return f" {fraction}" if before[-1:].isdigit() else fraction


def _at_start(line: str, rest: re.Pattern[str] | None = None) -> Fraction | None:
    line = line.lstrip(_NOISE)
    number = _NUMBER.match(line)
    if number is None or _GOES_ON.match(line, number.end()):
        return None
    if rest is not None and not rest.match(line, number.end()):
        return None
    exponent = int(number["power"] or number["e"] or number["ten"] or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    value = _magnitude(number) * Fraction(10) ** exponent
    return -value if number["sign"] == "-" else value


def _magnitude(number: re.Match[str]) -> Fraction:
    if number["power"]:
        return Fraction(1)
    if number["whole"]:
        return int(number["whole"]) + Fraction(int(number["part"]), int(number["of"]))
    if number["points"]:
        top = number["points"].replace(".", "").replace(",", ".")
    else:
        top = number["top"].replace(",", "")
    return Fraction(top) / int(number["bottom"] or 1)
