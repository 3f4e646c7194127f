"""Formulae in R's notation, read by a grammar of our own: nothing in them is ever run, and no term of them filters rows.

    outcome ~ age + sex * bmi - 1 + offset(log(days))        Surv(days, event) ~ treatment + log(marker)

Known are names, `+`, `-`, `:`, `*`, `^`, parentheses, `0` and `1` for the intercept, and the functions of FUNCTIONS of one name. Curves of
one name have their numbers written out: `poly(age, 2)`, `spline(age, 40, 55, 70)`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product

from p2pfl.errors import ConfigError

FUNCTIONS = ("log", "sqrt", "exp")
POLY, SPLINE = "poly", "spline"
CURVES = (POLY, SPLINE)
"""Functions that make several columns of a number."""

MOST_DEGREE, FEWEST_KNOTS, MOST_KNOTS = 6, 3, 8
MOST_CHARACTERS, MOST_TERMS, MOST_POWER = 2000, 200, 6
_MOST_PRODUCTS = 20_000
"""Products of two terms that are formed while one formula is read."""

_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z][A-Za-z0-9_.]*)|(?P<number>\d+(?:\.\d+)?(?![\w.]))|(?P<sign>[~+\-:*^(),]))")


@dataclass(frozen=True, order=True, slots=True)
class Variable:
    """A column of the table, or a function of it."""

    column: str
    function: str = ""
    numbers: tuple[float, ...] = ()
    """Degree of a polynomial, or knots of a spline."""

    def __str__(self) -> str:
        inside = ", ".join([self.column, *map(_written, self.numbers)])
        return f"{self.function}({inside})" if self.function else self.column


Term = tuple[Variable, ...]
"""Variables whose product makes columns; the empty one is the intercept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Formula:
    """A model that a study asks for."""

    outcome: tuple[str, ...]
    """One column, or time and event."""
    terms: tuple[Term, ...]
    """In the order of their number of variables, as R has them."""
    offsets: tuple[Variable, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the table that the formula reads, each once."""
        names = [*self.outcome, *(each.column for term in self.terms for each in term), *(each.column for each in self.offsets)]
        return tuple(dict.fromkeys(names))


@lru_cache(maxsize=64)
def parse_formula(text: str) -> Formula:
    """Read a formula from its text.

    Raises:
        ConfigError: it is none, with the place and what was expected there.
    """
    return _Parser(text).formula()


class _Parser:
    """Reads one formula from left to right."""

    def __init__(self, text: str) -> None:
        if len(text) > MOST_CHARACTERS:
            raise ConfigError(f"a formula of {len(text)} characters: {MOST_CHARACTERS} are the most")
        self._text, self._place = text, 0
        self._kind, self._word = "", ""
        self._offsets: list[Variable] = []
        self._depth = self._num_products = 0
        self._next()

    def formula(self) -> Formula:
        outcome = self._outcome()
        self._take("~")
        terms = self._sum(is_whole=True)
        if self._kind:
            raise self._error("the end, or one of + - : * ^")
        if not terms:
            raise ConfigError(f"formula {self._text!r}: nothing is left on its right side")
        return Formula(outcome=outcome, terms=tuple(sorted(terms, key=len)), offsets=tuple(self._offsets))

    def _outcome(self) -> tuple[str, ...]:
        name = self._name("the outcome's name")
        if name != "Surv":
            return (name,)
        self._take("(")
        time = self._name("the name of the time")
        self._take(",")
        event = self._name("the name of the event")
        self._take(")")
        return time, event

    def _sum(self, *, is_whole: bool = False) -> dict[Term, None]:
        """Terms in their order, each once; a whole right side begins with the intercept."""
        terms: dict[Term, None] = {(): None} if is_whole else {}
        sign = "+"
        if self._word in ("+", "-"):
            sign = self._sign()
        while True:
            is_constant, is_one = self._kind == "number", self._word == "1"
            found: Iterable[Term] = self._constant() if is_constant else self._crossed(is_whole=is_whole and sign == "+")
            if is_constant and (sign == "+") != is_one:  # "- 1" or "+ 0"
                terms.pop((), None)
            elif sign == "+":
                terms = dict.fromkeys(_distinct([*terms, *found]))
            else:
                left_out = {frozenset(term) for term in found}
                terms = {term: None for term in terms if frozenset(term) not in left_out}
            self._check(len(terms))
            if self._word not in ("+", "-"):
                return terms
            sign = self._sign()

    def _constant(self) -> list[Term]:
        if self._word not in ("0", "1"):
            raise self._error("a name: of numbers only 0 and 1 stand for something, no intercept and one")
        self._next()
        return [()]

    def _crossed(self, *, is_whole: bool) -> list[Term]:
        """`a * b` is a + b + a:b."""
        terms = self._joined(is_whole=is_whole)
        while self._word == "*":
            self._next()
            others = self._joined(is_whole=False)
            terms = _distinct([*terms, *others, *self._products(terms, others)])
            self._check(len(terms))
        return terms

    def _joined(self, *, is_whole: bool) -> list[Term]:
        terms = self._powered(is_whole=is_whole)
        while self._word == ":":
            self._next()
            terms = self._products(terms, self._powered(is_whole=False))
            self._check(len(terms))
        return terms

    def _powered(self, *, is_whole: bool) -> list[Term]:
        terms = base = self._atom(is_whole=is_whole)
        if self._word != "^":
            return terms
        self._next()
        if not self._word.isdigit() or not 1 <= int(self._word) <= MOST_POWER:
            raise self._error(f"a whole number from 1 to {MOST_POWER}")
        power = int(self._word)
        self._next()
        for _ in range(power - 1):
            terms = _distinct([*terms, *self._products(terms, base)])
            self._check(len(terms))
        return terms

    def _products(self, terms: Sequence[Term], others: Sequence[Term]) -> list[Term]:
        """All products of two terms, in which each variable counts once; counted before they are formed."""
        self._num_products += len(terms) * len(others)
        self._check(self._num_products, _MOST_PRODUCTS)
        return _distinct(tuple(dict.fromkeys([*left, *right])) for left, right in product(terms, others))

    def _check(self, num: int, most: int = MOST_TERMS) -> None:
        if num > most:
            raise ConfigError(f"formula {self._text!r}: more than {MOST_TERMS} terms")

    def _atom(self, *, is_whole: bool) -> list[Term]:
        if self._word == "(":
            self._next()
            self._depth += 1
            if self._depth > MOST_POWER:
                raise self._error(f"no more than {MOST_POWER} parentheses inside of each other")
            terms = list(self._sum())
            self._depth -= 1
            self._take(")")
            return terms
        name = self._name("a name or a parenthesis")
        if self._word != "(":
            return [(Variable(name),)]
        if name == "offset":
            if not is_whole:
                raise self._error("an offset only where it is added by itself")
            self._next()
            name = self._name("a name")
            if name in CURVES and self._word == "(":
                raise self._error("a number of each row inside an offset, and no curve,")
            self._offsets.append(self._variable(name))
            self._take(")")
            return []
        return [(self._variable(name),)]

    def _variable(self, name: str) -> Variable:
        if self._word != "(":
            return Variable(name)
        if name not in (*FUNCTIONS, *CURVES):
            raise ConfigError(f"formula {self._text!r}: {name!r} is no function that is known here: {', '.join((*FUNCTIONS, *CURVES))}")
        self._next()
        column = self._name("one name")
        numbers = self._degree() if name == POLY else self._knots() if name == SPLINE else ()
        self._take(")")
        return Variable(column, name, numbers)

    def _degree(self) -> tuple[float, ...]:
        self._take(",")
        if not self._word.isdigit() or not 1 <= int(self._word) <= MOST_DEGREE:
            raise self._error(f"a degree from 1 to {MOST_DEGREE}")
        degree = float(self._word)
        self._next()
        return (degree,)

    def _knots(self) -> tuple[float, ...]:
        knots: list[float] = []
        while self._word == ",":
            self._next()
            sign = -1.0 if self._word == "-" else 1.0
            if self._word == "-":
                self._next()
            if self._kind != "number" or not math.isfinite(float(self._word)):
                raise self._error("a knot, which is a number")
            knots.append(sign * float(self._word) + 0.0)
            self._next()
        if not FEWEST_KNOTS <= len(knots) <= MOST_KNOTS or any(after <= before for before, after in pairwise(knots)):
            raise ConfigError(
                f"formula {self._text!r}: a spline has {FEWEST_KNOTS} to {MOST_KNOTS} knots that increase, as in spline(age, 40, 55, 70)"
            )
        return tuple(knots)

    def _sign(self) -> str:
        sign = self._word
        self._next()
        return sign

    def _name(self, expected: str) -> str:
        if self._kind != "name":
            raise self._error(expected)
        name = self._word
        self._next()
        return name

    def _take(self, sign: str) -> None:
        if self._word != sign:
            raise self._error(repr(sign))
        self._next()

    def _next(self) -> None:
        found = _TOKEN.match(self._text, self._place)
        if found is None:
            self._kind = self._word = ""
            if self._text[self._place :].strip():
                raise self._error("a name, a sign of + - : * ^ ( ) or the end")
            return
        self._place = found.end()
        self._kind, self._word = found.lastgroup or "", found[found.lastgroup or 0]

    def _error(self, expected: str) -> ConfigError:
        place = self._place - len(self._word)
        here = self._text[place : place + 20] or "the end"
        return ConfigError(f"formula {self._text!r}, character {place + 1}, at {here!r}: {expected} is expected")


def _written(number: float) -> str:
    """A number of a formula in its shortest form."""
    return repr(int(number)) if number.is_integer() else repr(number)


def _distinct(terms: Iterable[Term]) -> list[Term]:
    """Terms in their order, each once, whatever the order of its variables."""
    found: dict[frozenset[Variable], Term] = {}
    for term in terms:
        found.setdefault(frozenset(term), term)
    return list(found.values())
