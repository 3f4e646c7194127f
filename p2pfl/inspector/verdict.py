"""Verdict on a run in plain words: has it converged, where is it stuck, what did each site gain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from p2pfl.inspector.convergence import BASES, Convergence
from p2pfl.inspector.link_health import edge_health, slowest_link_sentence
from p2pfl.inspector.outages import Outages, outages
from p2pfl.inspector.run_state import count_text, has_metrics, names_text, run_state
from p2pfl.runs.events import EventKind
from p2pfl.runs.records import RunRecords
from p2pfl.runs.summary_fields import lower_is_better, metric_heading, primary_metric, rows_word
from p2pfl.runs.text import Row

_MOST_OUTAGES = 3
COST_PARTS = ("train", "wait", "mix", "evaluate", "checkpoint")

SAME = 0.0005
"""Metrics are shown with three digits: a smaller difference is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """One metric at one node, or on average over the nodes."""

    alone: float | None
    network: float | None
    pooled: float | None
    lower_is_better: bool = False

    @property
    def better_by(self) -> float | None:
        """How much better the network is than the site alone: positive where it is better, whichever direction the metric has."""
        if self.network is None or self.alone is None:
            return None
        return self.alone - self.network if self.lower_is_better else self.network - self.alone


def scores(summary: Mapping[str, Any], metric: str) -> dict[str, Scores]:
    """A metric at each node, by name; empty above the number of nodes for which a summary holds single values."""
    per_node = summary["metrics"][metric].get("per_node") or {}
    alone, pooled = (_metric_values(summary, kind, metric).get("per_node") or {} for kind in ("local", "pooled"))
    is_loss = lower_is_better(metric)
    return {
        node: Scores(alone=alone.get(node), network=value, pooled=pooled.get(node), lower_is_better=is_loss)
        for node, value in per_node.items()
    }


def mean_scores(summary: Mapping[str, Any], metric: str) -> Scores:
    """A metric on average over the nodes at which it is defined."""
    local, pooled = (_metric_values(summary, kind, metric) for kind in ("local", "pooled"))
    network = summary["metrics"][metric].get("mean")
    return Scores(alone=local.get("mean"), network=network, pooled=pooled.get("mean"), lower_is_better=lower_is_better(metric))


def verdict(run: RunRecords, course: Convergence) -> list[str]:
    """Sentences for somebody who has to decide what to do next."""
    state = run_state(run)
    departed = [f"It {state.sentence}."] if state.kind == "departed" else []
    halted = [state.said] if state.kind in ("paused", "silent", "unknown") else []
    if run.summary is not None and run.summary.get("stop_reason") == "diverged":
        return [
            *departed,
            "It has diverged: at every node the last training became non-finite and was rolled back, so these models are no result.",
            "Lower optimizer.lr or set optimizer.clip_norm, then run it again.",
        ]
    absent = (run.summary or {}).get("started_without") or ()
    began = [f"It began without {', '.join(absent)}, as the study allows."] if absent else []
    found = [*departed, *halted, *began, *_differing(run), _agreement(run, course), *_diverged(run), *_inexact(run)]
    if run.rounds and (run.summary is None or run.summary.get("stop_reason") != "converged"):
        found += _where_stuck(run, course)
    if run.summary is not None and has_metrics(run.summary):
        found += _gains(run.summary)
        word = rows_word(run.experiment)
        found += _how_sure(run.gains, len(scores(run.summary, primary_metric(run.summary["metrics"]) or "")), word)
        found += of_rows(run.summary)
    return found


def round_costs(run: RunRecords) -> list[tuple[str, int, float | None, list[float | None]]]:
    """Rounds that train and rounds that only mix: what they are, how many, and their mean bytes and seconds by `COST_PARTS`."""
    found = []
    for kind, label in (("train", "training"), ("settle", "mixing only")):
        if rows := [row for row in run.rounds if row["kind"] == kind]:
            seconds = [_mean((row.get("seconds") or {}).get(part) for row in rows) for part in COST_PARTS]
            found.append((label, len(rows), _mean(row.get("bytes_sent") for row in rows), seconds))
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def percent(fraction: float) -> str:
    """A fraction in per cent, never rounded to nothing."""
    return "less than 0.1%" if 0 < fraction < 0.001 else f"{fraction:.1%}" if 0 < fraction < 0.02 else f"{fraction:.0%}"  # noqa: PLR2004


def certificate(run: RunRecords, course: Convergence) -> str:
    """Tell what the nodes' own records prove about the disagreement, which needs nobody's trust in the mean model."""
    if not course.certified:
        if run.rounds and all(row.get("disagreement") is None for row in [*run.rounds, *run.network]):
            return "The nodes' records certify no distance: no models were compared."
        return "The nodes' records certify no distance: that takes a round in which every message came."
    last, low, high = course.certified[-1]
    size = next(row.get("rms_norm") for row in reversed(run.network or run.rounds) if row["round"] == last)
    relative = f", which is {_between(low / size, high / size, 'to')} of their size" if size else ""
    wanted = f"; wanted is {course.tolerance:.1e}" if course.tolerance is not None and relative else ""
    since = "" if last == course.rounds[-1] else " Since then messages were missed, and nothing is certified."
    return f"In round {last} the disagreement was certainly {_between(low, high, 'and')}{relative}{wanted}.{since}"


def _between(low: float, high: float, word: str) -> str:
    """One value where the two are shown alike."""
    texts = f"{low:.1e}", f"{high:.1e}"
    first = "between " if word == "and" else ""
    return texts[0] if texts[0] == texts[1] else f"{first}{texts[0]} {word} {texts[1]}"


def _agreement(run: RunRecords, course: Convergence) -> str:
    if not run.rounds:
        return "No round is recorded yet."
    summary = run.summary
    if summary is None:
        if not course.relative:
            return f"Not done: round {course.rounds[-1]} is the newest that is known of {'the network' if run.network else 'it'}."
        wanted = f", wanted is {course.tolerance:.1e}" if course.tolerance else ""
        is_about = BASES[course.basis].split(" (")[0] + (" is at most" if course.basis == "upper bound" else " is")
        return f"Not done: in round {course.rounds[-1]} the {is_about} {course.relative:.1e} of the models' size{wanted}.{_left(course)}"
    relative = summary.get("relative_consensus", course.relative_consensus)
    known = f"the models' consensus distance is {relative:.1e} of their size" if relative is not None else None
    differ = known or "how far the models differ after mixing is not known"
    if summary.get("stop_reason") == "converged":
        return f"It has converged: the nodes agreed to stop after {summary['rounds']} rounds, and {differ}."
    if (run.experiment.get("stop", "") is None) and summary.get("stop_reason") == "rounds":
        return f"It ran the {summary['rounds']} rounds that were asked for, without a test for agreement; {differ}."
    within = course.relative is not None and course.tolerance is not None and course.relative <= course.tolerance
    though = "; their last disagreement is within the tolerance, but not every node could certify it" if within else ""
    return f"It has not converged: it ended after {summary['rounds']} rounds, and {differ}{though}."


def _left(course: Convergence) -> str:
    if not course.rounds_to_go:
        return ""
    fewest, most = course.rounds_to_go_between or (course.rounds_to_go, course.rounds_to_go)
    sure = "" if fewest == most == course.rounds_to_go else f" ({fewest} to {most})" if most is not None else f" ({fewest} or more)"
    spent = course.seconds_to_go
    seconds = "" if spent is None else f", some {_duration(spent)}"
    return f" About {course.rounds_to_go} more rounds of mixing will do at this rate{sure}{seconds}."


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 2 else f"{seconds:.1g} seconds"  # noqa: PLR2004


def _diverged(run: RunRecords) -> list[str]:
    """Name the nodes that lost training rounds because they became non-finite."""
    times = Counter(str(event["node"]) for event in run.events if event["event"] == EventKind.DIVERGED)
    if not times:
        return []
    where = names_text([f"{node} ({count_text(count, 'round')})" for node, count in times.most_common()])
    return [f"Training became non-finite and was rolled back at {where}: lower optimizer.lr or set optimizer.clip_norm."]


def _differing(run: RunRecords) -> list[str]:
    """Which sites computed with something else than the study's result contract says, as they have accepted."""
    rows = (run.summary or {}).get("accepted_differences") or ()
    return [f"{row['node']} differs from the study's result contract, as it accepts: {row['detail']}." for row in rows]


def _inexact(run: RunRecords) -> list[str]:
    """Name the nodes that went on without a message that the algorithm needs."""
    first = {str(event["node"]): int(event["round"]) for event in reversed(run.events) if event["event"] == EventKind.INEXACT}
    if not first:
        return []
    late = f"{names_text(sorted(first))} went on without one from round {min(first.values())} on"
    return [
        f"The algorithm needs every message, and {late}: its models are not what its paper promises.",
        "Where links fail take dpsgd or qg-dsgdm, or raise deadline_floor_s in site.yaml.",
    ]


def _where_stuck(run: RunRecords, course: Convergence) -> list[str]:
    found = []
    if course.slowest and len(course.slowest) > 1:
        worst = course.slowest[0]
        found.append(f"{worst.node} is furthest from its neighbours, with {percent(worst.fraction)} of the disagreement left.")
    away = outages(run) if course.skipped else Outages(found=[])
    longest = sorted(away.found, key=lambda outage: (outage.is_over, outage.first - outage.last))
    found += [outage.sentence for outage in longest[:_MOST_OUTAGES]]
    if len(longest) > _MOST_OUTAGES:
        found.append(f"{count_text(len(longest) - _MOST_OUTAGES, 'more outage')} stand in the events.")
    if course.skipped and (slowest := slowest_link_sentence(edge_health(run, away=away))):
        found.append(slowest)
    fitted, predicted = course.fitted_rate, course.predicted_rate
    if fitted is not None and fitted >= 1:
        found.append("Mixing does not bring the models together at all: look at the links first.")
    elif fitted is not None and predicted and fitted > predicted * (1 + 1e-3) and course.skipped:
        found.append(f"It mixes more slowly ({fitted:.4f} a round) than the graph allows ({predicted:.4f}): lost messages cost that.")
    return found


def of_rows(summary: Mapping[str, Any]) -> list[str]:
    """On which rows metrics were measured, where these are no test rows, and what the test rows say beside."""
    if (word := rows_word(summary)) == "test rows":
        return []
    test, metric = summary.get("test"), primary_metric(summary["metrics"])
    found = [f"These metrics are measured on {word}, which were taken out of the training rows."]
    if test is None or metric is None:
        return [*found, "No test rows were measured."]
    over_sites, of_mean_model = test["metrics"][metric], (test.get("mean_model") or {}).get(metric)
    worst = over_sites["max" if lower_is_better(metric) else "min"]
    named = (("of the mean model", of_mean_model), ("on average over the sites", over_sites["mean"]), ("at the worst site", worst))
    values = ", ".join(f"{value:.3f} {what}" for what, value in named if value is not None)
    return [*found, f"On test rows, {test['use']}: {metric_heading(metric)} {values or 'undefined'}."]


def gain_sentence(row: Row, word: str = "test rows") -> str:
    """One site's gain with its interval, positive where the network is better, and how sure it is from rows of that name."""
    site, (gain, low, high) = row["site"], betterness(row)
    if gain is None:
        return f"{site}: {row['metric']} is undefined on its {row['rows']:,} {word}."
    if (low is None or high is None) and row.get("no_interval"):
        return f"{site}: {gain:+.3f} (no interval: {row['no_interval']})."
    if low is None or high is None:
        return f"{site}: {gain:+.3f}, without an interval from {row['rows']:,} {word}."
    if low > 0:
        return f"{site} gains {gain:.3f} ({low:.3f} to {high:.3f}): sure."
    if high < 0:
        return f"{site} loses {-gain:.3f} ({-high:.3f} to {-low:.3f}): sure."
    return f"{site}: {gain:+.3f} ({low:+.3f} to {high:+.3f}): cannot be told from {row['rows']:,} {word}."


def betterness(row: Row) -> tuple[float | None, float | None, float | None]:
    """A gain and its interval, positive where the network is better."""
    if not row.get("lower_is_better", lower_is_better(row["metric"])):
        return row["gain"], row["low"], row["high"]
    gain, high, low = (None if row[key] is None else -row[key] for key in ("gain", "low", "high"))
    return gain, low, high


def _how_sure(rows: Sequence[Row], num_sites: int, word: str) -> list[str]:
    told = [(low, high) for _, low, high in map(betterness, rows) if low is not None and high is not None]
    if not told:
        reasons = sorted({row["no_interval"] for row in rows if row.get("no_interval")})
        return [f"How sure the gains are is not known: {'; '.join(reasons)}."] if reasons else []
    total = max(num_sites, len(rows))
    gain, lose = sum(low > 0 for low, _ in told), sum(high < 0 for _, high in told)
    unsure = total - gain - lose
    parts = [
        f"{gain or 'none'} of {count_text(total, 'site')} {'gains' if gain <= 1 else 'gain'} for sure",
        *([f"{unsure} cannot be told"] if unsure else []),
        f"{lose or 'none'} {'loses' if lose <= 1 else 'lose'}{' for sure' if lose else ''}",
    ]
    return [f"With {rows[0]['confidence']:.0%} intervals from each site's own {word}, {', '.join(parts)}."]


def _gains(summary: Row) -> list[str]:
    metric = primary_metric(summary["metrics"])
    assert metric is not None
    nodes = scores(summary, metric)
    gains = {node: gain for node, own in nodes.items() if (gain := own.better_by) is not None}
    found = []
    if gains:
        better = [node for node in gains if gains[node] >= SAME]
        worse = sorted((node for node in gains if gains[node] <= -SAME), key=gains.__getitem__)
        best = max(gains, key=gains.__getitem__)
        most = f" (most of all {best}, {gains[best]:+.3f})" if better else ""
        sentence = (
            f"By {metric_heading(metric)}, {len(better)} of {count_text(len(nodes), 'site')} {'is' if len(better) == 1 else 'are'} "
            f"better off than alone{most}"
        )
        if worse:
            sentence += (
                f"; {len(worse)} {'is' if len(worse) == 1 else 'are'} worse off: {names_text([f'{n} {gains[n]:+.3f}' for n in worse])}"
            )
        if len(gains) < len(nodes):
            sentence += f"; at {len(nodes) - len(gains)} it is undefined"
        found.append(sentence + ("." if worse else "; none is worse off."))
    mean = mean_scores(summary, metric)
    if mean.network is not None and mean.pooled is not None:
        behind = (mean.network - mean.pooled) if lower_is_better(metric) else (mean.pooled - mean.network)
        words = "as well as" if abs(behind) < SAME else f"{abs(behind):.3f} {'worse' if behind > 0 else 'better'} than"
        found.append(f"On average the network does {words} one model trained on all data pooled.")
    return found


def _metric_values(summary: Mapping[str, Any], kind: str, metric: str) -> Row:
    baselines = summary.get("baselines") or {}
    values: Row = (baselines.get(kind) or {}).get(metric) or {}
    return values
