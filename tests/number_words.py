"""Numbers in English and in German words: a translation task that is small, exact, and cannot be learned by heart."""

from __future__ import annotations

from torchrelay_worker.training.data import Table

LIMIT = 10_000

ENGLISH = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen
"""
ENGLISH_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
GERMAN = """
null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn
achtzehn neunzehn
"""
GERMAN_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig"

_ENGLISH, _ENGLISH_TENS, _GERMAN, _GERMAN_TENS = map(str.split, (ENGLISH, ENGLISH_TENS, GERMAN, GERMAN_TENS))


def english(number: int) -> str:
    """Return a number from 0 to 9999 in words: 1234 is `one thousand two hundred thirty-four`."""
    words: list[str] = []
    thousands, rest = divmod(number, 1000)
    hundreds, rest = divmod(rest, 100)
    if thousands:
        words += [_ENGLISH[thousands], "thousand"]
    if hundreds:
        words += [_ENGLISH[hundreds], "hundred"]
    if rest >= 20:
        tens, ones = divmod(rest, 10)
        words.append(_ENGLISH_TENS[tens - 2] + (f"-{_ENGLISH[ones]}" if ones else ""))
    elif rest or not number:
        words.append(_ENGLISH[rest])
    return " ".join(words)


def german(number: int) -> str:
    """Return a number from 0 to 9999 in words: 1234 is `eintausendzweihundertvierunddreißig`."""
    thousands, rest = divmod(number, 1000)
    hundreds, rest = divmod(rest, 100)
    word = (_stem(thousands) + "tausend" if thousands else "") + (_stem(hundreds) + "hundert" if hundreds else "")
    if rest >= 20:
        tens, ones = divmod(rest, 10)
        return word + (f"{_stem(ones)}und" if ones else "") + _GERMAN_TENS[tens - 2]
    return word + (_GERMAN[rest] if rest or not number else "")


def _stem(digit: int) -> str:
    return "ein" if digit == 1 else _GERMAN[digit]


def table(numbers: range = range(LIMIT), *, reverse: bool = False) -> Table:
    """Return the numbers as a dataset with the columns `source` and `target`: English and German, or the reverse."""
    pair = [[english(n) for n in numbers], [german(n) for n in numbers]]
    source, target = reversed(pair) if reverse else pair
    return Table({"source": source, "target": target})
