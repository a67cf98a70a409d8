"""Families of small problems: what is asked, how it is solved in steps, the program, and the same answer found in another
way."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random
from typing import Any, Literal

Language = Literal["en", "es"]
Reads = Literal["ints", "int", "word", "words", "clock"]


@dataclass(frozen=True)
class Input:
    """One kind of input.

    Attributes:
        named: as statements name it, by language.
        step: the first step of a solution, by language.
        line: the first line of a program.
        parse: the data of a line of input.
    """

    named: dict[Language, str]
    step: dict[Language, str]
    line: str
    parse: Callable[[str], Any]


INPUTS: dict[Reads, Input] = {
    "ints": Input(
        {"en": "a line of integers", "es": "una línea de enteros"},
        {"en": "Read the integers into the list xs.", "es": "Leer los enteros en la lista xs."},
        "xs = [int(x) for x in input().split()]",
        lambda line: [int(part) for part in line.split()],
    ),
    "int": Input(
        {"en": "an integer n", "es": "un entero n"},
        {"en": "Read the integer n.", "es": "Leer el entero n."},
        "n = int(input())",
        int,
    ),
    "word": Input(
        {"en": "a word s", "es": "una palabra s"},
        {"en": "Read the word s.", "es": "Leer la palabra s."},
        "s = input()",
        str,
    ),
    "words": Input(
        {"en": "a line of words", "es": "una línea de palabras"},
        {"en": "Read the words into the list ws.", "es": "Leer las palabras en la lista ws."},
        "ws = input().split()",
        str.split,
    ),
    "clock": Input(
        {"en": "a time as HH:MM", "es": "una hora como HH:MM"},
        {"en": "Read the hours h and the minutes m.", "es": "Leer las horas h y los minutos m."},
        'h, m = map(int, input().split(":"))',
        lambda line: tuple(int(part) for part in line.split(":")),
    ),
}


@dataclass(frozen=True, eq=False)
class Family:
    """Problems that differ in one constant, written `{a}` in texts and program.

    Attributes:
        reads: kind of input.
        constants: the values of `{a}`.
        asked: what is to be printed, by language: a noun phrase.
        step: the second step of a solution, by language.
        expression: the program's second line binds it to `r`.
        solve: data and constant -> what `r` must print, found in another way than by the program.
        listed: whether `r` is a list whose items are printed with blanks between.
        bounds: of the integer n.
    """

    name: str
    reads: Reads
    constants: Sequence[int | str]
    asked: dict[Language, str]
    step: dict[Language, str]
    expression: str
    solve: Callable[[Any, Any], Any]
    listed: bool = False
    bounds: tuple[int, int] = (1, 60)

    def program(self, constant: int | str) -> str:
        """The reference solution: three lines."""
        shown = "print(*r)" if self.listed else "print(r)"
        return f"{INPUTS[self.reads].line}\nr = {filled(self.expression, constant)}\n{shown}"

    def expected(self, line: str, constant: int | str) -> str:
        """What must be printed for a line of input."""
        found = self.solve(INPUTS[self.reads].parse(line), constant)
        return " ".join(map(str, found)) if self.listed else str(found)

    def draw(self, random: Random, constant: int | str) -> str:
        """A line of input, in which the constant matters often."""
        match self.reads:
            case "ints":
                return " ".join(str(_number(random, constant)) for _ in range(random.randint(5, 8)))
            case "int":
                return str(random.randint(*self.bounds))
            case "word":
                return _word(random, constant)
            case "words":
                return " ".join(_word(random, constant) for _ in range(random.randint(5, 7)))
            case "clock":
                if random.random() < 0.2:  # so late that minutes added pass midnight
                    return f"23:{random.randint(60 - min(int(constant), 59), 59):02}"
                return f"{random.randrange(24):02}:{random.randrange(60):02}"


def filled(text: str, constant: int | str) -> str:
    """A text with its constant."""
    return text.replace("{a}", str(constant))


def _number(random: Random, constant: int | str) -> int:
    near = int(constant) if isinstance(constant, int) else 5
    if random.random() < 0.45:
        return random.choice((near, near, 2 * near, 3 * near, near + 1, max(0, near - 1)))
    return random.randint(0, 40)


def _word(random: Random, constant: int | str) -> str:
    letters = [random.choice("bcdfglmnprst") + random.choice("aeiou") for _ in range(random.randint(2, 4))]
    word = "".join(letters) + random.choice(("", "", "n", "s", "r"))
    if isinstance(constant, str) and len(constant) == 1 and constant.isalpha() and random.random() < 0.6:
        at = random.randrange(len(word))
        letter = constant if random.random() < 0.8 else chr(max(ord("a"), ord(constant) - 1))
        word = word[:at] + letter + word[at + 1 :]
    return word


_FEW, _SOME, _MANY = range(2, 6), range(2, 12), range(2, 22)
_LETTERS = "abcdefgilmnoprstu"


def _divisors(n: int) -> list[int]:
    return [low for low in range(1, n + 1) if n // low * low == n]


def _primes(start: int, end: int) -> int:
    return sum(len(_divisors(n)) == 2 for n in range(start, end + 1))


def _later(clock: tuple[int, int], minutes: int) -> str:
    total = (clock[0] * 60 + clock[1] + minutes) % 1440
    return f"{total // 60:02}:{total % 60:02}"


def _shifted(word: str, by: int) -> str:
    return "".join(chr((ord(letter) - ord("a") + by) % 26 + ord("a")) for letter in word)


def _of(
    name: str,
    reads: Reads,
    constants: Sequence[int | str],
    asked: tuple[str, str],
    step: tuple[str, str],
    expression: str,
    solve: Callable[[Any, Any], Any],
    *,
    listed: bool = False,
    bounds: tuple[int, int] = (1, 60),
) -> Family:
    def both(texts: tuple[str, str]) -> dict[Language, str]:
        return {"en": texts[0], "es": texts[1]}

    return Family(name, reads, constants, both(asked), both(step), expression, solve, listed, bounds)


FAMILIES: tuple[Family, ...] = (
    _of(
        "sum over",
        "ints",
        _MANY,
        ("the sum of those greater than {a}", "la suma de los que son mayores que {a}"),
        ("Add those greater than {a}.", "Sumar los que son mayores que {a}."),
        "sum(x for x in xs if x > {a})",
        lambda xs, a: sum(xs) - sum(x for x in xs if x <= a),
    ),
    _of(
        "count over",
        "ints",
        _MANY,
        ("how many of them are greater than {a}", "cuántos de ellos son mayores que {a}"),
        ("Count those greater than {a}.", "Contar los que son mayores que {a}."),
        "sum(x > {a} for x in xs)",
        lambda xs, a: len(xs) - len([x for x in xs if x <= a]),
    ),
    _of(
        "count under",
        "ints",
        _MANY,
        ("how many of them are less than {a}", "cuántos de ellos son menores que {a}"),
        ("Count those less than {a}.", "Contar los que son menores que {a}."),
        "sum(x < {a} for x in xs)",
        lambda xs, a: len([x for x in xs if a - x > 0]),
    ),
    _of(
        "sum multiples",
        "ints",
        _SOME,
        ("the sum of the multiples of {a}", "la suma de los múltiplos de {a}"),
        ("Add those that leave remainder 0 when divided by {a}.", "Sumar los que dan resto 0 al dividir entre {a}."),
        "sum(x for x in xs if x % {a} == 0)",
        lambda xs, a: sum(x for x in xs if x // a * a == x),
    ),
    _of(
        "count multiples",
        "ints",
        _SOME,
        ("how many of them are multiples of {a}", "cuántos de ellos son múltiplos de {a}"),
        ("Count those that leave remainder 0 when divided by {a}.", "Contar los que dan resto 0 al dividir entre {a}."),
        "sum(x % {a} == 0 for x in xs)",
        lambda xs, a: len([x for x in xs if x // a * a == x]),
    ),
    _of(
        "largest plus",
        "ints",
        _MANY,
        ("the largest of them plus {a}", "el mayor de ellos más {a}"),
        ("Take the largest and add {a}.", "Tomar el mayor y sumar {a}."),
        "max(xs) + {a}",
        lambda xs, a: sorted(xs)[-1] + a,
    ),
    _of(
        "smallest times",
        "ints",
        _SOME,
        ("the smallest of them times {a}", "el menor de ellos por {a}"),
        ("Take the smallest and multiply it by {a}.", "Tomar el menor y multiplicarlo por {a}."),
        "min(xs) * {a}",
        lambda xs, a: sorted(xs)[0] * a,
    ),
    _of(
        "span times",
        "ints",
        _SOME,
        ("the difference of the largest and the smallest, times {a}", "la diferencia entre el mayor y el menor, por {a}"),
        ("Subtract the smallest from the largest and multiply by {a}.", "Restar el menor del mayor y multiplicar por {a}."),
        "(max(xs) - min(xs)) * {a}",
        lambda xs, a: a * sorted(xs)[-1] - a * sorted(xs)[0],
    ),
    _of(
        "add to each",
        "ints",
        _MANY,
        ("each of them plus {a}, on one line", "cada uno de ellos más {a}, en una línea"),
        ("Add {a} to each.", "Sumar {a} a cada uno."),
        "[x + {a} for x in xs]",
        lambda xs, a: [sum((x, a)) for x in xs],
        listed=True,
    ),
    _of(
        "times each",
        "ints",
        _SOME,
        ("each of them times {a}, on one line", "cada uno de ellos por {a}, en una línea"),
        ("Multiply each by {a}.", "Multiplicar cada uno por {a}."),
        "[x * {a} for x in xs]",
        lambda xs, a: [sum([x] * a) for x in xs],
        listed=True,
    ),
    _of(
        "remainder of each",
        "ints",
        _SOME,
        ("the remainder of each when divided by {a}, on one line", "el resto de cada uno al dividir entre {a}, en una línea"),
        ("Take the remainder of each when divided by {a}.", "Tomar el resto de cada uno al dividir entre {a}."),
        "[x % {a} for x in xs]",
        lambda xs, a: [x - x // a * a for x in xs],
        listed=True,
    ),
    _of(
        "without",
        "ints",
        _MANY,
        ("all of them but those equal to {a}, on one line", "todos ellos menos los iguales a {a}, en una línea"),
        ("Keep those different from {a}.", "Conservar los distintos de {a}."),
        "[x for x in xs if x != {a}]",
        lambda xs, a: [x for x in xs if x < a or x > a],
        listed=True,
    ),
    _of(
        "clip",
        "ints",
        _MANY,
        (
            "them with each one greater than {a} replaced by {a}, on one line",
            "ellos con cada uno mayor que {a} cambiado por {a}, en una línea",
        ),
        ("Take the smaller of each and {a}.", "Tomar el menor entre cada uno y {a}."),
        "[min(x, {a}) for x in xs]",
        lambda xs, a: [a if x > a else x for x in xs],
        listed=True,
    ),
    _of(
        "count equal",
        "ints",
        _MANY,
        ("how many times {a} stands among them", "cuántas veces está {a} entre ellos"),
        ("Count those equal to {a}.", "Contar los iguales a {a}."),
        "xs.count({a})",
        lambda xs, a: len([x for x in xs if x == a]),
    ),
    _of(
        "sum of largest",
        "ints",
        _FEW,
        ("the sum of the {a} largest", "la suma de los {a} mayores"),
        ("Sort them and add the last {a}.", "Ordenarlos y sumar los últimos {a}."),
        "sum(sorted(xs)[-{a}:])",
        lambda xs, a: sum(sorted(xs, reverse=True)[:a]),
    ),
    _of(
        "smallest few",
        "ints",
        _FEW,
        ("the {a} smallest in order, on one line", "los {a} menores en orden, en una línea"),
        ("Sort them and keep the first {a}.", "Ordenarlos y conservar los primeros {a}."),
        "sorted(xs)[:{a}]",
        lambda xs, a: sorted(xs, reverse=True)[::-1][0:a],
        listed=True,
    ),
    _of(
        "place when sorted",
        "ints",
        range(1, 6),
        (
            "the one at place {a} when sorted, where the smallest has place 1",
            "el que queda en el lugar {a} al ordenar, donde el menor tiene el lugar 1",
        ),
        ("Sort them and take place {a}, which is index {a} - 1.", "Ordenarlos y tomar el lugar {a}, que es el índice {a} - 1."),
        "sorted(xs)[{a} - 1]",
        lambda xs, a: [x for _, x in zip(range(a), sorted(xs), strict=False)][-1],
    ),
    _of(
        "sum of first",
        "ints",
        _FEW,
        ("the sum of the first {a}", "la suma de los primeros {a}"),
        ("Add the first {a}.", "Sumar los primeros {a}."),
        "sum(xs[:{a}])",
        lambda xs, a: sum(xs[i] for i in range(a)),
    ),
    _of(
        "sum of last",
        "ints",
        _FEW,
        ("the sum of the last {a}", "la suma de los últimos {a}"),
        ("Add the last {a}.", "Sumar los últimos {a}."),
        "sum(xs[-{a}:])",
        lambda xs, a: sum(xs) - sum(xs[: len(xs) - a]),
    ),
    _of(
        "every so many",
        "ints",
        range(2, 6),
        (
            "every one at an index divisible by {a}, on one line, where the first has index 0",
            "cada uno en un índice divisible por {a}, en una línea, donde el primero tiene el índice 0",
        ),
        ("Take them in steps of {a}.", "Tomarlos en pasos de {a}."),
        "xs[::{a}]",
        lambda xs, a: [x for i, x in enumerate(xs) if i % a == 0],
        listed=True,
    ),
    _of(
        "rotate",
        "ints",
        range(1, 6),
        ("them with the first {a} moved to the end, on one line", "ellos con los primeros {a} pasados al final, en una línea"),
        ("Put the first {a} after the others.", "Poner los primeros {a} después de los otros."),
        "xs[{a}:] + xs[:{a}]",
        lambda xs, a: [xs[(i + a) % len(xs)] for i in range(len(xs))],
        listed=True,
    ),
    _of(
        "squares remainder",
        "ints",
        range(3, 20),
        (
            "the remainder of the sum of their squares when divided by {a}",
            "el resto de la suma de sus cuadrados al dividir entre {a}",
        ),
        (
            "Add the squares and take the remainder when divided by {a}.",
            "Sumar los cuadrados y tomar el resto al dividir entre {a}.",
        ),
        "sum(x * x for x in xs) % {a}",
        lambda xs, a: sum(pow(x, 2, a) for x in xs) % a,
    ),
    _of(
        "whole quotient",
        "ints",
        _SOME,
        ("the whole part of their sum divided by {a}", "la parte entera de su suma dividida entre {a}"),
        ("Add them and divide by {a} without decimals.", "Sumarlos y dividir entre {a} sin decimales."),
        "sum(xs) // {a}",
        lambda xs, a: (sum(xs) - sum(xs) % a) // a,
    ),
    _of(
        "all over",
        "ints",
        range(1, 15),
        ("yes if all of them are greater than {a}, else no", "yes si todos ellos son mayores que {a}; si no, no"),
        ("Look whether all are greater than {a}.", "Mirar si todos son mayores que {a}."),
        '"yes" if all(x > {a} for x in xs) else "no"',
        lambda xs, a: "yes" if min(xs) > a else "no",
    ),
    _of(
        "sum to",
        "int",
        _MANY,
        ("the sum of the integers from 1 to n, plus {a}", "la suma de los enteros de 1 a n, más {a}"),
        ("Add the integers from 1 to n and {a}.", "Sumar los enteros de 1 a n y {a}."),
        "sum(range(n + 1)) + {a}",
        lambda n, a: n * (n + 1) // 2 + a,
    ),
    _of(
        "power",
        "int",
        range(2, 8),
        ("n to the power {a}", "n elevado a {a}"),
        ("Raise n to the power {a}.", "Elevar n a {a}."),
        "n ** {a}",
        lambda n, a: math.prod([n] * a),
        bounds=(2, 20),
    ),
    _of(
        "sum of multiples",
        "int",
        _SOME,
        ("the sum of the multiples of {a} from 1 to n", "la suma de los múltiplos de {a} de 1 a n"),
        ("Add the integers from {a} to n in steps of {a}.", "Sumar los enteros de {a} a n en pasos de {a}."),
        "sum(range({a}, n + 1, {a}))",
        lambda n, a: a * (n // a) * (n // a + 1) // 2,
        bounds=(1, 90),
    ),
    _of(
        "digit sum times",
        "int",
        _SOME,
        ("the sum of the digits of n, times {a}", "la suma de las cifras de n, por {a}"),
        ("Add the digits and multiply by {a}.", "Sumar las cifras y multiplicar por {a}."),
        "sum(int(d) for d in str(n)) * {a}",
        lambda n, a: a * sum(n // 10**i % 10 for i in range(6)),
        bounds=(10, 99_999),
    ),
    _of(
        "remainder",
        "int",
        _MANY,
        ("the remainder of n when divided by {a}", "el resto de n al dividir entre {a}"),
        ("Take the remainder of n when divided by {a}.", "Tomar el resto de n al dividir entre {a}."),
        "n % {a}",
        lambda n, a: n - a * (n // a),
        bounds=(1, 500),
    ),
    _of(
        "is a multiple",
        "int",
        _SOME,
        ("yes if n is a multiple of {a}, else no", "yes si n es múltiplo de {a}; si no, no"),
        ("Look whether the remainder of n divided by {a} is 0.", "Mirar si el resto de n entre {a} es 0."),
        '"yes" if n % {a} == 0 else "no"',
        lambda n, a: "yes" if n // a * a == n else "no",
    ),
    _of(
        "common divisor",
        "int",
        range(6, 49, 2),
        ("the greatest common divisor of n and {a}", "el máximo común divisor de n y {a}"),
        ("Take the largest d that divides n and {a}.", "Tomar el mayor d que divide a n y a {a}."),
        "max(d for d in range(1, {a} + 1) if n % d == 0 and {a} % d == 0)",
        lambda n, a: math.gcd(n, a),
        bounds=(2, 120),
    ),
    _of(
        "common multiple",
        "int",
        _SOME,
        ("the least common multiple of n and {a}", "el mínimo común múltiplo de n y {a}"),
        ("Take the first multiple of n that {a} divides.", "Tomar el primer múltiplo de n que {a} divide."),
        "min(m for m in range(n, n * {a} + 1, n) if m % {a} == 0)",
        lambda n, a: math.lcm(n, a),
    ),
    _of(
        "largest digit plus",
        "int",
        _MANY,
        ("the largest digit of n plus {a}", "la mayor cifra de n más {a}"),
        ("Take the largest digit and add {a}.", "Tomar la mayor cifra y sumar {a}."),
        "int(max(str(n))) + {a}",
        lambda n, a: max(n // 10**i % 10 for i in range(6)) + a,
        bounds=(10, 99_999),
    ),
    _of(
        "count divisors",
        "int",
        _SOME,
        ("how many divisors of n are greater than {a}", "cuántos divisores de n son mayores que {a}"),
        ("Count the d from {a} + 1 to n that divide n.", "Contar los d de {a} + 1 a n que dividen a n."),
        "sum(n % d == 0 for d in range({a} + 1, n + 1))",
        lambda n, a: len([d for d in _divisors(n) if d > a]),
        bounds=(4, 96),
    ),
    _of(
        "count primes",
        "int",
        _MANY,
        ("how many primes there are from {a} to n", "cuántos primos hay de {a} a n"),
        (
            "Count the p from {a} to n that no d from 2 to p - 1 divides.",
            "Contar los p de {a} a n que ningún d de 2 a p - 1 divide.",
        ),
        "sum(all(p % d for d in range(2, p)) for p in range({a}, n + 1))",
        lambda n, a: _primes(a, n),
        bounds=(2, 70),
    ),
    _of(
        "count digit",
        "int",
        range(10),
        ("how many times the digit {a} stands in n", "cuántas veces está la cifra {a} en n"),
        ("Count {a} in the digits of n.", "Contar {a} en las cifras de n."),
        'str(n).count("{a}")',
        lambda n, a: sum(n // 10**i % 10 == a for i in range(len(str(n)))),
        bounds=(10_000, 999_999),
    ),
    _of(
        "countdown",
        "int",
        _SOME,
        (
            "the integers from n down to 1 in steps of {a}, on one line",
            "los enteros de n hasta 1 en pasos de {a} hacia abajo, en una línea",
        ),
        ("Count from n down to 1 in steps of {a}.", "Contar de n hasta 1 en pasos de {a} hacia abajo."),
        "range(n, 0, -{a})",
        lambda n, a: [x for x in range(n, 0, -1) if (n - x) % a == 0],
        listed=True,
        bounds=(2, 30),
    ),
    _of(
        "table",
        "int",
        _MANY,
        (
            "the first n multiples of {a}, on one line, {a} itself the first",
            "los primeros n múltiplos de {a}, en una línea, el mismo {a} el primero",
        ),
        ("Multiply {a} by each i from 1 to n.", "Multiplicar {a} por cada i de 1 a n."),
        "[{a} * i for i in range(1, n + 1)]",
        lambda n, a: list(range(a, a * n + 1, a)),
        listed=True,
        bounds=(2, 9),
    ),
    _of(
        "minutes",
        "int",
        _MANY,
        ("n hours and {a} minutes as minutes", "n horas y {a} minutos en minutos"),
        ("Multiply n by 60 and add {a}.", "Multiplicar n por 60 y sumar {a}."),
        "n * 60 + {a}",
        lambda n, a: sum([60] * n, a),
    ),
    _of(
        "weekday",
        "int",
        range(7),
        (
            "the number of the weekday in n days when today has the number {a}, where 0 is Monday and 6 is Sunday",
            "el número del día de la semana dentro de n días cuando hoy tiene el número {a}, donde 0 es lunes y 6 es domingo",
        ),
        ("Add {a} to n and take the remainder when divided by 7.", "Sumar {a} a n y tomar el resto al dividir entre 7."),
        "(n + {a}) % 7",
        lambda n, a: (date(2024, 1, 1) + timedelta(days=a + n)).weekday(),
        bounds=(1, 400),
    ),
    _of(
        "repeat",
        "word",
        range(2, 9),
        ("s written {a} times without blanks", "s escrita {a} veces sin espacios"),
        ("Repeat s {a} times.", "Repetir s {a} veces."),
        "s * {a}",
        lambda s, a: "".join(s for _ in range(a)),
    ),
    _of(
        "count letter",
        "word",
        _LETTERS,
        ("how many times the letter {a} stands in s", "cuántas veces está la letra {a} en s"),
        ("Count {a} in s.", "Contar {a} en s."),
        's.count("{a}")',
        lambda s, a: len([letter for letter in s if letter == a]),
    ),
    _of(
        "drop letter",
        "word",
        _LETTERS,
        ("s without the letter {a}", "s sin la letra {a}"),
        ("Replace {a} in s by nothing.", "Cambiar {a} en s por nada."),
        's.replace("{a}", "")',
        lambda s, a: "".join(letter for letter in s if letter != a),
    ),
    _of(
        "star letter",
        "word",
        _LETTERS,
        ("s with each letter {a} replaced by *", "s con cada letra {a} cambiada por *"),
        ("Replace {a} in s by *.", "Cambiar {a} en s por *."),
        's.replace("{a}", "*")',
        lambda s, a: "*".join(s.split(a)),
    ),
    _of(
        "first letters",
        "word",
        range(1, 5),
        ("the first {a} letters of s", "las primeras {a} letras de s"),
        ("Keep the first {a} letters.", "Conservar las primeras {a} letras."),
        "s[:{a}]",
        lambda s, a: "".join(letter for _, letter in zip(range(a), s, strict=False)),
    ),
    _of(
        "last letters",
        "word",
        range(1, 5),
        ("the last {a} letters of s", "las últimas {a} letras de s"),
        ("Keep the last {a} letters.", "Conservar las últimas {a} letras."),
        "s[-{a}:]",
        lambda s, a: s[len(s) - a :],
    ),
    _of(
        "shift letters",
        "word",
        range(1, 26),
        (
            "s with each letter moved {a} places on in the alphabet from a to z, a after z",
            "s con cada letra movida {a} lugares en el alfabeto de a a z, a después de z",
        ),
        (
            "Move each letter {a} places, counted from a, modulo 26.",
            "Mover cada letra {a} lugares, contados desde a, módulo 26.",
        ),
        '"".join(chr((ord(c) - 97 + {a}) % 26 + 97) for c in s)',
        lambda s, a: _shifted(s, a),
    ),
    _of(
        "backwards with",
        "word",
        _LETTERS,
        ("s written backwards with the letter {a} at the end", "s escrita al revés con la letra {a} al final"),
        ("Reverse s and add {a}.", "Invertir s y añadir {a}."),
        's[::-1] + "{a}"',
        lambda s, a: "".join([*reversed(s), a]),
    ),
    _of(
        "long words",
        "words",
        range(3, 9),
        ("the words with more than {a} letters, on one line", "las palabras de más de {a} letras, en una línea"),
        ("Keep the words longer than {a}.", "Conservar las palabras más largas que {a}."),
        "[w for w in ws if len(w) > {a}]",
        lambda ws, a: [w for w in ws if w[a:]],
        listed=True,
    ),
    _of(
        "count words with",
        "words",
        _LETTERS,
        ("how many of the words have the letter {a}", "cuántas de las palabras tienen la letra {a}"),
        ("Count the words that have {a}.", "Contar las palabras que tienen {a}."),
        'sum("{a}" in w for w in ws)',
        lambda ws, a: len([w for w in ws if w.count(a)]),
    ),
    _of(
        "word at",
        "words",
        range(1, 6),
        ("the word at place {a}, where the first has place 1", "la palabra en el lugar {a}, donde la primera tiene el lugar 1"),
        ("Take place {a}, which is index {a} - 1.", "Tomar el lugar {a}, que es el índice {a} - 1."),
        "ws[{a} - 1]",
        lambda ws, a: dict(enumerate(ws, 1))[a],
    ),
    _of(
        "words sorted after",
        "words",
        _LETTERS,
        (
            "the words that begin with {a} or a later letter, sorted, on one line",
            "las palabras que comienzan con {a} o una letra posterior, ordenadas, en una línea",
        ),
        ("Keep the words from {a} on and sort them.", "Conservar las palabras desde {a} y ordenarlas."),
        'sorted(w for w in ws if w[0] >= "{a}")',
        lambda ws, a: [w for w in sorted(ws) if ord(w[0]) >= ord(a)],
        listed=True,
    ),
    _of(
        "joined by",
        "words",
        "-_+.,:;/=#",
        ("the words with {a} between them, without blanks", "las palabras con {a} entre ellas, sin espacios"),
        ("Join the words with {a}.", "Unir las palabras con {a}."),
        '"{a}".join(ws)',
        lambda ws, a: "".join(f"{a}{w}" for w in ws)[1:],
    ),
    _of(
        "letters of words times",
        "words",
        _SOME,
        ("the number of letters of all words together, times {a}", "el número de letras de todas las palabras juntas, por {a}"),
        ("Add the lengths of the words and multiply by {a}.", "Sumar los largos de las palabras y multiplicar por {a}."),
        "sum(len(w) for w in ws) * {a}",
        lambda ws, a: a * len("".join(ws)),
    ),
    _of(
        "clock later",
        "clock",
        range(5, 60, 3),
        ("the time {a} minutes later, as HH:MM", "la hora {a} minutos más tarde, como HH:MM"),
        (
            "Count in minutes, add {a}, and go on at 0 after 1440.",
            "Contar en minutos, sumar {a} y seguir en 0 después de 1440.",
        ),
        '"%02d:%02d" % divmod((h * 60 + m + {a}) % 1440, 60)',
        lambda clock, a: _later(clock, a),
    ),
    _of(
        "clock in minutes",
        "clock",
        range(1, 25),
        ("the minutes from 00:00 to that time, plus {a}", "los minutos desde las 00:00 hasta esa hora, más {a}"),
        ("Multiply h by 60, add m and {a}.", "Multiplicar h por 60, sumar m y {a}."),
        "h * 60 + m + {a}",
        lambda clock, a: a + clock[1] + sum([60] * clock[0]),
    ),
)
