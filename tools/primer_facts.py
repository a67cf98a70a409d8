"""Writes the facts that the source `primer` asks about, out of the Unicode CLDR tables that Babel carries.

    pip install babel==2.18.0 && python tools/primer_facts.py

The facts are stored, so that the rows of `primer` stay the same whatever version of Babel is installed.
"""

import json
import re
from datetime import date
from functools import cache
from pathlib import Path

import babel
from babel import Locale
from babel.core import get_global
from babel.numbers import get_currency_name, get_territory_currencies

INTO = Path(__file__).parents[1] / "src" / "potstill" / "sources" / "primer.json"
LANGUAGES = ("en", "es")

_CONTINENTS = {"Africa": "002", "America": "019", "Asia": "142", "Europe": "150"}  # time zone → CLDR (UN M.49) region
_TODAY = date(2025, 1, 1)  # of the currencies, so that rows do not change with the calendar

_LEFT_OUT = (
    "AE BS KM MH MV NL SB SC US "  # plural names, whose verbs would have to agree
    "TR "  # its one time zone lies in Europe, most of its land does not
    "AI AS AW AX BL BM BQ CK CW FK FO GF GG GI GL GP GS GU HK IM IO JE KY MF MO MQ MS NC NF NU PF PM PN PR RE SH SJ SX TC "
    "TF TK TW VG VI WF YT XK PS EH EA IC AC TA DG CX CC UM EU EZ UN"  # dependent, disputed, or no country
)


def main() -> None:
    about = {
        "source": f"Unicode CLDR as carried by Babel {babel.__version__}",
        "license": "Unicode License v3, https://www.unicode.org/license.txt; Copyright © 1991-2026 Unicode, Inc.",
        "written_by": "tools/primer_facts.py",
    }
    countries = {country: {language: facts(language, country) for language in LANGUAGES} for country in sorted(known())}
    written = json.dumps({"about": about, "countries": countries}, ensure_ascii=False, indent=1)
    INTO.write_text(written + "\n", encoding="utf-8")


def facts(language: str, country: str) -> dict[str, str]:
    """Name, currency, official language and continent in the words of a language, of a country in `known`."""
    continent = _territories(language)[_CONTINENTS[_zone_areas(country)[0]]]
    return {
        "name": _territories(language)[country],
        "currency": get_currency_name(_currencies(country)[0], count=1, locale=language),  # count=1: as in a sentence
        "language": Locale(language).languages[_official(country)[0]],
        "continent": "the Americas" if continent == "Americas" else continent,
    }


def known() -> list[str]:
    """Countries with a plain name and, in CLDR, one currency, one official language and one continent."""
    names = _territories("en"), _territories("es")
    return [
        country
        for country in names[0]
        if len(country) == 2 and country in names[1] and country not in _LEFT_OUT.split()
        if all(len(name[country].split()) <= 3 and not re.search(r"[&(]| [-y] ", name[country]) for name in names)
        if len(_currencies(country)) == len(_official(country)) == len(_zone_areas(country)) == 1
        if _zone_areas(country)[0] in _CONTINENTS
    ]


@cache
def _territories(language: str) -> dict[str, str]:
    """Names of countries and regions by their codes."""
    return {str(code): str(name) for code, name in Locale(language).territories.items()}


def _currencies(country: str) -> list[str]:
    return get_territory_currencies(country, start_date=_TODAY)


def _official(country: str) -> list[str]:
    """Official languages, without script; those of a region too where they are spoken by a fifth of the people."""
    spoken = get_global("territory_languages").get(country, {})
    return list(
        dict.fromkeys(
            language.split("_")[0]
            for language, facts in spoken.items()
            if facts["official_status"] in ("official", "de_facto_official")
            or (facts["official_status"] == "official_regional" and facts["population_percent"] >= 20)
        )
    )


def _zone_areas(country: str) -> list[str]:
    """First parts of the names of its time zones, such as Africa and Europe: CLDR's other containments are not in Babel."""
    return sorted({zone.split("/")[0] for zone in get_global("territory_zones").get(country, ())})


if __name__ == "__main__":
    main()
