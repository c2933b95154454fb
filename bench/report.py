"""The report: Markdown between the markers of docs/performance.md, and the same in short for a terminal.

A part of the page stands between `<!-- bench: NAME -->` and `<!-- /bench: NAME -->` and is replaced whole; the rest of
the page is written by hand. Not here: pictures (`plots`), and what the figures mean (`verdicts`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plots
from goals import BARE, OURS
from record import Sample
from verdicts import Group, Spread, Verdict, groups, judge

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"

FAMILIES: dict[str, tuple[str, ...]] = {
    "Batches of no-op jobs": ("batch submit", "batch drain", "batch end to end"),
    "Single submits": ("single submit", "single drain"),
    "Latency": ("latency idle p50", "latency idle p99", "latency half load p50", "latency half load p99",
                "behind a batch: starts", "behind a batch: ends"),
    "Real inference": ("minilm", "minilm, two cores", "minilm, 5,000 texts", "digits", "efficientnet"),
    "Many rows": ("status p50", "status p99", "list p50", "list p99", "list of failed p50", "list of failed p99",
                  "counts p50", "counts p99", "drain beside rows"),
    "A batch that waits": ("submit of a batch: seconds", "submit of a batch: memory", "Redis: memory",
                           "worker: memory"),
    "More workers": ("workers", "workers: efficiency", "virtual workers: efficiency",
                     "virtual workers: PostgreSQL's cores", "virtual workers: transactions",
                     "virtual workers: served by this machine's cores", "virtual workers: cores for 1,000"),
    "An idle worker": ("idle worker: processor", "idle worker: queries"),
}  # fmt: skip
OTHERS = "Others"


def write(samples: Sequence[Sample], about: Mapping[str, Any], page: Path = PAGE) -> None:
    """Write everything that is measured into the page, and the pictures beside it."""
    drawn = plots.draw(samples, page.parent / page.stem)
    parts = {
        "machine": machine(about),
        "goals": goals(judge(samples)),
        "figures": figures(samples),
        "settings": settings(samples),
        "plots": "\n\n".join(f"![{title}]({page.stem}/{path.name})" for title, path in drawn.items()),
    }
    page.write_text(fill(page.read_text(), parts))


def fill(text: str, parts: Mapping[str, str]) -> str:
    """Replace what stands between the markers of each part. Raises ValueError where a page has no such marker."""
    for name, part in parts.items():
        marked = re.compile(rf"(<!-- bench: {name} -->\n).*?(<!-- /bench: {name} -->)", re.DOTALL)
        if not marked.search(text):
            raise ValueError(f"the page has no markers <!-- bench: {name} --> and <!-- /bench: {name} -->")
        body = f"\n{part}\n\n" if part else "\n"
        text = marked.sub(lambda found, body=body: found[1] + body + found[2], text)  # type: ignore[misc]
    return text


# --- tables -----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; an empty text where there are no rows."""
    if not rows:
        return ""
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(head), *lines[1:]))


def goals(verdicts: Sequence[Verdict]) -> str:
    """Return the table of the goals: ours, theirs, their ratio, and whether it is met."""
    rows = []
    for verdict in verdicts:
        ours, theirs = verdict.ours, verdict.theirs
        against = f"{theirs.name}: {_spread(theirs)}" if theirs is not None else ""
        ratio = spread(verdict.ratio) if theirs is not None else ""
        met = "met" if verdict.met else "**missed**"
        rows.append([verdict.goal.measure, verdict.goal.words, _spread(ours), against, ratio, met])
    return table(["measure", "goal", "torchrelay", "against", "ratio", ""], rows)


def figures(samples: Sequence[Sample]) -> str:
    """Return a heading and a table for each family of measures."""
    found = groups(samples)
    known = {measure: family for family, measures in FAMILIES.items() for measure in measures}
    order = {measure: i for i, measure in enumerate(known)}
    parts = []
    for family in (*FAMILIES, OTHERS):
        some = [group for group in found if known.get(group.measure, OTHERS) == family]
        some.sort(key=lambda group: (order.get(group.measure, 0), _rank(group)))
        rows = [[group.measure, _name(group), group.variant, _value(group), group.last.unit, _keeps(group)]
                for group in some]  # fmt: skip
        if rows:
            head = ["measure", "subject", "variant", "median (least – most)", "unit", "keeps"]
            parts.append(f"### {family}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def settings(samples: Sequence[Sample]) -> str:
    """Return the table of what each subject is and how it was set, a row for all measures that share it."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for group in groups(samples):
        more = group.last.more
        if more.get("settings"):
            key = (group.subject, str(more.get("version", "")), str(more["settings"]))
            rows.setdefault(key, []).append(group.measure)
    ordered = sorted(rows.items(), key=lambda item: (item[0][0] != OURS, item[0][0] != BARE, item[0]))
    return table(["subject", "version", "settings", "in"],
                 [[*key, ", ".join(dict.fromkeys(measures))] for key, measures in ordered])  # fmt: skip


def machine(about: Mapping[str, Any]) -> str:
    """Return one sentence about where and when."""
    if not about:
        return ""
    where = about["machine"]
    return (
        f"Written on {about['written']}: {where['cpus']} cores, {where['memory_gib']:g} GiB, {where['system']}, Python "
        f"{where['python']}; {about['rounds']} rounds, each subject at work for about {about['seconds']:g} s a round."
    )


def in_short(samples: Sequence[Sample]) -> str:
    """Return the goals' table for a terminal."""
    rows = []
    for verdict in judge(samples):
        ratio = spread(verdict.ratio) if verdict.theirs is not None else ""
        met = "met" if verdict.met else "MISSED"
        rows.append([verdict.goal.measure, verdict.goal.words, _spread(verdict.ours), ratio, met])
    if not rows:
        return "no goal was measured whole"
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


# --- cells ------------------------------------------------------------------------------------------------------------


def figure(value: float) -> str:
    """Return a number as people read it: thousands apart, and no digits that noise has made."""
    if abs(value) >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def spread(found: Spread) -> str:
    """Return a median with the least and the most; alone where there was one round."""
    if found.rounds <= 1:
        return figure(found.median)
    return f"{figure(found.median)} ({figure(found.least)} – {figure(found.most)})"


def _spread(group: Group) -> str:
    found, unit = group.spread, group.last.unit
    return f"{spread(found)} {unit}".rstrip() if found is not None else "failed"


def _value(group: Group) -> str:
    return spread(group.spread) if group.spread is not None else "did not run: " + "; ".join(group.errors)


def _keeps(group: Group) -> str:
    return str(group.last.more.get("keeps", ""))


def _name(group: Group) -> str:
    return f"**{group.subject}**" if group.subject == OURS else group.subject


def _rank(group: Group) -> tuple[bool, bool, float]:
    """Ours first, then the limits, then the peers, the best first."""
    found = group.spread
    lower = group.last.unit in ("ms", "s", "MB")
    value = found.median if found is not None else float("inf") if lower else 0.0
    return group.subject != OURS, not group.subject.startswith("bare"), value if lower else -value
