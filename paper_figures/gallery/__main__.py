"""Write docs/reported.md from the committed data: `python -m paper_figures.gallery [--check]`.

`--check` writes nothing and exits with 1 if the committed page differs from the page that the data give.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from bnp_analysis.cli import answered
from bnp_analysis.runtime.files import write_text
from paper_figures.figures import fig14_reported as figure
from paper_figures.frame import HERE, ROOT, FigureData, stored
from paper_figures.gallery import entries

NAME, PAGE = "fig14_reported", ROOT / "docs" / "reported.md"
_HEAD = "| case | printed | the source's routine | certified | exact | outside by |\n|---|---|---|---|---|---|"


def page(data: FigureData) -> str:
    """The page: the figure, and for each source its texts and its numbers."""
    about = data.about
    lines = [
        *("# Reported and certified numbers", ""),
        f"Written by `python -m paper_figures.gallery` from the data of `{about['command']}` (torch "
        f"{about['versions']['torch']}, revision {about['revision']}, {about['seconds']:.0f} s); `--preset quick` "
        "uses smaller settings and takes seconds. Each source is one file in `paper_figures/gallery`.",
        *("", figure.CLAIM, ""),
        *(f"![Published numbers beside certified intervals](../paper_figures/full/{NAME}.png)", ""),
        "*Printed* is the number in the source, *the source's routine* the result of the source's method here, in the "
        "source's precision, *certified* the interval of this package, *exact* an independent check, and *outside by* "
        "the distance of the routine's result from the interval, relative or as a factor.",
        "",
    ]
    failure = figure.failure(data)
    if failure:
        lines += [f"**The claim fails on these data:** {failure}.", ""]
    for name, entry in entries().items():
        rows = [k for k, word in enumerate(data.words("entry")) if word == name]
        lines += [f"## {entry.title}", "", f"**Source.** {entry.source}", "", f"**Setting.** {entry.setting}", ""]
        lines += [f"**Method of the source:** {entry.naive}", "", f"**Certified by:** {entry.certified}", ""]
        lines += [f"**Check:** {entry.check}", "", _HEAD]
        lines += [_line(data.words("case")[k], data["numbers"][k].tolist()) for k in rows]
        lines += ["", f"**Differences and their causes.** {entry.why}", ""]
    return "\n".join(lines).rstrip() + "\n"


def _line(case: str, numbers: Sequence[float]) -> str:
    printed, reported, lower, upper, exact = numbers
    # Two digits more than the interval determines; three for a number far outside of it.
    digits = 4 if lower == upper else min(max(2 - math.floor(math.log10(upper / lower - 1)), 4), 14)

    def shown(x: float) -> str:
        near = figure.distance(x, lower, upper) < figure.WIDE
        return "" if math.isnan(x) else f"{x:.{digits if near else 3}g}"

    apart = figure.distance(reported, lower, upper)
    factor = max(reported / upper, lower / reported)
    outside = "" if apart == 0 else f"a factor of {factor:.3g}" if factor > 2 else f"{apart:.1g}"
    ends = dict.fromkeys([shown(lower), shown(upper)])
    return f"| {case} | {shown(printed)} | {shown(reported)} | {' .. '.join(ends)} | {shown(exact)} | {outside} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page; 2 where there are no committed data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the committed page differs")
    arguments = parser.parse_args(argv)
    data = stored(NAME, HERE / "full")
    if data is None:
        print(f"no data: run bnp-analysis figures {NAME} --preset full", file=sys.stderr)
        return 2
    if arguments.check:
        return int(not PAGE.exists() or PAGE.read_text() != page(data))
    write_text(PAGE, page(data))
    return 0


if __name__ == "__main__":
    sys.exit(answered(main))
