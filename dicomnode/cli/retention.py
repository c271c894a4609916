"""`retention`: which studies would be removed by the site's rules, and why; with --apply they are."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from dicomnode.cli.terminal import ConfigOption, JsonOption, opened, show
from dicomnode.errors import NodeError, UsageError


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("retention")(retention)


def retention(
    apply: Annotated[bool, typer.Option("--apply", help="remove them now; a receiver does so by itself")] = False,
    kept: Annotated[bool, typer.Option("--kept", help="show the studies that stay, too, and why")] = False,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Show the studies whose objects the rules of the section retention would remove, and why; nothing is removed without --apply."""
    from dicomnode.retention import has_rule, remove_due, verdicts

    with opened(config) as (settings, storage):
        rules = settings.retention
        if apply and kept:
            raise UsageError("--kept shows, --apply removes: one of them")
        if apply and not has_rule(rules):
            raise UsageError("no rule removes anything: set days, quota_bytes or disk_share in [retention]")
        now = datetime.now(UTC)
        found = remove_due(storage, rules, now) if apply else verdicts(storage, rules, now, all_studies=kept)
        rows = [
            {
                "study_instance_uid": verdict.holding.study_instance_uid,
                "touched_at": verdict.holding.touched_at,
                "objects": verdict.holding.objects,
                "bytes": verdict.holding.size,
                "goes": verdict.goes,
                "why": verdict.why,
            }
            for verdict in found
            if verdict.goes or kept
        ]
        show(rows, ["study_instance_uid", "touched_at", "objects", "bytes", "goes", "why"], as_json=json)
        if left := storage.retention.finish() if apply else 0:
            raise NodeError(f"{left} files could not be removed; they are tried again")
