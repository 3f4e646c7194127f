"""`p2pfl data check` and `p2pfl data freeze`: a site's table held against the contract, and its rows fixed."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pfl.cli.options import Json
from p2pfl.errors import ConfigError

if TYPE_CHECKING:
    from p2pfl.data.check import Violation
    from p2pfl.data.site_rows import ExaminedTable

REFUSED = 2
"""Exit code where the table is not accepted, or its frozen rows have changed."""

_WIDTH = 80
_MOST_LINES = 20

Site = Annotated[Path, typer.Argument(metavar="SITE", help="The site's file with the section `table:`, such as site.yaml.")]
ContractFile = Annotated[
    Path | None, typer.Option("--contract", metavar="FILE", help="The data contract. Default: `contract` in the site's file.")
]


def check(
    site: Site,
    contract: ContractFile = None,
    rows: Annotated[
        bool, typer.Option("--rows", help="Show the first rows that break each rule: patients' values, on a terminal alone.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Hold this site's table against the data contract. The report has columns, rules and counts, and no value of a patient.

    Where the rows are frozen, it compares them as well. Exit code 0: the table is accepted; 2: it is not. Nothing leaves the site.

    Example: p2pfl data check site.yaml --contract contract.yaml
    """
    if rows and (as_json or not sys.stdout.isatty()):
        raise ConfigError("--rows: it shows patients' values, and is for a terminal alone: leave out --json, pipes and files")
    seen = _look(site, contract)
    if as_json:
        typer.echo(json.dumps(_document(seen), indent=2, ensure_ascii=False))
    else:
        for line in _report(seen):
            typer.echo(line)
        if rows:
            for line in _examples(seen):
                typer.echo(line)
    if not seen.is_accepted:
        raise typer.Exit(REFUSED)


def freeze(site: Site, contract: ContractFile = None, as_json: Json = False) -> None:
    """Fix the rows that this site computes with, under a key of its own. Later rows are left out, changed ones are refused.

    The key is cohort.key in the folder of keys, the rows' tags are in cohort.json beside the state folder. Keep both in a backup.

    Example: p2pfl data freeze site.yaml --contract contract.yaml
    """
    from p2pfl.data.cohort_files import KEY_FILE, freeze_cohort
    from p2pfl.governance.encoding import grouped

    seen = _look(site, contract)
    if seen.table is None:
        for line in _report(seen):
            typer.echo(line, err=True)
        raise ConfigError("the contract refuses the table: nothing has been frozen", seen.section.place)
    file, key = seen.section.cohort, seen.section.keys / KEY_FILE
    made = freeze_cohort(seen.table, seen.contract, file, seen.section.keys).commitment
    if as_json:
        typer.echo(json.dumps({**made.as_dict(), "file": str(file), "key": str(key)}))
        return
    typer.echo(f"frozen      {_number(made.rows, 'row')} of {_number(made.patients, 'patient')}")
    typer.echo(f"commitment  {_indented(grouped(made.hmac))}")
    typer.echo(f"contract    {_indented(grouped(made.contract))}")
    typer.echo(f"{file}   stays here: tags of the rows, no id and no value")
    typer.echo(f"{key}   private: stays here, readable by you alone")
    typer.echo(f"The commitment can go on this site's card, which binds the site to these rows: p2pfl keys card --cohort {site}")


def _look(site: Path, contract: Path | None) -> ExaminedTable:
    """Read the site's file, the contract and the table."""
    from p2pfl.data.site_rows import examine_site_table
    from p2pfl.data.site_section import SiteSection

    return examine_site_table(SiteSection.load(site), contract)


def _document(seen: ExaminedTable) -> dict[str, Any]:
    cohort = seen.cohort
    return {
        "accepted": seen.is_accepted,
        "table": seen.raw.place,
        "contract": {"name": seen.contract.name, "digest": seen.contract.digest},
        **seen.report.as_dict(),
        "cohort": {**cohort.frozen.commitment.as_dict(), "later": cohort.num_later} if cohort else None,
        "cohort_fault": str(seen.cohort_fault) if seen.cohort_fault else None,
    }


def _report(seen: ExaminedTable) -> Iterator[str]:
    from p2pfl.governance.encoding import grouped

    report, cohort = seen.report, seen.cohort
    yield f"table      {seen.raw.place}"
    yield f"contract   {seen.contract.name}"
    yield f"digest     {_indented(grouped(seen.contract.digest), 11)}"
    yield f"rows       {report.num_rows:,}, {_number(report.num_patients, 'patient')}"
    facts = {
        "missing": [f"{name} {count:,}" for name, count in report.num_missing.items() if count],
        "converted": [f"{name} from {unit}" for name, unit in report.converted.items()],
        "absent": list(report.absent),
    }
    for what, said in facts.items():
        if said:
            yield _wrapped(f"{what:<11}", ", ".join(said))
    for each in report.violations:
        yield from _violation(each)
    if cohort is not None:
        later = f"; {_number(cohort.num_later, 'later row')} left out" if cohort.num_later else ""
        yield f"frozen     {_number(cohort.frozen.commitment.rows, 'row')}, as frozen{later}"
    if seen.cohort_fault is not None:
        yield _wrapped("bad  ", str(seen.cohort_fault))
    num_found = len(report.refusals) + (seen.cohort_fault is not None)
    yield "accepted" if not num_found else f"refused: {_number(num_found, 'finding')}"


def _violation(found: Violation) -> Iterator[str]:
    yield _wrapped("bad  " if found.effect == "refused" else "note ", str(found))
    if found.remedy:
        yield _wrapped("     → ", found.remedy)


def _examples(seen: ExaminedTable) -> Iterator[str]:
    """Rows that break a rule, and lines of frozen patients that are not as frozen."""
    from p2pfl.data.check import example_rows
    from p2pfl.data.cohort import Freeze, changed_lines
    from p2pfl.data.cohort_files import cohort_key

    where = "line" if seen.raw.has_lines else "row"
    examples = list(example_rows(seen.raw, seen.contract, seen.section.table))
    yield "" if examples else "no row breaks a rule"
    for each in examples:
        yield _wrapped(f"{where} {each.line}  ", f"{each.column} = {each.text!r}: {each.rule}")
    if seen.cohort_fault is not None and seen.table is not None:
        try:
            lines = changed_lines(seen.table, Freeze.load(seen.section.cohort), cohort_key(seen.section.keys))
        except ConfigError:
            return  # the report has said why
        if lines:
            shown = ", ".join(map(str, lines[:_MOST_LINES])) + (" and more" if len(lines) > _MOST_LINES else "")
            yield _wrapped("", f"not as frozen, of patients that are: {where} {shown}")


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _wrapped(label: str, text: str) -> str:
    """A label and a text on lines of at most 80 columns; a long word, such as a path, stays whole."""
    indent = " " * len(label)
    return textwrap.fill(text, _WIDTH, initial_indent=label, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _indented(digest: str, indent: int = 12) -> str:
    """A digest in groups, on two lines where one would be too long."""
    return textwrap.fill(digest, _WIDTH - indent, subsequent_indent=" " * indent)
