"""A site's policy: the floors that no analysis may go below, and what the site answers at all.

A refusal has two sides. The site's own log names the line of its policy; the others hear that the site refuses, and no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from p2pfl.errors import ConfigError
from p2pfl.yaml_files import check, shown, strange_keys, text_keys

if TYPE_CHECKING:  # a node that answers no analysis reads a policy too, and does without scipy
    from p2pfl.analyses.spec import AnalysisSpec
    from p2pfl.data.contract import Contract

Kind = Literal["describe", "glm", "calibration", "mixed", "cox", "km", "compare"]

MOST_PARAMETERS_PER_PATIENT = 0.33


class RefusedByPolicy(ConfigError):
    """A site's policy does not allow an analysis; the reasons are for the site's own eyes."""

    def __init__(self, site: str, reasons: tuple[str, ...]) -> None:
        self.site, self.reasons = site, reasons
        super().__init__(f"{site}: refused by policy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Section `policy:` of a site; an analysis may keep stricter floors, never looser ones."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    patients_per_cell: Annotated[int, Field(ge=1)] = 5
    """Fewest patients in a cell of a table that holds any."""
    patients_per_sum: Annotated[int, Field(ge=1)] = 10
    """Fewest patients in a sum over all sites."""
    parameters_per_patient: Annotated[float, Field(gt=0)] = MOST_PARAMETERS_PER_PATIENT
    """Most coefficients of a model for each patient."""
    cells: Annotated[str, Field(pattern="^(total|site)$")] = "total"
    """site: only analyses whose cells hold nobody or enough at each single site."""
    analyses: tuple[Kind, ...] | None = None
    """Kinds that the site answers; None: all."""
    may_release: tuple[Literal["site_estimates", "site_means"], ...] = ()
    """Numbers of this site alone that others may know: its estimate in a comparison of sites, its means and products for a mixed model."""
    most_analyses: Annotated[int, Field(ge=1)] | None = None
    """Most analyses that may use one variable, over all studies in the site's log of releases; None: any number."""
    variables: tuple[str, ...] | None = None
    """Variables that may be used; None: all of the contract."""

    @classmethod
    def from_mapping(cls, raw: Any, place: str) -> Policy:
        """Check the section `policy:` of a site's file, which lies at *place*; ConfigError with every fault at once."""
        if not isinstance(raw, Mapping):
            raise ConfigError(f"policy = {shown(raw)}: expected a mapping, such as {{patients_per_cell: 5}}", place)
        findings = strange_keys(raw, "policy")
        try:
            policy = check(cls, text_keys(raw), place)
        except ConfigError as error:
            findings += [f"policy.{each}" for each in error.findings]
        if findings:
            raise ConfigError(findings, place)
        return policy

    def refusals(self, spec: AnalysisSpec, contract: Contract) -> Iterator[str]:
        """Find the lines of the policy that an analysis breaks, for the site's own log."""
        for key in ("patients_per_cell", "patients_per_sum"):
            floor, asked = getattr(self, key), getattr(spec, key)
            if asked < floor:
                yield f"policy.{key} = {floor}: the analysis asks for {asked}"
        if spec.parameters_per_patient > self.parameters_per_patient:
            yield f"policy.parameters_per_patient = {self.parameters_per_patient:g}: the analysis asks for {spec.parameters_per_patient:g}"
        if self.cells == "site" and spec.cells != "site":
            yield "policy.cells = 'site': the analysis counts its cells over all sites"
        if self.analyses is not None and spec.kind not in self.analyses:
            yield f"policy.analyses = [{', '.join(self.analyses)}]: the analysis is {spec.kind}"
        if spec.kind == "mixed" and "site_means" not in self.may_release:
            yield (
                f"policy.may_release = [{', '.join(self.may_release)}]: the analysis takes this site's means and products; "
                "to allow that, write may_release: [site_means]"
            )
        if self.variables is not None:
            others = [name for name in dict.fromkeys([*spec.names_used(contract), *spec.common]) if name not in self.variables]
            if others:
                yield f"policy.variables: the analysis uses {', '.join(others)}, which it does not list"
