"""The secure sums of a site from its own files: what a command calls, with a plan, an analysis and the site's rows."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Generator, Sequence
from pathlib import Path
from typing import Any

from p2pfl.errors import ConfigError
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.node.own_links import own_links
from p2pfl.node.site import SiteFile
from p2pfl.node.start import check_confirmed
from p2pfl.node.sum_node import SumNode
from p2pfl.node.sum_store import SumFolder
from p2pfl.privacy.planned_sum import PlannedSum
from p2pfl.protocol.sum_terms import SumTerms
from p2pfl.statistics.sums import Numbers, Result, Rows, SumRequest


def sum_terms(
    study: Study,
    sums: Sequence[PlannedSum],
    *,
    participants: Collection[str] | None = None,
    curious: int = 1,
    check: bool = False,
    agreement: str = "",
) -> SumTerms:
    """Terms of sums between the members of a study.

    Args:
        study: whose members and graph they are.
        sums: the plan.
        participants: names of those that add numbers; None: all members.
        curious: how many members may put together what they know.
        check: whether a member that alters a sum is found.
        agreement: digest of what members agree on beside the sums; empty where there is nothing.

    Raises:
        ConfigError: a participant is no member, there are too few, or a bound does not fit.
    """
    names = study.names
    chosen = names if participants is None else participants
    if strangers := sorted(set(chosen) - set(names)):
        raise ConfigError(f"participants: {', '.join(strangers)} are no members of the study, only {', '.join(names)}")
    return SumTerms(
        study=study.digest,
        sums=tuple(sums),
        participants=tuple(place for place, name in enumerate(names) if name in chosen),
        names=names,
        identities=tuple(study.member(name).identity for name in names),
        curious=curious,
        check=check,
        agreement=agreement,
    )


def memory_of(site: SiteFile) -> Path:
    """Folder of a site's memory of sums: beside its keys, because it belongs to the identity and not to one study."""
    return site.keys.with_name("sums")


def analyse_with_others(
    site_path: Path,
    study: Study,
    terms: SumTerms,
    analysis: Generator[SumRequest[Rows], Numbers, Result],
    rows: Rows,
    *,
    first: int = 0,
    confirmed: str | None = None,
    **settings: Any,
) -> Result | None:
    """Lead one analysis together with the other members of a study, as the member that a site's file names.

    Args:
        site_path: its site.yaml.
        study: as the file names it.
        terms: from `sum_terms`, the same at all members.
        analysis: the same at all members.
        rows: of this site.
        first: position of the analysis' first sum in the plan.
        confirmed: the study's digest as the administrator confirmed it; None: the one in the file.
        settings: of `SumNode`, such as patience_s and wait_s.

    Returns:
        The result; None where this member takes no part and has only passed on what others add.

    Raises:
        ConfigError: a file is wrong, the digest was not confirmed, or this site may not give its numbers.
        StoreError: the disk failed, or the site's memory of sums is damaged.
        SumSessionEnded: a member was away for too long, or parts of a sum did not fit.
    """
    site = SiteFile.load(site_path)
    check_confirmed(site, study, confirmed, site_path)
    identity, card = Identity.load(site.keys, site.passphrase_file), study.member(site.member)
    if not identity.owns(card):
        raise ConfigError(f"keys = {str(site.keys)!r}: not those of {site.member} in the study", str(site_path))
    names = study.names
    places = {name: place for place, name in enumerate(names)}
    neighbours = [[places[other] for other in study.neighbours(name)] for name in names]
    links = own_links(site, study, card, identity.curve_secret)
    with SumFolder(memory_of(site)) as folder:
        node = SumNode(terms, neighbours, places[site.member], identity.signing, folder, links, **settings)
        if places[site.member] not in terms.participants:
            asyncio.run(node.relay())
            return None
        return asyncio.run(node.analyse(analysis, rows, first=first))
