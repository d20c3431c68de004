"""Mixed languages: rows in another language than most, recognized by script and, for Latin letters, by common words."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence

from app.datasets.rules._base import MAX_ROWS, WORD, Rule, Say, Seen
from app.formats import Format, RowFinding
from app.formats._base import fix, shown

MIN_LETTERS, MIN_COMMON = 20, 4
MAX_LOOKED_AT, MAX_WORDS = 1500, 250
MAIN_SHARE = 0.6
"""Minimum share of a language to be the dataset's own; without one, none is an outlier."""

_SCRIPTS = {
    "Russian or another Cyrillic language": re.compile("[\u0400-\u04ff]"),
    "Greek": re.compile("[\u0370-\u03ff]"),
    "Arabic": re.compile("[\u0600-\u06ff]"),
    "Hebrew": re.compile("[\u0590-\u05ff]"),
    "Hindi or another language in Devanagari": re.compile("[\u0900-\u097f]"),
    "Thai": re.compile("[\u0e00-\u0e7f]"),
    "Korean": re.compile("[\uac00-\ud7af]"),
    "Japanese": re.compile("[\u3040-\u30ff]"),
    "Chinese": re.compile("[\u4e00-\u9fff]"),
}
_COMMON = {
    "English": "the and is of to in it you that this for with are was have not be your on what",
    "German": "der die das und ist nicht ein eine ich sie wir mit auf für von den dem es zu wie",
    "French": "le la les et est une des du que qui dans pour pas vous nous je sur avec ce il",
    "Spanish": "el la los las y es una de que en por para con no se del su lo como más",
    "Italian": "il lo la gli e è un una di che in per non con del sono si ma come della",
    "Portuguese": "o a os as e é um uma de que em para com não se do da por como mais",
    "Dutch": "de het een en is van niet ik je dat op te met voor zijn er maar om aan ook",
    "Polish": "w nie na się z jest że jak od za ale przez są czy może był tego który oraz dla",
    "Czech or Slovak": "je na se že jsou si jako ale není který také podle při byl sa ako nie som sú ktorý",
    "Croatian, Serbian or Bosnian": "je su kao koji nije ali što će iz biti samo sve može na se da od za ili bio",
    "Swedish": "och att det som är på av för inte till jag ett om har kan men från också den med",
    "Danish or Norwegian": "og det er ikke jeg på som til af av et har kan fra også blev ble den være med",
    "Finnish": "ja ei se että oli joka mutta ovat myös kun niin ole tai kuin voi jos sen olla hän tämä",
    "Hungarian": "az és hogy nem egy ez meg csak már volt mint vagy kell még lehet után ezt azt nagyon lesz",
    "Romanian": "și în cu nu este care din să mai sau sunt pentru dar ca au prin această fost pe",
    "Turkish": "ve bir bu için ile olarak çok daha gibi olan değil kadar sonra ama veya olduğu ki mi şey",
    "Vietnamese": "và là của có không được các trong cho một những với người để này khi đã từ như về",
    "Indonesian or Malay": "yang dan itu dengan untuk tidak ini dari dalam akan pada ada juga saya bisa karena atau adalah ke boleh",
    "Catalan": "els les i amb és més són aquest també pel dels una com però per què hi",
}
_WORDS: dict[str, set[str]] = {name: set(words.split()) for name, words in _COMMON.items()}
_BY_WORD: dict[str, list[str]] = {}
for _name, _set in _WORDS.items():
    for _word in _set:
        _BY_WORD.setdefault(_word, []).append(_name)


def language(text: str, words: Sequence[str] | None = None) -> str | None:
    """The language of a text, or None where it is too short or not clear. `words` are its words in lower case, where known."""
    text = text[:MAX_LOOKED_AT]
    if not text.isascii():
        letters = sum(character.isalpha() for character in text)
        for name, script in _SCRIPTS.items():
            if len(script.findall(text)) * 3 > max(letters, 12):
                return name
    votes: Counter[str] = Counter()
    for word, count in Counter(words[:MAX_WORDS] if words is not None else WORD.findall(text.lower())).items():
        for name in _BY_WORD.get(word, ()):
            votes[name] += count
    ranked = votes.most_common(2)
    if not ranked or ranked[0][1] < MIN_COMMON or (len(ranked) > 1 and ranked[0][1] < 1.3 * ranked[1][1]):
        return None
    return ranked[0][0]


class Languages(Rule):
    def __init__(self, say: Say, entry: Format, mapping: Mapping[str, str]) -> None:
        super().__init__(say, entry, mapping)
        self._names: dict[str, int] = {}
        self._lines, self._of = array("q"), array("h")

    def see(self, seen: Seen) -> None:
        if len(self._lines) >= MAX_ROWS:
            return
        trained = seen.trained if not self.classifies and seen.trained else seen.asked  # a prompt may speak another language
        found = language(" ".join(trained[:MAX_WORDS]), trained)
        if found is not None:
            self._lines.append(seen.line)
            self._of.append(self._names.setdefault(found, len(self._names)))

    def finish(self) -> None:
        counts = Counter(self._of)
        if len(counts) < 2:
            return
        main, count = counts.most_common(1)[0]
        if count < MAIN_SHARE * len(self._of):
            names = list(self._names)
            said = ", ".join(f"{names[key]} {number / len(self._of):.0%}" for key, number in counts.most_common(4))
            self.say(
                1, RowFinding("mixed_languages", f"The rows are in several languages, none of them the main one: {said}.", severity="note")
            )
            return
        names = list(self._names)
        for line, number in zip(self._lines, self._of, strict=True):
            if number != main:
                message = f"This row looks like {names[number]}, and most rows are {names[main]}."
                repair = fix("Remove row", "drop_row")
                self.say(line, RowFinding("other_language", message, None, shown(names[number], 60), "note", repair))
