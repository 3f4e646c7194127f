"""The data contract and the analyses that members of a study have agreed on, which the study's file holds in full."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from p2pfl.analyses.common_rows import with_common
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.data.contract import Contract
from p2pfl.data.site_section import beside
from p2pfl.errors import ConfigError, some
from p2pfl.governance.encoding import canonical
from p2pfl.governance.names import NEW_RULE, is_new_name
from p2pfl.governance.study import Study
from p2pfl.yaml_files import load_yaml, shown

_EXAMPLE = "kind: glm"
_IN_FULL = "not as p2pfl study new writes it, in full and in one form; make the study with that command"


@dataclass(frozen=True, kw_only=True, slots=True)
class AgreedAnalyses:
    """Data contract of a study, and the analyses that its members may run together."""

    contract: Contract
    specs: Mapping[str, AnalysisSpec]
    """By name; empty where the study lists none, and members agree on a file each time."""

    @classmethod
    def load(cls, contract: Path | Contract, analyses: Sequence[Path] = ()) -> AgreedAnalyses:
        """Read a contract and analyses from their files; an analysis has the name of its file, without the ending.

        Analyses with rows: common get the variables of all of them, whatever their files name.

        Raises:
            ConfigError: every fault of all files: an analysis does not fit the contract or names another one, or two have one name.
        """
        agreed = contract if isinstance(contract, Contract) else Contract.load(contract)
        called = agreed.name if isinstance(contract, Contract) else contract
        specs, faults = dict[str, AnalysisSpec](), list[str]()
        for path in analyses:
            try:
                spec, named = read_analysis(path)
                spec.check(agreed)
            except ConfigError as error:
                faults += [f"{path}: {finding}" for finding in error.findings]
                continue
            if named is not None and Contract.load(named).digest != agreed.digest:
                faults.append(f"{path}: contract = {shown(str(named))}: another one than {called}; a study has one contract")
            if not is_new_name(path.stem):
                faults.append(f"{path}: the analysis is called by the file's name, {path.stem!r}: expected {NEW_RULE}")
            if path.stem in specs:
                faults.append(f"{path}: another analysis is called {path.stem} already; give one of the files another name")
            specs[path.stem] = spec
        if faults:
            raise ConfigError(faults)
        return cls(contract=agreed, specs=with_common(specs, agreed))

    @classmethod
    def of(cls, study: Study, place: str) -> AgreedAnalyses | None:
        """Read what a study holds; None where it has no data contract.

        Raises:
            ConfigError: every fault: contract or analysis cannot be, leaves keys to its reader, or a card's cohort is of another contract.
        """
        if study.contract is None:
            return None
        contract = _contract_of(study.contract, place)
        specs, faults = dict[str, AnalysisSpec](), list[str]()
        for name, content in (study.analyses or {}).items():
            try:
                specs[name] = AnalysisSpec.from_mapping(content, place)
                specs[name].check(contract)
            except ConfigError as error:
                faults += [f"analyses.{name}: {finding}" for finding in error.findings]
                continue
            if canonical(specs[name].as_dict()) != canonical(content):
                faults.append(f"analyses.{name}: {_IN_FULL}")
        faults += faults_of_cohorts(study, contract)
        if faults:
            raise ConfigError(faults, place)
        return cls(contract=contract, specs=specs)

    def added_to(self, study: Study) -> Study:
        """Put contract and analyses into a study; ConfigError where a card's cohort is of another contract."""
        made = study.with_contract(self.contract.as_dict(), {name: spec.as_dict() for name, spec in self.specs.items()})
        AgreedAnalyses.of(made, "the new study")
        return made

    def asked(self, analysis: str) -> AnalysisSpec:
        """Find the analysis of a name, or of a file; a file's must be one of the list, where there is a list.

        Raises:
            ConfigError: the study does not list it, or there is neither such a name nor such a file, or the file is wrong.
        """
        if analysis in self.specs:
            return self.specs[analysis]
        path = Path(analysis)
        if self.specs and not path.is_file():
            raise ConfigError(self._not_listed(analysis))
        spec, named = read_analysis(path)
        if named is not None:
            check_same_contract(named, self.contract, str(path))
        if not self.specs:
            return spec
        listed = next((each for each in self.specs.values() if _is_same(spec, each)), None)
        if listed is None:
            raise ConfigError(self._not_listed(analysis))
        return listed

    def _not_listed(self, analysis: str) -> str:
        return (
            f"analysis = {shown(analysis)}: the study lists {some(list(self.specs))}; "
            "a member cannot invent one while the network runs: agree on a new study that has it"
        )


def read_analysis(path: Path) -> tuple[AnalysisSpec, Path | None]:
    """Read an analysis from its file, and the contract's file where it names one; ConfigError with every fault."""
    raw = dict(load_yaml(path, _EXAMPLE))
    written = raw.pop("contract", None)
    if written is not None and not isinstance(written, str):
        raise ConfigError(f"contract = {shown(written)}: expected the file of the data contract", str(path))
    return AnalysisSpec.from_mapping(raw, str(path)), None if written is None else beside(path.absolute().parent, written)


def _is_same(spec: AnalysisSpec, listed: AnalysisSpec) -> bool:
    """Whether a file's analysis is a listed one, in which the study may have more variables of the common rows."""
    return replace(spec, common=()) == replace(listed, common=()) and set(spec.common) <= set(listed.common)


def check_same_contract(file: Path, contract: Contract, place: str) -> None:
    """Refuse a contract's file whose meaning is not that of a study's contract."""
    if Contract.load(file).digest != contract.digest:
        raise ConfigError(
            f"contract = {shown(str(file))}: not the study's contract, {contract.name}; "
            "p2pfl study show STUDY --contract FILE writes that one, or leave the key out",
            place,
        )


def _contract_of(content: Mapping[str, Any], place: str) -> Contract:
    try:
        contract = Contract.from_mapping(content, place)
    except ConfigError as error:
        raise ConfigError([f"contract.{finding}" for finding in error.findings], place) from error
    if canonical(contract.as_dict()) != canonical(content):
        raise ConfigError(f"contract: {_IN_FULL}", place)
    return contract


def faults_of_cohorts(study: Study, contract: Contract) -> Iterator[str]:
    """Find members whose rows are frozen under another contract than the study's."""
    for card in study.members:
        if card.cohort is not None and card.cohort.contract != contract.digest:
            yield (
                f"members: {card.name} has frozen its rows under another data contract than this study's; "
                "it needs p2pfl data freeze with this one, and a new card"
            )
