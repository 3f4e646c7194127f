"""Sum nodes of a study in one process: over memory or ZeroMQ, with files that outlive them, and a logistic regression to make."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import numpy as np
from secure_members import STATISTICS, STUDY, identity, signing_key
from unmasked_sums import analyse_in_fixed_point

from links import Links, MemoryLinks
from p2pfl.node.sum_node import SumNode
from p2pfl.node.sum_store import SumFolder
from p2pfl.privacy.planned_sum import PlannedSum
from p2pfl.protocol.sum_terms import SumTerms
from p2pfl.statistics.families import FAMILIES
from p2pfl.statistics.glm import DesignRows, fit_glm
from p2pfl.statistics.scale import INTERCEPT

NAMES = [INTERCEPT, "age", "dose"]
NUM_COLUMNS = len(NAMES)
DEADLINE_S = 60.0


def rows_of(num_sites, num_rows=60, seed=0):
    """Rows of a logistic regression at each site."""
    draws, found = np.random.default_rng(seed), []
    for _ in range(num_sites):
        columns_MP = np.column_stack([np.ones(num_rows), draws.normal(60, 12, num_rows), draws.normal(size=num_rows)])
        eta = columns_MP @ [-3.0, 0.05, 0.7]
        outcomes = (draws.uniform(size=num_rows) < 1 / (1 + np.exp(-eta))).astype(np.float64)
        found.append(DesignRows(columns_MP=columns_MP, outcomes_M=outcomes, offsets_M=np.zeros(num_rows), weights_M=np.ones(num_rows)))
    return found


def regression():
    return fit_glm(NAMES, FAMILIES["binomial"])


def planned_regression(num=NUM_COLUMNS):
    """The sums of a regression with so many columns, with room for its iterations."""
    shapes = {"rows and means": (1 + num,), "squares around the means": (num,), "missing rows and saturated log-likelihood": (3,)}
    shapes |= {f"information, score and deviance, iteration {each}": (num * (num + 1) // 2 + num + 1,) for each in range(28)}
    return tuple(
        PlannedSum(statistic=f"risk ~ age + dose: {name}", shape=shape, number_format=STATISTICS, bound=1e9)
        for name, shape in shapes.items()
    )


def bits(fit):
    """All numbers of a fit to the last bit."""
    return fit.params.tobytes(), fit.covariance_PP.tobytes(), fit.deviance, fit.log_likelihood, fit.iterations


class SumClinics:
    """Members with keys, folders and links."""

    def __init__(
        self, folder, graph, *, participants=None, over="memory", sums=None, lost=None, analysis=regression, rows=None, **settings
    ):
        num = len(graph)
        self.graph = [sorted(graph[each]) for each in range(num)]
        self.names = tuple(f"clinic-{each}" for each in range(num))
        self.terms = SumTerms(
            study=STUDY,
            sums=planned_regression() if sums is None else sums,
            participants=tuple(range(num) if participants is None else participants),
            names=self.names,
            identities=tuple(identity(each) for each in range(num)),
            check=settings.pop("check", False),
        )
        self.links = MemoryLinks(32) if over == "memory" else Links(over)
        if lost is not None:
            self.links.network.lost = lost
        self.folders = [folder / name for name in self.names]
        self.rows, self.analysis = rows_of(num) if rows is None else rows, analysis
        self.settings = {"presence_s": 0.1, "wait_s": DEADLINE_S, **settings}

    def node(self, me, store, **settings):
        transport = self.links.member(self.names[me], [self.names[each] for each in self.graph[me]])
        return SumNode(self.terms, self.graph, me, signing_key(me), store, transport, **{**self.settings, **settings})

    async def analyse(self, me, *, began=lambda _node: None, **settings):
        """One member's part: it leads the regression, or relays."""
        with SumFolder(self.folders[me]) as store:
            node = self.node(me, store, **settings)
            began(node)
            if me not in self.terms.participants:
                return await node.relay()
            return await node.analyse(self.analysis(), self.rows[me])

    async def killed(self, me, *, after):
        """Start a member and end it without a word when it holds so many totals; its files stay."""
        nodes = []
        task = asyncio.ensure_future(self.analyse(me, began=nodes.append))
        while not task.done() and not (nodes and len(nodes[0].member.totals) >= after):  # noqa: ASYNC110 - totals, not an event
            await asyncio.sleep(0.01)
        assert not task.done(), "it ended before it could be killed"
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return len(nodes[0].member.totals)

    def expected(self):
        """The fit whose sums are fixed-point sums in one process."""
        sites = [self.rows[each] for each in self.terms.participants]
        return bits(analyse_in_fixed_point(self.analysis(), sites, self.terms.sums))


def run(clinics, work):
    """Run a test to its end, and close its links."""
    try:
        return asyncio.run(asyncio.wait_for(work, DEADLINE_S))
    finally:
        clinics.links.close()
