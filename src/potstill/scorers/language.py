"""Which language texts are in: by script first, then by the small words that every sentence needs."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import regex

from potstill.scorers.text import fold, nfc

UNKNOWN = "und"  # ISO 639-2: undetermined

# a script that one language of the list alone is usually written in
_BY_SCRIPT = {
    "Hangul": "ko",
    "Thai": "th",
    "Lao": "lo",
    "Khmer": "km",
    "Myanmar": "my",
    "Tibetan": "bo",
    "Greek": "el",
    "Hebrew": "he",
    "Armenian": "hy",
    "Georgian": "ka",
    "Bengali": "bn",
    "Gurmukhi": "pa",
    "Gujarati": "gu",
    "Oriya": "or",
    "Tamil": "ta",
    "Telugu": "te",
    "Kannada": "kn",
    "Malayalam": "ml",
    "Sinhala": "si",
    "Ethiopic": "am",
}
_SEVERAL = ("Latin", "Cyrillic", "Arabic", "Devanagari", "Han", "Hiragana", "Katakana")
_SCRIPT = {name: regex.compile(rf"\p{{{name}}}") for name in (*_BY_SCRIPT, *_SEVERAL)}
_LETTERS = regex.compile(r"\p{L}")
_WORD = regex.compile(r"[\p{L}\p{M}]+")

# Small words: articles, prepositions, pronouns, auxiliaries. A word may stand in several lists; the difference decides.
_SMALL = {
    "Latin": {
        "en": "the of and to in is that it for was on are as with his they be at this have from or had by but not what "
        "all were when your can said there use an each which she how their if will up other about out many then them "
        "these so some would into has more its who you i we do does "
        "did my me our been could should than because where while between",
        "es": "el la los las de del y que en un una es por con no para se su al lo como más pero sus le ya este sí "
        "porque esta entre cuando muy sin sobre también me hasta hay donde "
        "quien desde todo nos durante son está fue qué cuál cómo según",
        "fr": "le la les de des du et à un une est que qui dans en pour pas sur avec ce il elle sont au aux par plus "
        "ne se son sa ses mais ou où nous vous ils être cette ces leur comme tout fait c d l j n qu s quel quelle était",
        "de": "der die das und ist in den von zu mit sich des auf für nicht ein eine einen dem es im an auch als "
        "werden aus er hat dass sie nach wird bei einer um am sind noch wie einem über "
        "so zum war haben nur oder aber vor zur bis wer was",
        "pt": "o a os as de do da dos das e que em um uma é por com não para se na no nas nos ao mais como mas foi ele "
        "ela sua seu ou quando muito já também só pelo pela até isso entre era depois sem mesmo aos você são está quem qual",
        "it": "il lo la i gli le di del della dei delle e che in un una è per con non si da al alla sono come anche "
        "più ma nel nella ha questo questa ci dal dalla se o suo sua chi quale era essere hanno della degli",
        "nl": "de het een van en in is dat op te zijn met voor niet aan er om ook als dan maar bij uit door naar heeft "
        "hebben wordt werd deze die ze hij zij wat worden kan over tot onder meer haar geen of ik je u wie waar",
        "ca": "el la els les de del dels i que en un una és per amb no es al als com més però seva seu són aquest "
        "aquesta ha va hi ho o si també quan molt entre on què",
        "sv": "och i att det som en på är av för med till den har de inte om ett han men var jag sig från vi så kan "
        "när år under också efter eller vad hur mot där",
        "da": "og i at det som en på er af for med til den har de ikke om et han men var jeg sig fra vi så kan når "
        "også efter eller hvad hvor mod der blev",
        "no": "og i det som en på er av for med til den har de ikke om et han men var jeg seg fra vi så kan når også "
        "etter eller hva hvor mot der ble",
        "pl": "i w z na do się nie że jest to o jak po co ale za od przez jego był dla tak być przy są tym oraz czy "
        "który która które może już tylko jako",
        "tr": "ve bir bu da de için ile çok ne daha gibi olan olarak o en ama kadar var ki sonra mi mı değil her şey "
        "ben sen veya ancak olduğu",
        "vi": "và là của có không được cho một các trong những với người này đó khi để ở đã từ như cũng về đến nhưng "
        "ra bạn nào trên tại theo hay",
        "id": "dan yang di untuk dengan dari ini itu adalah pada tidak dalam ke akan oleh juga atau ada saya anda kami "
        "mereka bisa dapat karena sebagai telah seperti",
        "ro": "și în de la a cu pe nu este că un o să din care pentru mai se sunt au fost ca dar sau prin al ale lui "
        "ei după când foarte",
    },
    "Cyrillic": {
        "ru": "и в не на что с он как это по но из у за то все так его от же вы бы для мы она был или если только "
        "когда ещё они чтобы есть где является какой",
        "uk": "і в не на що з він як це по але із у за то все так його від ж ви для ми вона був або якщо тільки коли "
        "ще вони щоб є та й до про де який",
        "bg": "и в не на че с той как това по но от за се да са е като или ако само когато още те има е със през към където",
    },
    "Arabic": {
        "ar": "في من على أن إلى هذا هذه التي الذي عن مع هو هي كان لا ما أو ثم بعد قد كل بين و",
        "fa": "در از به که این را با است برای آن یک می بر خود تا هم یا شد بود و",
        "ur": "کے میں کی ہے اور سے کا کو اس پر نے کہ ہیں یہ بھی ایک تھا",
    },
    "Devanagari": {
        "hi": "के में की है और से का को इस पर ने कि हैं यह भी एक था नहीं क्या",
        "mr": "आणि आहे या च्या हे एक ते तो ही मध्ये असे होते करून नाही आहेत",
        "ne": "र छ को मा यो एक हो पनि गर्न छन् भएको थियो तथा लागि",
    },
}
_LISTS = {
    script: {language: frozenset(map(nfc, text.split())) for language, text in lists.items()}
    for script, lists in _SMALL.items()
}

_ENOUGH = 0.15  # of the words must be small ones
_AGREED = 0.9  # of the rows that tell a language must tell the same
_TELL = 0.6  # of the rows with a sentence must tell, or half of them may be in a language that has no list
_SENTENCE = 6  # words


@dataclass(frozen=True)
class Guess:
    """The language of a source's rows.

    Attributes:
        language: ISO 639-1 code, or "und" where the rows do not tell.
        why: in a few words, for a person to judge.
    """

    language: str
    why: str


def guess(rows: Sequence[tuple[str, str]]) -> Guess:
    """The language of rows, each an answer and its question, where nine in ten of the rows that tell any agree.

    A row is in the language of its answer, or of its question where the answer is too short to tell. Where no row tells, all
    answers together do, or all texts. Deterministic, and the same in any order of the rows. Ours: word lists, no library.
    """
    votes = Counter(code for row in rows if (code := _first_known(row)) != UNKNOWN)
    if not votes:
        pooled = ["\n".join(sorted(texts)) for texts in ((row[0] for row in rows), (text for row in rows for text in row))]
        code = _first_known(pooled)
        return Guess(code, "too little text, or a language that is not on the list" if code == UNKNOWN else "all rows together")
    ordered = sorted(votes.items(), key=lambda item: (-item[1], item[0]))
    best, count = ordered[0]
    if count < _AGREED * votes.total():
        shares = ", ".join(f"{name} {n}" for name, n in ordered)
        return Guess(UNKNOWN, f"rows of several languages ({shares})")
    if count < _TELL * sum(len(_WORD.findall(" ".join(row))) >= _SENTENCE for row in rows):
        return Guess(UNKNOWN, f"only {count} of {len(rows)} rows tell ({best}); the others may be in another language")
    return Guess(best, f"in {count} of {len(rows)} rows looked at")


def _first_known(texts: Iterable[str]) -> str:
    return next((code for text in texts if (code := language_of(text)) != UNKNOWN), UNKNOWN)


def language_of(text: str) -> str:
    """ISO 639-1 code of a text, or "und": the script decides, and small words where several languages share it."""
    text = nfc(text)
    letters = len(_LETTERS.findall(text))
    counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPT.items()} if letters else {}
    counts["Han"] = cjk = sum(counts.get(name, 0) for name in ("Han", "Hiragana", "Katakana"))
    kana = cjk and counts.get("Hiragana", 0) + counts.get("Katakana", 0)
    script = max(counts, key=lambda name: counts[name])
    if not letters or counts[script] < 0.6 * letters:
        return UNKNOWN
    if script == "Han":
        return "ja" if kana > 0.1 * cjk else "zh"
    return _BY_SCRIPT.get(script) or _by_small_words(text, _LISTS[script])


def _by_small_words(text: str, lists: dict[str, frozenset[str]]) -> str:
    found = Counter(_WORD.findall(fold(text)))
    hits = {language: sum(n for word, n in found.items() if word in small) for language, small in lists.items()}
    (best, most), (_, next_most) = sorted(hits.items(), key=lambda item: (-item[1], item[0]))[:2]
    kinds = sum(word in lists[best] for word in found)
    clear = kinds >= 3 and most >= _ENOUGH * found.total() and most > next_most
    return best if clear else UNKNOWN
