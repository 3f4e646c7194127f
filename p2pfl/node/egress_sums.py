"""Sums that leave a site where it runs the analyses of its study: how many numbers, in which form, and to whom."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from p2pfl.analyses.agreed import AgreedAnalyses
from p2pfl.analyses.policy import Policy
from p2pfl.analyses.sum_plan import question_of
from p2pfl.governance.study import Study
from p2pfl.node.own_analysis import terms_of
from p2pfl.protocol.secure_tree import sum_tree

_ITERATION = re.compile(r", iteration \d+$")
_BITS_OF_A_BYTE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class SumOfSite:
    """One sum to which this site gives its numbers, under a mask."""

    statistic: str
    numbers: int
    """How many numbers it has."""
    at_most: int
    """How often it may be asked for: once, or in each iteration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalysisEgress:
    """All that leaves a site for one analysis of its study."""

    name: str
    question: str
    """Kind and formula."""
    sums: tuple[SumOfSite, ...]
    number_bytes: int
    """Bytes of one masked number."""
    parent: str | None
    """Neighbour that gets this site's numbers, with those of the sites behind it added, under masks; None: it adds up the last."""
    children: tuple[str, ...]
    """Neighbours that get the totals from this site."""
    refusals: tuple[str, ...]
    """Lines of this site's policy that refuse the analysis, so that no number leaves; for the site's own eyes."""

    @property
    def num_numbers(self) -> int:
        """The most numbers that the site gives in all."""
        return sum(each.numbers * each.at_most for each in self.sums)

    @property
    def lines(self) -> Iterator[str]:
        """Sentences for people, the sums among them."""
        if self.refusals:
            yield f"analysis {self.name}, {self.question}: no number leaves, as this site refuses it: {'; '.join(self.refusals)}"
            return
        others = ", ".join(self.children)
        added = f", added to those of {others}," if others else ""
        to = [f"under a mask{added} to {self.parent}"] if self.parent is not None else []
        to += [f"totals to {others}"] if others else []
        size = f"at most {self.num_numbers:,} numbers of {self.number_bytes} bytes"
        yield f"analysis {self.name}, {self.question}: {size}; {', '.join(to)}; all members learn the totals"
        for each in self.sums:
            often = "" if each.at_most == 1 else f", at most {each.at_most} times"
            yield f"  {each.statistic}: {each.numbers:,} number{'' if each.numbers == 1 else 's'}{often}"


def sums_of(study: Study, member: str, policy: Policy, place: str) -> tuple[AnalysisEgress, ...]:
    """List what each analysis of a study takes from a member; nothing where the study lists none.

    Raises:
        ConfigError: contract or analysis cannot be, or these members cannot run it.
    """
    agreed = AgreedAnalyses.of(study, place)
    return () if agreed is None else tuple(_analyses(agreed, study, member, policy))


def _analyses(agreed: AgreedAnalyses, study: Study, member: str, policy: Policy) -> Iterator[AnalysisEgress]:
    places = {name: place for place, name in enumerate(study.names)}
    graph = [[places[other] for other in study.neighbours(name)] for name in study.names]
    for name, spec in agreed.specs.items():
        terms = terms_of(study, spec, agreed.contract)
        tree = sum_tree(graph, terms.participants, study.names)
        parent = tree.parents.get(places[member])
        question = question_of(spec)
        prefix = "; ".join(question) + ": "
        counts: dict[tuple[str, int], int] = {}
        for planned in terms.sums:
            said = _ITERATION.sub(", in an iteration", planned.statistic.removeprefix(prefix))
            key = said, math.prod(planned.shape)
            counts[key] = counts.get(key, 0) + 1
        yield AnalysisEgress(
            name=name,
            question=", ".join(question),
            sums=tuple(SumOfSite(statistic=said, numbers=size, at_most=count) for (said, size), count in counts.items()),
            number_bytes=max((each.number_format.bits for each in terms.sums), default=0) // _BITS_OF_A_BYTE,
            parent=None if parent is None else study.names[parent],
            children=tuple(study.names[child] for child in tree.children(places[member])),
            refusals=tuple(policy.refusals(spec, agreed.contract)),
        )
