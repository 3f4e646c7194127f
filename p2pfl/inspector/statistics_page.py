"""A statistical result as one HTML page that needs nothing else: tables, forest plot, survival curves. It loads and runs nothing.

It is made of the plain values that `--json` prints. Names come from contracts and sites: they are escaped wherever they stand.
"""

from __future__ import annotations

import math
from typing import Any

from p2pfl.inspector.drawn_statistics import ForestRow, calibration, forest, survival
from p2pfl.inspector.markup import COLOURS, STYLE, Cell, escaped, note, table

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = f"""{COLOURS}{STYLE}
body {{ max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }}
svg.drawn {{ width: 100%; max-width: 56rem; font: 13px system-ui, sans-serif; }} svg.drawn text {{ fill: var(--ink); }}
"""
_TITLES = {
    "describe": "Description",
    "glm": "Regression",
    "calibration": "Calibration",
    "mixed": "Mixed model",
    "cox": "Cox model",
    "km": "Survival",
    "compare": "Comparison",
}
_RATIOS = ("odds_ratio", "rate_ratio", "mean_ratio", "hazard_ratio")
_OF_CELLS = "Quantiles come from counts in cells; one whose cell is wider than the SD is not shown."
_Z = 1.959963984540054
_LEAST_P = 0.0001


def statistics_page(content: dict[str, Any], over: str = "simulated sites") -> str:
    """The page of a result, from the plain values that its `as_dict` gives; *over* says whose sums they are."""
    asked = content["analysis"]
    title = asked.get("formula") or "all variables"
    kind = _TITLES[asked["kind"]]
    sections = [*_counted(content)]
    if "calibration" in content:
        sections += _calibration(content)
    if "coefficients" in content:
        sections += _coefficients(content)
    elif "effects" in content:
        sections += _effects(content)
    elif "curves" in content:
        sections += _curves(content)
    elif "groups" in content:
        sections += _groups(content)
    else:
        sections += _variables(content)
    floors = f"no cell of fewer than {asked['patients_per_cell']} patients, no sum of fewer than {asked['patients_per_sum']}"
    where = "at each site" if asked["cells"] == "site" else "over all sites"
    if "cells" in content:
        sections.append(note(content["cells"]["about"]))
    equal = "on these cells of time" if "cells" in content else "of all sites' rows"
    sections.append(note(f"Sums over {over}, equal to the pooled result {equal}. Floors: {floors}; cells are counted {where}."))
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    head += f'<meta name="viewport" content="width=device-width"><title>{escaped(f"{kind}: {title}")}</title><style>{_STYLE}</style>'
    body = f'<h1>{escaped(kind)}</h1><p class="facts">{escaped(title)}</p>{"".join(sections)}'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main>{body}</main></body></html>\n'


def _counted(content: dict[str, Any]) -> list[str]:
    if "patients" not in content:
        return []
    missing = f"fewer than {content['analysis']['patients_per_cell']}" if content["missing"] is None else f"{content['missing']:,}"
    patients = "patients are not counted" if content["patients"] is None else f"{content['patients']:,} patients"
    facts = [f"{patients}, rows left out for missing values: {missing}"]
    if "family" in content["analysis"]:
        facts.append(f"family {content['analysis']['family']}")
    if "mixed" in content:
        found = content["mixed"]
        facts.append(f"a random intercept for each of {found['sites']} sites")
        facts.append(f"variance between sites {found['tau_squared']:.5g}, within {found['residual_variance']:.5g}, ICC {found['icc']:.4g}")
    if "theta" in content:
        facts.append(f"variance = mean + mean² / theta, theta {content['theta']:.5g}")
    if "events" in content:
        facts.append(f"{content['events']:,} events, ties by {content['ties'].capitalize()}")
    if "log_likelihood" in content:
        facts.append(f"log-likelihood {content['log_likelihood']:.8g}")
    return [note(", ".join(facts))]


def _coefficients(content: dict[str, Any]) -> list[str]:
    rows = content["coefficients"]
    level = f"{100 * content['analysis']['level']:g} %"
    ratio = next((key for key in _RATIOS if rows and key in rows[0]), None)
    heads = ["", "estimate", "SE", "statistic", "p", f"{level} from", "to"]
    cells = [
        [
            row["name"],
            *(_number(row[key]) for key in ("estimate", "se", "statistic")),
            _p(row["p"]),
            _number(row["low"]),
            _number(row["high"]),
        ]
        for row in rows
    ]
    keys = ("estimate", "low", "high") if ratio is None else (ratio, "ratio_low", "ratio_high")
    drawn = [row for row in rows if not row["name"].startswith("(") and all(_can_be_drawn(row[key], ratio is not None) for key in keys)]
    found = ["<h2>Coefficients</h2>", table(heads, cells, about="Coefficients with standard errors and intervals")]
    if drawn:
        named = "Estimates" if ratio is None else f"{ratio.replace('_', ' ').capitalize()}s"
        lines = [ForestRow(name=row["name"], value=row[keys[0]], low=row[keys[1]], high=row[keys[2]]) for row in drawn]
        picture = forest(lines, about=f"{named} with {level} intervals", neutral=0.0 if ratio is None else 1.0, is_ratio=ratio is not None)
        found += [f"<h2>{escaped(named)}</h2>", picture]
    return found


def _calibration(content: dict[str, Any]) -> list[str]:
    found, groups = content["calibration"], content["risk_groups"]
    level = f"{100 * content['analysis']['level']:g} %"
    cells: list[list[Cell]] = [
        [
            (f"{each['from']:g} to {each['to']:g}", "number"),
            _count(each["patients"]),
            _count(each["events"]),
            *(_number(each[key], 4) for key in ("predicted", "observed", "low", "high")),
        ]
        for each in groups
    ]
    heads = ["risk", "patients", "events", "predicted", "observed", f"{level} from", "to"]
    scores = [
        ["Brier score", _number(found["brier"], 4), ("", "number")],
        ["scaled Brier score", _number(found["scaled_brier"], 4), ("", "number")],
        ["area under the ROC curve, pairs of one site", _number(found["auc"], 4), _number(found["auc_bse"], 4)],
        ["intercept, on the rows of the fit", _number(round(found["intercept"], 8) + 0.0, 4), _number(found["intercept_bse"], 4)],
        ["slope, on the rows of the fit", _number(found["slope"], 4), _number(found["slope_bse"], 4)],
        ["slope to expect in new patients", _number(found["shrinkage"], 4), ("", "number")],
    ]
    for name, each in found["sites"].items():
        if each is not None:
            about = f"{name} of {each['estimates']} sites, random effect (tau² {each['tau_squared']:.4g}, p of Q {_p(each['q_p'])[0]})"
            scores.append([about, _number(each["random"], 4), _number(each["random_se"], 4)])
    is_shown = all(each["observed"] is not None for each in groups)
    picture = calibration(groups, about=f"Observed against predicted risk, with {level} intervals") if is_shown else ""
    bounds = f"Over all pairs the area lies between {found['auc_least']:.4g} and {found['auc_most']:.4g}: pairs in one group have no order."
    return [
        "<h2>Observed and predicted risk</h2>",
        picture,
        table(heads, cells, about="Groups of predicted risk"),
        table(["", "value", "SE"], scores, about="Figures of the calibration"),
        note(bounds),
    ]


def _effects(content: dict[str, Any]) -> list[str]:
    asked = content["analysis"]
    lines = [_forest_row(each["name"], each) for each in content["sites"]]
    lines += [_forest_row(f"{each['effect']} effect", each, is_total=True) for each in content["effects"]]
    facts = f"{content['estimates']} sites have an estimate. Q {content['q']:.4g}, p {_p(content['q_p'])[0]}"
    facts += f", I² {100 * content['i_squared']:.1f} %, tau² {content['tau_squared']:.4g} (DerSimonian and Laird)."
    facts += " Patients are those of all sites; a site without an estimate is counted, and has no part in the effects."
    shown = "Sites whose policy allows it are shown." if content["sites"] else "No single site is shown."
    picture = forest(lines, about="Estimates with 95 % intervals", neutral=0.0, is_ratio=False)
    return [f"<h2>{escaped(asked['coefficient'])}, with 95 % intervals</h2>", picture, note(f"{facts} {shown}")]


def _curves(content: dict[str, Any]) -> list[str]:
    by_group: dict[str, list[dict[str, Any]]] = {}
    for row in content["curves"]:
        by_group.setdefault(row["group"], []).append(row)
    group = content["group"]
    named = [(label if group is None else f"{group} = {label}", rows) for label, rows in by_group.items()]
    medians = [
        [
            label if group is None else f"{group} = {label}",
            _cell(content["medians"][label]["cell"]),
            *(_number(content["medians"][label][key]) for key in ("median", "low", "high")),
        ]
        for label in by_group
    ]
    level = f"{100 * content['analysis']['level']:g} %"
    found = [
        survival(named, about="Kaplan-Meier curves with numbers at risk"),
        "<h2>Medians</h2>",
        table(["", "cell of the median", "median", f"{level} from", "to"], medians, about="Median times with intervals"),
    ]
    return [*found, *([] if content["log_rank"] is None else [note(_log_rank(content["log_rank"]))])]


def _groups(content: dict[str, Any]) -> list[str]:
    cells = [[each["group"], (f"{each['observed']:,}", "number"), _number(each["expected"])] for each in content["groups"]]
    return [table([content["group"], "events", "expected"], cells, about="Events by group"), note(_log_rank(content["log_rank"]))]


def _variables(content: dict[str, Any]) -> list[str]:
    found = []
    keys = ("mean", "sd", "q5", "q25", "q50", "q75", "q95")
    numbers = [each for each in content["variables"] if "counts" not in each]
    if numbers:
        heads = ["", "unit", "patients", "missing", "mean", "SD", "5 %", "25 %", "50 %", "75 %", "95 %"]
        cells: list[list[Cell]] = [
            [_named(each), each["unit"] or "", _count(each["values"]), _count(each["missing"]), *(_number(each[key], 4) for key in keys)]
            for each in numbers
        ]
        found += ["<h2>Numbers and dates</h2>", table(heads, cells, about="Variables with numbers")]
    for each in content["variables"]:
        if "counts" in each:
            rows = [[label, _count(number)] for label, number in each["counts"].items()]
            rows.append(["missing", _count(each["missing"])])
            found += [f"<h2>{escaped(_named(each))}</h2>", table(["", "patients"], rows, about=f"Patients by {_named(each)}")]
    return [*found, note(f"A dash stands for a number that is not shown, as few patients could be told apart. {_OF_CELLS}")]


def _named(each: dict[str, Any]) -> str:
    return f"{each['name']}, {each['group']}" if "group" in each else str(each["name"])


def _forest_row(name: str, each: dict[str, Any], *, is_total: bool = False) -> ForestRow:
    width = _Z * each["se"]
    return ForestRow(name=name, value=each["estimate"], low=each["estimate"] - width, high=each["estimate"] + width, is_total=is_total)


def _log_rank(test: dict[str, Any]) -> str:
    return (
        f"Log-rank test: {test['statistic']:.4g} on {test['df']} degree{'' if test['df'] == 1 else 's'} of freedom, p {_p(test['p'])[0]}."
    )


def _can_be_drawn(value: float, is_ratio: bool) -> bool:
    return math.isfinite(value) and (not is_ratio or value > 0)


def _number(value: float | str | None, digits: int = 5) -> Cell:
    return ("-" if value is None else value if isinstance(value, str) else f"{value:.{digits}g}"), "number"


def _cell(ends: tuple[float, float] | None) -> Cell:
    return ("-" if ends is None else f"{ends[0]:g} to {ends[1]:g}"), "number"


def _count(value: int | None) -> Cell:
    return ("-" if value is None else f"{value:,}"), "number"


def _p(value: float) -> tuple[str, str]:
    return ("<0.0001" if value < _LEAST_P else f"{value:.4f}"), "number"
