"""The list of checks, in the order in which they are made. A new check is a function in one of these files and a line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from p2pfl.node.doctor.edges import check_agreement, check_clocks, check_edges, check_forward, check_names
from p2pfl.node.doctor.examination import Examination, Fact, Finding, Noted, unknown
from p2pfl.node.doctor.machine import check_disk, check_ports, check_state
from p2pfl.node.doctor.own_files import check_contract, check_keys, check_old_state, check_site_file, check_study
from p2pfl.node.doctor.rows import check_memory, check_round, check_rows, check_training
from p2pfl.node.doctor.table import check_table


@dataclass(frozen=True, slots=True)
class Check:
    """One check: a function that yields findings and facts, and the fields of the examination that must be known before."""

    name: str
    look: Callable[[Examination], Noted]
    needs: tuple[str, ...] = ()


CHECKS: tuple[Check, ...] = (
    Check("site file", check_site_file),
    Check("state folder", check_state, ("site",)),
    Check("study", check_study, ("site",)),
    Check("keys", check_keys, ("study",)),
    Check("result contract", check_contract, ("study",)),
    Check("table", check_table, ("site",)),
    Check("rows and model", check_rows, ("study", "contract_kept")),
    Check("memory", check_memory, ("plan",)),
    Check("old state", check_old_state, ("plan", "state_usable")),
    Check("disk", check_disk, ("state_usable",)),
    Check("ports", check_ports, ("study",)),
    Check("training", check_training, ("population",)),
    Check("names", check_names, ("study",)),
    Check("edges", check_edges, ("identity", "plan")),
    Check("clocks", check_clocks, ("edges",)),
    Check("agreement", check_agreement, ("edges",)),
    Check("forward pass", check_forward, ("edges",)),
    Check("round", check_round, ("plan",)),
)


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the checks of one site have noted, in their order, each with the name of its check."""

    noted: Sequence[tuple[str, Finding | Fact]]

    @property
    def findings(self) -> list[tuple[str, Finding]]:
        """Faults, with the names of their checks."""
        return [(name, note) for name, note in self.noted if isinstance(note, Finding)]

    @property
    def facts(self) -> list[tuple[str, Fact]]:
        """Facts that are no faults, with the names of their checks."""
        return [(name, note) for name, note in self.noted if isinstance(note, Fact)]


def examine(exam: Examination, checks: Sequence[Check] = CHECKS) -> Report:
    """Make the checks of a site, one after the other; what cannot be seen because of an earlier finding is noted as unknown."""
    noted: list[tuple[str, Finding | Fact]] = []
    for check in checks:
        if any(getattr(exam, need) is None for need in check.needs):
            noted.append((check.name, unknown(check.name, "not looked at: something that it needs is not known")))
            continue
        noted += [(check.name, note) for note in check.look(exam)]
    return Report(noted)
