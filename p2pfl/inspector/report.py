"""A run as one HTML page that needs nothing else: for a meeting, for an archive, for a reader without p2pfl. Needs plotly (extra `report`).

Names and details come from other machines: they are escaped wherever they stand.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence

from p2pfl.inspector import figures
from p2pfl.inspector.convergence import BASES, CONSENSUS, Convergence, convergence
from p2pfl.inspector.gaps import gaps
from p2pfl.inspector.health import node_health
from p2pfl.inspector.link_health import edge_health, in_need, links_in_order, slowest_link_sentence
from p2pfl.inspector.markup import COLOURS, MAX_ROWS, STYLE, Cell, escaped, listed, note, table, value_text
from p2pfl.inspector.run_state import banner, has_metrics, run_state
from p2pfl.inspector.sections import events, facts, node_states, skip_table, time_spent
from p2pfl.inspector.verdict import COST_PARTS, SAME, Scores, betterness, gain_sentence, mean_scores, of_rows, round_costs, scores, verdict
from p2pfl.runs.records import RunRecords
from p2pfl.runs.summary_fields import lower_is_better, metric_heading, primary_metric, rows_word
from p2pfl.runs.text import Row
from p2pfl.yaml_files import dump_yaml

_MOST_NAMED = 3

_NONCE = secrets.token_urlsafe(18)
"""Whoever wrote the records cannot know it, so that no script of theirs would run."""

_POLICY = (
    f"default-src 'none'; script-src 'nonce-{_NONCE}'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
)
"""The page's own scripts run, its styles count, figures can be saved as pictures, and nothing is loaded or sent."""

_STYLE = f"""{COLOURS}{STYLE}
body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
.figure {{ background: #fff; border: 1px solid var(--line); border-radius: .4rem; margin: 1rem 0; }}
"""


def report(run: RunRecords) -> str:
    """The page's HTML, whole: scripts and styles are in it.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    course = convergence(run)
    name = str(run.experiment.get("name", "run"))
    skips = [(skip.by, skip.node, skip.rounds) for skip in course.skipped]
    skipped = skip_table(skips, "who went on without whom") if skips else ""
    sections = [
        ("In short", listed(verdict(run, course))),
        ("Who exchanges with whom", _network(run, course)),
        ("Agreement", _agreement(run, course)),
        ("Loss", _drawn(figures.loss(run), "the training loss, round by round")),
        ("Was it worth it, and for whom", _gain_section(run.summary, run.gains) if run.summary and has_metrics(run.summary) else ""),
        ("Every model at every site", _cross_site(run.cross_site, rows_word(run.experiment)) if run.cross_site else ""),
        ("For whom: subgroups", _subgroups(run.subgroups)),
        ("Messages that were waited for in vain, in all rounds recorded here", skipped),
        ("Events", events(run)),
        ("Cost of a round", _cost(run)),
        ("Where the time goes", time_spent(run)),
        ("The experiment", _experiment(run)),
    ]
    body = "".join(f"<section><h2>{escaped(title)}</h2>{content}</section>\n" for title, content in sections if content)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<title>{escaped(name)}</title><style>{_STYLE}</style><script nonce="{_NONCE}">{figures.script()}</script></head>\n'
        f'<body><h1>{escaped(name)}</h1><p class="facts">{escaped(facts(run))}</p>{_notices(run)}\n{body}</body></html>\n'
    )


def _notices(run: RunRecords) -> str:
    """Notices on top: nodes that are lost, what did not go as agreed, and whose view this is."""
    state, whose = run_state(run), banner(run)
    ill = [f"{node} is {health.state}" for node, health in node_health(run).items() if health.state in ("late", "lost")]
    warnings = [*([f"It {state.sentence}."] if state.kind == "departed" else []), *([f"{'; '.join(ill[:_MOST_NAMED])}."] if ill else [])]
    red = "".join(f'<p class="bad"><strong>{escaped(warning)}</strong></p>' for warning in warnings)
    return red + (f"<p>{escaped(whose)}</p>" if whose else "")


def _network(run: RunRecords, course: Convergence) -> str:
    nodes = node_health(run)
    edges = edge_health(run, nodes)
    figure = figures.network(run, course, nodes, edges)
    names = (run.topology or {}).get("nodes") or []
    if figure is None:
        return note(f"The graph of {len(names):,} nodes is not drawn.") if names else ""
    states = "" if all(health.state == "finished" for health in nodes.values()) else node_states(nodes)
    drawn = _drawn(figure, "the graph of nodes and links")
    if not in_need(edges):
        return drawn + note(links_in_order(run, edges)) + states
    told = "Dashed or dotted and red, the thicker the more often: messages over this link came too late or not at all."
    return drawn + note(f"{told} {slowest_link_sentence(edges)}") + states


def _agreement(run: RunRecords, course: Convergence) -> str:
    figure = figures.agreement({"": course}, gaps(run, course))
    if figure is None:
        return ""
    fitted = f"{course.fitted_rate:.6f} a round, fitted" if course.fitted_rate is not None else f"no fitted rate: {course.fit_missing}"
    predicted = f"{course.predicted_rate:.6f} a round from the spectrum" if course.predicted_rate is not None else ""
    wanted = f", wanted {course.tolerance:.1e}" if course.tolerance is not None else ""
    is_before = course.relative is not None and course.basis != "after mixing"
    before = f"{BASES[course.basis]} in the last round {course.relative:.1e} of the models' size{wanted}" if is_before else ""
    after = f"{CONSENSUS} in the end {course.relative_consensus:.1e} of the models' size" if course.relative_consensus is not None else ""
    told = "; ".join(fact for fact in (fitted, predicted, before, after) if fact)
    return _drawn(figure, "the disagreement of the models, round by round") + note(told)


def _gain_section(summary: Row, sure: Sequence[Row] = ()) -> str:
    """Every metric at every site: alone, in the network, pooled; the primary one also as a picture, and with how sure its gains are."""
    first = primary_metric(summary["metrics"])
    assert first is not None
    intervals = {(row["site"], row["metric"]): row for row in sure}
    found = ""
    for metric in sorted(summary["metrics"], key=lambda name: name != first):
        at = scores(summary, metric)
        mean = mean_scores(summary, metric)
        heads = ["site", "alone", "network", "pooled", "better by"]
        rows: list[list[Cell]] = [[node, *_score_cells(own, intervals.get((node, metric)))] for node, own in list(at.items())[:MAX_ROWS]]
        more = note(f"{len(at) - MAX_ROWS} more in summary.json.") if len(at) > MAX_ROWS else ""
        of_mean_model = (summary.get("mean_model") or {}).get(metric)
        of_all = note(f"The mean model, on all {rows_word(summary)} together: {of_mean_model:.3f}.") if of_mean_model is not None else ""
        drawn = metric == first and len(at) <= figures.MAX_DRAWN
        picture = _drawn(figures.gains(at, metric), f"{metric} at each site, alone, in the network and pooled") if drawn else ""
        scores_at = table(heads, rows, ["mean", *_score_cells(mean)], about=f"{metric} at each site")
        found += f"<h3>{escaped(metric_heading(metric))}</h3>{picture}{scores_at}{more}{of_all}"
        found += _sentences([row for row in sure if row["metric"] == metric][:MAX_ROWS], rows_word(summary))
    return listed(of_rows(summary)) + found + _test(summary)


def _test(summary: Row) -> str:
    test = summary.get("test")
    if not test:
        return ""
    rows: list[list[Cell]] = []
    for metric, over_sites in test["metrics"].items():
        worst = over_sites["max" if lower_is_better(metric) else "min"]
        values = ((test["mean_model"] or {}).get(metric), over_sites["mean"], worst)
        rows.append([metric_heading(metric), *((value_text(value), "number") for value in values)])
    heads = ["metric", "mean model", "mean over the sites", "worst site"]
    return f"<h3>On test rows, {escaped(test['use'])}</h3>" + table(heads, rows, about="metrics on test rows, which choose nothing")


def _sentences(rows: Sequence[Row], word: str) -> str:
    if not rows:
        return ""
    methods = "; ".join(sorted({row["method"] for row in rows if row.get("method")}))
    if not any(row["low"] is not None for row in rows):
        return listed([gain_sentence(row, word) for row in rows])
    named = f" ({methods})" if methods else ""
    sure = (
        f"In brackets the {rows[0]['confidence']:.0%} interval of each difference, positive where the network is better, "
        f"both models on the same {word}{named}. "
        "Each site is judged by itself: of twenty that gain nothing one will look as if it did, or as if it lost."
    )
    return listed([gain_sentence(row, word) for row in rows]) + note(sure)


def _score_cells(own: Scores, sure: Row | None = None) -> list[Cell]:
    cells: list[Cell] = [(value_text(value), "number") for value in (own.alone, own.network, own.pooled)]
    better = own.better_by
    if better is None:
        return [*cells, ("-", "number")]
    judged = "number good" if better >= SAME else "number bad" if better <= -SAME else "number"
    _, low, high = betterness(sure) if sure else (None, None, None)
    interval = f" [{low:+.3f}, {high:+.3f}]" if low is not None and high is not None else ""
    return [*cells, ((f"{better:+.3f}" if abs(better) >= SAME else "0.000") + interval, judged)]


def _cross_site(found: Row, word: str) -> str:
    own = {name: number for number, name in enumerate(found["models"])}
    # one institution's own run has no mean model, but what its neighbours sent it; personal parameters leave none
    sites = {site["name"] for site in found["sites"]}
    shown = ["own model", *(model for model in found["models"] if model not in sites)]
    heads = ["site", word, "of each class", *shown]
    rows: list[list[Cell]] = [
        [
            site["name"],
            (f"{site['rows']:,}", "number"),
            ", ".join(f"{label}: {count}" for label, count in (site["support"] or {}).items()),
            *((_with_interval(found, model, place), "number") for model in (own[site["name"]], *(own[name] for name in shown[1:]))),
        ]
        for place, site in enumerate(found["sites"])
    ]
    sure = f" In brackets {found['confidence']:.0%} confidence intervals ({found['method']})." if found["method"] else ""
    reasons = Counter(why for row in found.get("no_interval") or () for why in row if why)
    none = "".join(f" No interval: {why} ({count:,} value{'s' if count > 1 else ''})." for why, count in reasons.most_common())
    what = f"{found['metric']} of every model at every site"
    told = note(f"By {found['metric']}, each on the site's own {word}.{sure}{none}")
    return _drawn(figures.cross_site(found), what) + table(heads, rows, about=f"{what}, with {word}") + told


def _subgroups(found: Sequence[Row]) -> str:
    if not found:
        return ""
    heads = ["site", "attribute", "group", "test rows", "AUROC", "sensitivity", "calibration error"]
    rows: list[list[Cell]] = []
    for row in found[:MAX_ROWS]:
        sure = f" [{row['auroc_low']:.3f}, {row['auroc_high']:.3f}]" if row["auroc_low"] is not None else ""
        cells = [
            "fewer than 10" if row["rows"] is None else f"{row['rows']:,}",
            value_text(row["auroc"]) + sure,
            value_text(row["sensitivity"]),
            value_text(row["calibration_error"]),
        ]
        names = (row["site"] or "all sites", row["attribute"], row["group"])
        rows.append([*names, *((text, "number") for text in cells)])
    told = (
        "Each site by its own model, all sites by the mean model. Sensitivity at specificity 0.9 within the group; groups of fewer than 10 "
        "test rows are withheld"
    )
    told += "; in brackets 95% confidence intervals." if any(row["auroc_low"] is not None for row in found) else "."
    return table(heads, rows, about="metrics of subgroups") + note(told)


def _with_interval(found: Row, model: int, place: int) -> str:
    value, low, high = (found[key][model][place] for key in ("value", "low", "high"))
    return value_text(value) + (f" [{low:.3f}, {high:.3f}]" if value is not None and low is not None else "")


def _cost(run: RunRecords) -> str:
    rows: list[list[Cell]] = []
    for label, number, size_bytes, seconds in round_costs(run):
        texts = ["-" if size_bytes is None else f"{size_bytes:,.0f}", *("-" if s is None else f"{s * 1000:,.2f}" for s in seconds)]
        rows.append([label, *((text, "number") for text in (f"{number:,}", *texts))])
    return table(["rounds", "number", "bytes", *(f"{part}, ms" for part in COST_PARTS)], rows, about="cost of a round") if rows else ""


def _experiment(run: RunRecords) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (run.environment.get("versions") or {}).items())
    return (
        f"<details><summary>experiment.yaml, every default written out</summary><pre>{escaped(dump_yaml(run.experiment))}</pre></details>"
        f"{note(versions)}"
    )


def _drawn(figure: figures.Figure | None, what: str) -> str:
    """The figure's place in the page, with what it shows for those who do not see it; nothing without a figure."""
    if figure is None:
        return ""
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True})
    drawn = drawn.replace("<script", f'<script nonce="{_NONCE}"')  # names in it have their < escaped
    return f'<div class="figure" role="img" aria-label="{escaped(what)}">{drawn}</div>'
