"""Totals, accuracy lines and tables of the truth suite, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from truth_methods import KAPPA

Row = dict[str, Any]
# A gap of 100 between singular values.
CLEAR = 1e4


def totals(rows: list[Row]) -> dict[str, float]:
    """What counts most: false claims."""
    said = [row for row in rows if "refused" not in row]
    return {
        "problems": len({(row["group"], row["problem"]) for row in rows}),
        "runs": len(rows),
        "refused": len(rows) - len(said),
        "two_sided": sum(row["two_sided"] for row in said),
        "two_sided_violations": sum(row["two_sided"] and not row["holds"] for row in said),
        "largest_share": max((row["share"] for row in said), default=0.0),
        "one_sided": sum(not row["two_sided"] for row in said),
        "one_sided_violations": sum(not row["two_sided"] and not row["holds"] for row in said),
    }


def _line(name: str, rows: list[Row], met: Callable[[Row], bool], worst: Callable[[Row], float]) -> Row:
    misses = [row for row in rows if not met(row)]
    return {
        "line": name,
        "runs": len(rows),
        "met": len(rows) - len(misses),
        "worst": max((worst(row) for row in rows), default=math.nan),
        "misses": [
            {
                key: row.get(key)
                for key in ("group", "problem", "relative_error", "width", "products", "truth_rank", "note")
            }
            for row in misses
        ],
    }


def error(row: Row) -> float:
    return float(row["relative_error"])


def close(row: Row) -> bool:
    return error(row) <= 1e-4


def width(row: Row) -> float:
    return float(row["width"])


def accuracy(rows: list[Row]) -> list[Row]:
    """The accuracy that was asked for: how many runs meet it, the worst, and which do not."""
    plain = [
        row
        for row in rows
        if "refused" not in row
        and row["kind"] == "kappa*"
        and row["truth"] <= 1.2 * KAPPA
        and row["group"] != "undeclared null space"
    ]
    svd = [row for row in plain if row["method"] == "factor-svd" and not row["single"]]
    gk = [row for row in plain if row["method"] == "golub-kahan" and not row["single"]]
    single = [row for row in plain if row["method"] == "factor-svd" and row["single"]]
    stored = [row for row in single if row["given"]]
    computed = [row for row in single if not row["given"]]
    clear = [row for row in computed if row["two_sided"] or row["gap_ratio"] >= CLEAR]
    resolved = [row for row in computed if row["two_sided"]]
    rest = [row for row in computed if not row["two_sided"]]
    closed = [row for row in svd if row["two_sided"]]

    def products(row: Row) -> float:
        return float(row["products"] - row["null_dim"] - row["truth_rank"])

    def svd_products(row: Row) -> float:
        return float(row["products"] - row["null_dim"] - row["shape"][0] / 2)

    return [
        _line("factor-svd, float64, kappa <= 1e12: relative error <= 1e-8", svd, lambda r: error(r) <= 1e-8, error),
        _line("the same: both sides claimed", svd, lambda r: r["two_sided"], lambda r: float(not r["two_sided"])),
        _line("the same, both sides claimed: width <= 1e-6", closed, lambda r: width(r) <= 1e-6, width),
        _line(
            "the same: products <= rows / 2, beside the checks of null directions (8 and one each)",
            svd,
            lambda r: svd_products(r) <= 8,
            svd_products,
        ),
        _line("golub-kahan, float64, kappa <= 1e12: relative error <= 1e-9", gk, lambda r: error(r) <= 1e-9, error),
        _line(
            "the same: products <= rank + 2, beside norm estimates (8) and one for each null direction",
            gk,
            lambda r: products(r) <= 10,
            products,
        ),
        _line("factor-svd, float32, stored rows: relative error <= 1e-4", stored, close, error),
        _line("factor-svd, float32, computed rows, a clear gap: relative error <= 1e-4", clear, close, error),
        _line("factor-svd, float32, computed rows: both sides claimed", computed, lambda r: r["two_sided"], error),
        _line("the same, both sides claimed: relative error <= 1e-4", resolved, close, error),
        _line("the same, one side claimed: the claim holds", rest, lambda r: r["holds"], error),
    ]


def markdown(record: dict[str, Any]) -> str:
    """The whole page."""
    rows, total = record["rows"], record["totals"]
    lines = [
        "# Truth suite",
        "",
        f"{record['date']}; `{record['command']}`; {record['seconds']:.0f} s, "
        f"{record['cpu_seconds']:.0f} of them computing; "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + f"; extended precision {record['extended_unit']:.1g}; {record['state']}.",
        "",
        f"**{total['problems']} problems, {total['runs']} runs of methods: {total['two_sided']} two-sided intervals, "
        f"{total['two_sided_violations']} of them false; {total['one_sided']} one-sided statements, "
        f"{total['one_sided_violations']} of them false; {total['refused']} refused with a reason.**",
        "",
        f"No error used more than {total['largest_share']:.2g} of the way from a value to its bound.",
        "",
        "## Accuracy that was asked for",
        "",
        *_table(
            ("line", "runs", "met", "worst"),
            ((r["line"], r["runs"], r["met"], _short(r["worst"])) for r in record["accuracy"]),
        ),
        "",
        *_misses(record["accuracy"]),
    ]
    lines += [*_chances(record["chances"]), *_nullity(record["nullity"])]
    lines += ["## By group and method", "", *_groups(rows), "", *_runs(rows)]
    return "\n".join(lines) + "\n"


def _chances(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["## Claims that rest on a random start", ""]
    lines += _table(
        ("claim", "starts", "both sides", "false", "stated probability"),
        ((r["claim"], r["starts"], r["two_sided"], r["false"], _short(r["stated_probability"])) for r in rows),
    )
    lines += ["", "A stated probability of 0 is a claim that must never fail.", ""]
    return lines


def _nullity(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["## Null directions found and the nullity of the dense factor", ""]
    lines += _table(
        ("network", "parameters", "nullity", "found", "unexplained", "not analysed", "gap"),
        (
            (
                r["network"],
                r["parameters"],
                r["nullity"],
                r["found"],
                r["unexplained"],
                "; ".join(r["not_analysed"]) or "-",
                _short(r["gap"]),
            )
            for r in rows
        ),
    )
    lines += [""]
    return lines


def _misses(accuracy_lines: list[Row]) -> list[str]:
    lines = []
    for entry in accuracy_lines:
        if entry["misses"]:
            lines += [f"Not met: {entry['line']}", ""]
            for miss in entry["misses"]:
                numbers = f"error {_short(miss['relative_error'])}, width {_short(miss['width'])}"
                numbers += f", {miss['products']} products, rank {miss['truth_rank']}"
                lines.append(
                    f"- {miss['group']}: {miss['problem']} ({numbers}{'; ' + miss['note'] if miss['note'] else ''})"
                )
            lines.append("")
    return lines


def _groups(rows: list[Row]) -> list[str]:
    keys = list(dict.fromkeys((row["group"], row["method"]) for row in rows))
    body = []
    for group, method in keys:
        part = [row for row in rows if (row["group"], row["method"]) == (group, method)]
        said = [row for row in part if "refused" not in row]
        both = [row for row in said if row["two_sided"]]
        body.append(
            (
                group,
                method,
                len(part),
                len(both),
                sum(not row["holds"] for row in said),
                _short(max((row["relative_error"] for row in both), default=math.nan)),
                _short(max((row["width"] for row in both), default=math.nan)),
                len(part) - len(said),
            )
        )
    return _table(("group", "method", "runs", "both sides", "false", "worst error", "widest", "refused"), body)


def _runs(rows: list[Row]) -> list[str]:
    """Those whose claim is false, or that claim less than both sides where another method of the problem does not."""
    decided = {(row["group"], row["problem"]) for row in rows if row.get("two_sided")}
    body = []
    for row in rows:
        wanted = not row.get("holds", True) or "refused" in row or not row["two_sided"]
        if not wanted or ((row["group"], row["problem"]) not in decided and row.get("holds", True)):
            continue
        head = (row["group"], row["problem"], row["method"], _short(row["truth"], 6), row["truth_rank"])
        if "refused" in row:
            body.append((*head, "refused", "-", "-", "-", row["refused"].replace("|", "\\|")[:90]))
            continue
        claim = "both" if row["two_sided"] else "lower" if not math.isnan(row["lower"]) else "none"
        claim += "" if row["holds"] else " FALSE"
        off, wide = _short(row["relative_error"]), _short(row["width"])
        body.append((*head, claim, off, wide, row["products"], row["note"].replace("|", "\\|")[:90]))
    title = ["## False claims, and those that another method of the same problem decides", ""]
    words = ["", "Every run stands in `truth_suite.json`, which the command writes."]
    head_row = ("group", "problem", "method", "truth", "rank", "claim", "error", "width", "products", "note")
    return [*title, *_table(head_row, body), *words]


def _table(head: tuple[str, ...], body: Iterable[tuple[Any, ...]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(entry) for entry in row) + " |" for row in body]


def _short(x: float | None, digits: int = 2) -> str:
    if x is None or math.isnan(x):
        return "-"
    return f"{x:.{digits}g}"
