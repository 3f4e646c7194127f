"""The tie between a study and the older study that it continues: which members go on, and under which of their names.

A member is the same where its card is signed by the same identity key, whatever its name and address are now. Where a name has another
key, nothing in the files tells a member with new keys from somebody who has taken its name; so whoever makes the study must have asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field

from p2pfl.errors import ConfigError, some
from p2pfl.governance.card import Card
from p2pfl.governance.encoding import grouped
from p2pfl.governance.names import Name

_HELD_OUT_BY = ("seed", "validation")
"""Keys of an experiment that decide which rows no model trains on."""
_DIVIDED_BY = ("nodes", "partition")
"""Keys that divide the rows of one machine among the nodes of a rehearsal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """The study that another one continues, and its members that go on."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    study: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Digest of the older study."""
    members: Mapping[Name, Name] = field(default_factory=dict)
    """Members that go on: the name in this study, and the name in the older one."""
    new_keys: tuple[Name, ...] = ()
    """Those of them whose identity key is another one now, sorted."""

    @classmethod
    def of(cls, digest: str, old_cards: Sequence[Card], cards: Sequence[Card], new_keys: Collection[str] = ()) -> Continuation:
        """Find the members of an older study among the cards of a new one.

        Args:
            digest: of the older study.
            old_cards: of its members.
            cards: of the new study's members.
            new_keys: members whose new keys somebody has asked them about.

        Raises:
            ConfigError: a name has another key and nobody has asked, or somebody has asked about a member without one; or nobody goes on.
        """
        by_key, by_name = {card.identity: card for card in old_cards}, {card.name: card for card in old_cards}
        kept = {card.name: by_key[card.identity].name for card in cards if card.identity in by_key}
        changed = {card.name: card for card in cards if card.name not in kept and card.name in by_name}
        faults = [
            f"members: {name} has another key than in the study that is continued: ask {name} by a number that you knew before whether its "
            f"fingerprint is {grouped(card.fingerprint)}; if it is, add --new-key {name}; if it is somebody else, take another name"
            for name, card in changed.items()
            if name not in new_keys
        ]
        faults += [
            f"--new-key {name}: {'its key is that of the study that is continued' if name in kept else 'no such member of both studies'}"
            for name in sorted(set(new_keys) - changed.keys())
        ]
        faults += [
            f"members: {name} has the name of a member whose key {other} has now: give one of them another name"
            for name in changed
            for other, was in kept.items()
            if was == name
        ]
        if not faults and not kept and not changed:
            faults.append(f"--continues: none of its members ({some(sorted(by_name))}) is in this study, so there is nothing to continue")
        if faults:
            raise ConfigError(faults)
        return cls(study=digest, members=dict(sorted((kept | {name: name for name in changed}).items())), new_keys=tuple(sorted(changed)))

    def as_dict(self) -> dict[str, Any]:
        """The tie as the study's file holds it; without `new_keys` where there are none."""
        return {"study": self.study, "members": dict(self.members)} | ({"new_keys": list(self.new_keys)} if self.new_keys else {})

    def faults(self, names: Collection[str]) -> Iterator[str]:
        """Find what cannot be in a study of these members, a sentence each."""
        for name in sorted(self.members.keys() - set(names)):
            yield f"continues.members: {name!r} has no card"
        for was, count in Counter(self.members.values()).items():
            if count > 1:
                yield f"continues.members: {was!r} of the older study goes on as {count} members; expected one"
        for name in sorted(set(self.new_keys) - self.members.keys()):
            yield f"continues.new_keys: {name!r} is not in continues.members"

    def sentences(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Say of each member in one line how it begins."""
        for name in names:
            was = self.members.get(name)
            if was is None:
                yield name, "is new, and begins as the study says"
            else:
                renamed = f" as {was}" if was != name else ""
                yield name, f"goes on from its model{renamed}{', with a new key' if name in self.new_keys else ''}"


def changed_experiment(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Compare two resolved experiments: keys whose values differ, with the old and the new value."""
    return [(key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]


def faults_of_rows(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Name changes by which rows that the older models have trained on would be held out now, a sentence each."""
    return [
        f"{key} = {new.get(key)!r}: {old.get(key)!r} in the study that is continued; the rows that are held out follow from it, so that "
        f"models would be measured on rows that they have trained on; take {old.get(key)!r}"
        for key in _HELD_OUT_BY
        if old.get(key) != new.get(key)
    ]


def kept_scale(old: Mapping[str, Any], new: Mapping[str, Any]) -> Any:
    """Find the scale by which the older models' inputs were standardised, where a new experiment asks for one; None: there is none."""
    before, now = old.get("task"), new.get("task")
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return None
    return before.get("scale") if now.get("standardise") == "pooled" and "scale" not in now else None


def is_divided_anew(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Tell whether the rows of one machine are divided otherwise than before, as only in a rehearsal."""
    return any(old.get(key) is not None and old.get(key) != new.get(key) for key in _DIVIDED_BY)
