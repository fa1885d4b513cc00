"""Make the figures: `python -m paper_figures [NAME ...] [--preset quick|full]`, or `bnp-analysis figures`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from tqdm import tqdm

from bnp_analysis.cli import answered
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.runtime.files import require_outputs, whole_file, write_text
from paper_figures import frame, style

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Make figures; 0 done, 1 a claim (other than on times) fails, 2 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="bnp-analysis figures", description="Make the figures of the theory.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"figures; default all: {', '.join(frame.names())}")
    parser.add_argument("--preset", choices=frame.PRESETS, default="quick", help="size of the computation")
    parser.add_argument("--force", action="store_true", help="recompute stored data")
    parser.add_argument("--caption", action="store_true", help="draw the note of index.md below each figure")
    parser.add_argument(
        "--out", type=Path, help="output folder; default: paper_figures/PRESET in the checkout or the current folder"
    )
    arguments = parser.parse_args(argv)
    return answered(lambda: make_all(arguments), "bnp-analysis figures")


def make_all(arguments: argparse.Namespace) -> int:
    """Make the figures that are asked for, and the page of all; the files are tried first.

    Raises:
        InvalidInputError: no such figure, or a file that could not be written.
        OutputError: the disk is full; the figures that are done stay.
    """
    unknown = sorted(set(arguments.names) - set(frame.names()))
    if unknown:
        raise InvalidInputError(f"no figure {', '.join(unknown)}; there are: {', '.join(frame.names())}")
    matplotlib.use("Agg")
    torch.set_num_threads(1)  # the problems are small, and sums add up in the same order everywhere
    folder = arguments.out or home() / arguments.preset
    wanted = [name for name in frame.names() if not arguments.names or name in arguments.names]
    files = ["index.md", *(f"{name}.{form}" for name in wanted for form in ("npz", "json", "png", "pdf"))]
    require_outputs({"--out": [folder / file for file in files]})
    failed = {False: 0, True: 0}  # by whether the claim is about times
    try:
        for place, name in enumerate(wanted, start=1):
            where = f"{place}/{len(wanted)}"
            holds = make_one(name, arguments.preset, folder, where, caption=arguments.caption, force=arguments.force)
            failed[is_timed(name)] += not holds
    except KeyboardInterrupt:
        print("\ninterrupted; the figures that are done stay, and the same command goes on", file=sys.stderr)
        return INTERRUPTED
    finally:
        write_index(folder, arguments.preset)
    print(f"{folder / 'index.md'}: {len(wanted)} figures, {failed[False]} with a claim that fails")
    if failed[True]:
        print(f"{failed[True]} with times, on this machine, that are not as the figure claims")
    return 1 if failed[False] else 0


def home() -> Path:
    """Where figures lie: in the checkout; an installed package writes into the current folder."""
    return frame.HERE if (frame.ROOT / "pyproject.toml").exists() else Path("paper_figures")


def is_timed(name: str) -> bool:
    """Whether a figure's claim is about times, which a busy or unusual machine may refute."""
    return bool(getattr(frame.module(name), "TIMED", False))


def make_one(name: str, preset: str, folder: Path, place: str, *, caption: bool = False, force: bool = False) -> bool:
    """Compute where needed, draw, write PNG and PDF, and say whether the claim holds."""
    began = time.perf_counter()
    form = "{desc} {percentage:3.0f}% {elapsed}"
    with tqdm(total=100, desc=f"{place} {name}", leave=False, bar_format=form, disable=None) as bar:

        def report(fraction: float) -> None:
            bar.update(max(0.0, 100 * fraction - bar.n))

        data, computed = frame.make(name, preset, folder, report, force=force)
    failure = draw(name, data, folder, caption=caption)
    how = "computed" if computed else "data kept"
    print(
        f"{place} {name}: {how}, {time.perf_counter() - began:.1f} s" + (f"; CLAIM FAILS: {failure}" if failure else "")
    )
    return not failure


def draw(name: str, data: frame.FigureData, folder: Path, *, caption: bool = False) -> str:
    """Draw from the data alone, with the note below where `caption` says so, write the files, return what fails."""
    module = frame.module(name)
    failure = module.failure(data)
    figure = style.finish(module.draw(data), note(name, data) if caption else "", failure)
    for form, metadata in (("png", None), ("pdf", {"CreationDate": None, "ModDate": None})):
        with whole_file(folder / f"{name}.{form}") as file:
            figure.savefig(file, format=form, metadata=metadata)
    plt.close(figure)
    return str(failure)


def note(name: str, data: frame.FigureData) -> str:
    """What a reader must know: data, model, seeds, preset, versions."""
    about = data.about
    return (
        f"{frame.module(name).note(data)} Preset {about['preset']}, torch {about['versions']['torch']}, revision "
        f"{about['revision']}."
    )


def write_index(folder: Path, preset: str) -> None:
    """A page with all figures of a folder: thumbnail, claim, verdict, provenance, command."""
    lines = [f"# Figures, preset `{preset}`", ""]
    for name in frame.names():
        data = frame.stored(name, folder)
        if data is None:
            continue
        if data.about["key"] != frame.key(name, preset):
            lines += [f"## {frame.module(name).TITLE}", "", "The data are of another version of this figure.", ""]
            continue
        module, about = frame.module(name), data.about
        failure = module.failure(data)
        verdict = f"**The claim fails here:** {failure}" if failure else "The claim holds on these data."
        lines += [
            *(f"## {module.TITLE}", "", f'<img src="{name}.png" width="700" alt="{module.TITLE}">', ""),
            *(f"{module.CLAIM} ({module.SHOWS}) {verdict}", "", note(name, data), ""),
            f"`{about['command']}`, {about['seconds']} s; [data]({name}.npz), [provenance]({name}.json), "
            f"[PDF]({name}.pdf)",
            "",
        ]
    write_text(folder / "index.md", "\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    sys.exit(main())
