"""`metrics`: what the processes of the node have counted, and whether images are taken in, in the text format of Prometheus.

A counter is named "WHAT" or "WHAT: REASON": "association rejected: network" is dicomnode_association_rejected_total{reason="network"}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby

import typer

from dicomnode.cli.terminal import ConfigOption, JsonOption, opened, show


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("metrics")(metrics)


def metrics(config: ConfigOption = None, json: JsonOption = False) -> None:
    """Print what was counted since the database was made, e.g. associations that were rejected, in the text format of Prometheus."""
    with opened(config) as (_, storage):
        counts = storage.counters.all()
        now = {"intake stopped now": int(storage.objects.intake_stopped), "free bytes": storage.objects.free_bytes()}
    if json:
        show([{"name": name, "count": count} for name, count in sorted({**counts, **now}.items())], [], as_json=True)
    else:
        typer.echo(exposition(counts) + gauges(now), nl=False)


def gauges(values: Mapping[str, int]) -> str:
    """Write values of this moment as the text exposition format 0.0.4 has them."""
    lines = []
    for what, value in values.items():
        name = f"dicomnode_{what.replace(' ', '_')}"
        lines += [f"# HELP {name} {what}", f"# TYPE {name} gauge", f"{name} {value}"]
    return "".join(f"{line}\n" for line in lines)


def exposition(counts: Mapping[str, int]) -> str:
    """Write counters as the text exposition format 0.0.4 has them; a metric's lines stand together."""
    split = sorted((_metric(what), reason, what, count) for name, count in counts.items() for what, _, reason in [name.partition(": ")])
    lines = []
    for metric, group in groupby(split, key=lambda entry: entry[0]):
        entries = list(group)
        lines += [f"# HELP {metric} {_escaped(entries[0][2])}", f"# TYPE {metric} counter"]
        for _, reason, _, count in entries:
            label = f'{{reason="{_escaped(reason, quotes=True)}"}}' if reason else ""
            lines.append(f"{metric}{label} {count}")
    return "".join(f"{line}\n" for line in lines)


def _metric(what: str) -> str:
    return f"dicomnode_{re.sub('[^a-z0-9]+', '_', what.lower()).strip('_')}_total"


def _escaped(text: str, *, quotes: bool = False) -> str:
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n")
    return escaped.replace('"', '\\"') if quotes else escaped
