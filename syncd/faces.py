"""A status as people see it: the report of `syncd status` and status.log, and the one line that systemd shows. Pure.

The figures are those of report.py. Times are in the practice's zone; the report's own, `as of`, has the offset.
"""

from __future__ import annotations

import datetime as dt
import textwrap
from typing import Final

from syncd.errors import REASONS
from syncd.report import DAY, WEEK, Report, human_bytes, human_duration

WIDTH: Final = 80
MOST_INCIDENTS: Final = 20  # of a week; the earlier ones are a number
_VALUES: Final = 18  # the column in which values begin


def line(said: Report, zone: dt.tzinfo = dt.UTC) -> str:
    """State, reason, who must act and what to do, on one line."""
    owed = f"; {_progress(said, zone)}" if said["owed"] else ""
    return f"{_headline(said)}: {_what(said)}; {_action(said, zone)}{owed}"


def text(said: Report, zone: dt.tzinfo = dt.UTC) -> str:
    """A status for people in 80 columns, the most urgent first."""
    lines = [f"{said['practice']}: {_headline(said)}", *_wrap("  ", _what(said)), *_wrap("  ", _action(said, zone))]
    lines += [f"  since {_local(said['since'], zone)}"] if said["since"] else []
    lines += [f"  as of {_local(said['at'], zone)}", "", *_work_lines(said, zone), "", *_site_lines(said, zone)]
    lines += ["", *_week_lines(said, zone), "", *textwrap.wrap(said["health"], WIDTH)]
    return "\n".join(lines) + "\n"


def _headline(said: Report) -> str:
    return f"{said['state'].replace('_', ' ').upper()} ({said['reason']})"


def _what(said: Report) -> str:
    return str(said["message"].partition(": ")[0])


def _action(said: Report, zone: dt.tzinfo) -> str:
    """`practice_it: start the eConnector service in the office; next try 14:05`."""
    to_do, at = said["message"].partition(": ")[2], said["next_try_at"]
    words = f"{said['who']}: {to_do}" if to_do else "nobody needs to act"
    until = "until" if said["state"] == "paused" else "next try"
    return words + (f"; {until} {_short(at, said, zone)}" if at else "")


def _progress(said: Report, zone: dt.tzinfo) -> str:
    """`31,204 of 40,118 documents; 12 h 22 min left; ready Tue 06:10`."""
    about = "about " if said["lists_never_polled"] else ""
    words = f"{said['archived_items']:,} of {about}{said['expected_items']:,} documents"
    left = f"; {human_duration(said['eta_seconds'])} left" if said["eta_seconds"] else ""
    return words + left + (f"; ready {_short(said['ready_at'], said, zone)}" if left else "")


def _work_lines(said: Report, zone: dt.tzinfo) -> list[str]:
    lines = _line("owed", f"{said['owed']:,}")
    lines += _line("", _progress(said, zone)) if said["owed"] or said["lists_never_polled"] else []
    lines += _line("failing", f"{said['failing']:,}")
    lines += [f"    {name}: {count:,}" for name, count in said["failing_by_class"].items()]
    lines += _line("held", f"{said['held']:,}")
    for g in said["guards"]:
        what = "patients" if g["scope"] == "roster" else "items"
        lines += [f"    {g['id']}: {g['items']:,} of {g['of_items']:,} {what} ({g['scope']})"]
    lines += _line("vanished", f"{said['vanished']:,}, {said['vanished_this_week']:,} of them this week")
    named = (("at the source", "pending_at_source"), ("thumbnails due", "thumbnails_due"))
    return lines + [each for words, key in named for each in _line(words, f"{said[key]:,}")]


def _site_lines(said: Report, zone: dt.tzinfo) -> list[str]:
    age = f"first sync, {said['lists'] - said['lists_never_polled']:,} of {said['lists']:,} lists"
    if said["oldest_list_seconds"] is not None:
        age = f"{human_duration(said['oldest_list_seconds'])} ago"
        age += f", all were read since {_short(said['last_complete_sweep_at'], said, zone)}"
    lines = _line("oldest list", f"{age}; the limit is {human_duration(said['floor_seconds'])}")
    for kind, each in said["freshness"].items():
        took = (human_duration(each[f"{part}_seconds"]) for part in ("median", "p95", "oldest"))
        words = "{:,} in a day, half of them within {}, 95 % within {}, all within {}"
        lines += _line(f"new {kind}s", words.format(each["files"], *took))
    again_at = said["change_feed_again_at"]
    feed = f"refused or failing; again {_short(again_at, said, zone)}" if again_at else said["change_feed"]
    archived = f"{said['archived_versions']:,} versions of {said['archived_items']:,} items"
    budget = f"{said['requests_today']:,} today of {said['requests_a_day']:,} a day"
    drilled = {True: "passed ", False: "FAILED ", None: ""}[said["drill_passed"]] + _chore(said, "drill", zone)
    for words, value in (
        ("last archived", _short(said["last_archived_at"], said, zone)),
        ("change feed", feed),
        ("requests", f"{budget}, {said['throttled_today']:,} refused (429)"),
        ("archive", f"{archived}, {human_bytes(said['archived_bytes'])}"),
        ("space", _space(said)),
        ("left on the drop", f"{said['drop_leftovers']:,}"),
        ("last check", _chore(said, "scrub", zone)),
        ("copy of index", _chore(said, "index_copy", zone)),
        ("restore drill", drilled),
    ):
        lines += _line(words, value)
    return lines


def _space(said: Report) -> str:
    if said["archive_free_bytes"] is None:
        return "unknown"
    words = f"{human_bytes(said['archive_free_bytes'])} free"
    words += f", what is to come needs {human_bytes(said['expected_bytes'])}" if said["expected_bytes"] else ""
    if said["archive_full_at"] is None:
        return words
    days = (_moment(said["archive_full_at"]) - _moment(said["at"])) / DAY
    return f"{words}; full in {days:,.0f} days at {human_bytes(said['grown_bytes_a_day'])} a day"


def _chore(said: Report, name: str, zone: dt.tzinfo) -> str:
    due_at, words = said[f"{name}_next_at"], _short(said[f"{name}_last_at"], said, zone)
    return words + (f"; next {_short(due_at, said, zone)}" if due_at else "")


def _week_lines(said: Report, zone: dt.tzinfo) -> list[str]:
    counts = f"{said['archived_this_week']:,} archived, {said['vanished_this_week']:,} vanished"
    counts += f", {said['healed_this_week']:,} healed; grown by {human_bytes(said['grown_bytes_this_week'])}"
    incidents = said["incidents"]
    lines = ["this week:", f"  {counts}"] + ([] if incidents else ["  no incidents"])
    lines += [f"  {len(incidents) - MOST_INCIDENTS:,} earlier incidents"] if len(incidents) > MOST_INCIDENTS else []
    for each in incidents[-MOST_INCIDENTS:]:
        who, meaning, _ = REASONS[each["reason"]]
        since, until = (_short(each[key], said, zone) for key in ("since_at", "until_at"))
        until = until[4:] if until[:4] == since[:4] and len(until) == len("Tue 03:10") else until
        span = f"{since}-{until if each['until_at'] else 'now'}"
        lasted = human_duration(each["lasted_seconds"])
        lines += _wrap("  ", f"{span}  {meaning.partition(': ')[0]} ({lasted}), {who}", "    ")
    return lines


def plan_text(planned: Report) -> str:
    """The plan for people, in 80 columns; of a practice whose patients were never listed there is none yet."""
    if not planned["patients"]:
        return "the list of patients was never read: begin with `syncd backfill`, then ask again\n"
    size = human_bytes(planned["expected_bytes"])
    sweep = f"{planned['lists']:,} lists, {planned['sweep_requests']:,} requests a sweep"
    lines = [f"{planned['patients']:,} patients: {sweep}"]
    lines += [f"to fetch: {planned['expected_files']:,} files, {size}, {planned['requests_to_come']:,} requests"]
    lines += ["(an estimate: not every list was polled yet)"] if planned["estimated"] else []
    lines += ["", f"{'tier':<22}{'finished after':>16}{'a sweep takes':>16}{'mean age':>16}"]
    for tier in planned["tiers"]:
        seconds = (tier["days_to_finish"] * DAY, tier["sweep_seconds"], tier["mean_age_seconds"])
        lines.append(f"{tier['tier']:<22}" + "".join(f"{human_duration(each):>16}" for each in seconds))
    return "\n".join(lines) + "\n"


# --- lines and times


def _line(words: str, value: str) -> list[str]:
    return _wrap(f"{words + ':' if words else '':<{_VALUES}}", value, " " * _VALUES)


def _wrap(start: str, words: str, further: str | None = None) -> list[str]:
    return textwrap.wrap(words, WIDTH, initial_indent=start, subsequent_indent=start if further is None else further)


def _local(at: str, zone: dt.tzinfo) -> str:
    return dt.datetime.fromisoformat(at).astimezone(zone).isoformat(sep=" ", timespec="seconds")


def _short(at: str | None, said: Report, zone: dt.tzinfo) -> str:
    """`Tue 03:10`; with the date, where that might be another Tuesday."""
    if at is None:
        return "never"
    near = abs(_moment(at) - _moment(said["at"])) < WEEK - DAY
    when = dt.datetime.fromisoformat(at).astimezone(zone)
    return f"{when:%a %H:%M}" if near else f"{when:%Y-%m-%d %H:%M}"


def _moment(at: str) -> float:
    return dt.datetime.fromisoformat(at).timestamp()
