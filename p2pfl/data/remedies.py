"""Advice for rules of a contract that a table breaks, for those whose sentence has none in it."""

from __future__ import annotations

from p2pfl.data.variables import Variable

_BY_RULE = {
    "outside of ": "correct the values, or say in table.units in which unit this site has it",
    "a text that is no category's code": "write a code of the contract, or ask the others to agree on this one; capitals count",
    "no patient id": "write the patient's id in the row, or take the row out",
    "an id with a line end": "write the id in one line of plain characters",
    "more than one row of a patient": "keep one row of each patient, or agree on rows: several-per-patient",
    "no whole number": "correct the values, or agree on the type number",
    "too large for a number": "correct the values",
    "no day of the calendar": "correct the dates, or say their order in table.dates",
    "no date in the order": "write the date alone, say the order in table.dates, or agree on a text that stands for missing",
    "no number": "write the number alone, or agree on a text that stands for missing",
    "points or commas": "say table.decimal and table.thousands as the file has them, or correct the numbers",
}
"""Beginning of a rule's sentence to what the site can do."""


def remedy_of(variable: Variable, rule: str) -> str:
    """Advise a site whose table breaks a rule; empty where the rule itself says what to do."""
    remedy = next((advice for begin, advice in _BY_RULE.items() if rule.startswith(begin)), "")
    if rule.startswith("outside of ") and not variable.convert:
        return "correct the values, or ask the others to agree on a wider range"
    return remedy
