"""The scores of several networks as tables: in a terminal, as Markdown, LaTeX and CSV.

    results = tables.compare({"cnn": {"its own map": {"accuracy": estimate}}})
    print(tables.summary(results, ["cnn"]))
    tables.write("figures/scores", tables.texts(results, notes, run), pictures)

Results are {(score, network, map): metrics.Estimate}.
"""

import csv
import io
import json
import os
import re
import tempfile
from pathlib import Path

import files
import page
from metrics import difference

OWN, RANDOM, SQUARE = "its own map", "random weights", "centred square"  # maps; two are controls
TO_SQUARE = f"{OWN} minus {SQUARE}"
SUMMARY = ("accuracy", "accuracy, mean of the classes", "pointing game", "pointing game, all",
           "MaxBoxAccV2, cross-fitted", "MaxBoxAccV2, cross-fitted, all", "share in the box",
           "area above half")  # its rows
BESIDE = 2  # networks beside each other in the summary: more would be wider than 100 columns


def compare(scores):
    """{network: {map: {score: Estimate}}} as results, with the differences that photos share.

    Own maps minus the centred square; each network ("B minus A") minus the first.
    """
    results, first = {}, next(iter(scores))
    for score in scores[first][OWN]:
        for network, kinds in scores.items():
            results |= {(score, network, kind): of_kind[score]
                        for kind, of_kind in kinds.items() if score in of_kind}
            own = kinds[OWN][score]
            if own.per_photo is None:
                continue
            if score in kinds.get(SQUARE, {}):
                results[score, network, TO_SQUARE] = difference(own, kinds[SQUARE][score])
            if network != first:
                to_first = difference(own, scores[first][OWN][score])
                results[score, f"{network} minus {first}", OWN] = to_first
    return results


# ---------------------------------------------------------------- rows of a summary


def summary(results, networks, form="text"):
    """Tables of all `networks`, BESIDE in each, as one string; form: of `write_table`."""
    blocks = [networks[i : i + BESIDE] for i in range(0, len(networks), BESIDE)]
    return "\n".join(write_table(summary_rows(results, block, networks[0]), form)
                     for block in blocks)


def summary_rows(results, networks, first):
    """The rows of one table, differences under each score; first: the network they are to."""
    square = [first] if any((score, first, SQUARE) in results for score in SUMMARY) else []

    def cells(score, kind, names):
        return [str(results.get((score, name, kind), "")) for name in names]

    rows = [["%, [95 % interval]", "n", *networks, *(SQUARE for _ in square)]]
    for score in SUMMARY:
        if (score, first, OWN) not in results:
            continue
        arrow = "" if score == "area above half" else " ↑"  # neither small nor large is better
        n = f"{results[score, first, OWN].n:,}"
        rows.append([score + arrow, n, *cells(score, OWN, networks), *cells(score, SQUARE, square)])
        minus = {SQUARE: cells(score, TO_SQUARE, networks),
                 first: cells(score, OWN, [f"{network} minus {first}" for network in networks])}
        rows += [[f"  minus {other}", "", *row, *("" for _ in square)]
                 for other, row in minus.items() if any(row)]
    return rows


# ---------------------------------------------------------------- rows as text


def write_table(rows, form):
    """Rows of as many strings each, the header first, as one string; numbers to the right.

    form: "text", for a terminal, "markdown", or "latex" (with the package booktabs).
    """
    if form == "latex":
        header, *body = (" & ".join(map(escape_latex, row)) + r" \\" for row in rows)
        begin = r"\begin{tabular}{l" + "r" * (len(rows[0]) - 1) + "}"
        return "\n".join([begin, r"\toprule", header, r"\midrule", *body,
                          r"\bottomrule", r"\end{tabular}", ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)]
             for row in rows]
    if form == "text":
        return "".join("  ".join(line) + "\n" for line in lines)
    lines.insert(1, ["-" * (width - 1) + (":" if i else "-") for i, width in enumerate(widths)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def escape_latex(text):
    """Any text as LaTeX shows it; arrows, leading spaces, the minus of numbers as mathematics."""
    special = {c: "\\" + c for c in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
                "↑": r"$\uparrow$"}
    shown = text.lstrip()
    indent = r"\quad " if shown != text else ""
    return indent + re.sub(r"(?<![^\s\[])-(?=\d)", "$-$", shown.translate(str.maketrans(special)))


def csv_table(results):
    """All results as CSV, shares from 0 to 1; where there is no interval its ends are empty."""
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(("score", "network", "map", "n", "value", "low", "high"))
    lines.writerows((*key, estimate.n, *estimate[:3]) for key, estimate in results.items())
    return file.getvalue()


# ---------------------------------------------------------------- files


def check_out(out):
    """`out` without our suffix, ~ expanded. Raises ValueError where no tables can be written."""
    base = re.sub(r"\.(md|csv|tex|json)$", "", os.path.expanduser(out))
    if base.endswith(("/", os.sep)) or Path(base).is_dir():
        raise ValueError(f"--out {out} is a folder: name the tables in it, for example "
                         f"{Path(out) / 'scores'}")
    files.check_place(base)
    for suffix in (".md", ".csv", ".tex", ".json", ".png"):
        if Path(base + suffix).is_dir():
            raise ValueError(f"{base}{suffix} is a folder: name other tables with --out")
    return base


def texts(results, notes, run):
    """{suffix: text}: .md (summary, notes, results), .csv (results), .tex (summary) and .json
    (`run`, a dictionary: how they came about)."""
    networks = list(run["networks"])
    rows = [["score", "network", "map", "n", "%, [95 % interval]"]]
    rows += [[*key, f"{estimate.n:,}", str(estimate)] for key, estimate in results.items()]
    markdown = [summary(results, networks, "markdown"), *(f"- {note}" for note in notes), "",
                write_table(rows, "markdown")]
    return {".md": "\n".join(markdown), ".csv": csv_table(results),
            ".tex": summary(results, networks, "latex"),
            ".json": json.dumps(run, indent=1) + "\n"}


def write(out, texts, pictures):
    """Write `out` + suffix of {suffix: text} and of {suffix: PIL image}.

    All are made in a folder beside, then moved: a full disk leaves what was there. Raises OSError.
    """
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".part", f"{path.name}.", path.parent) as folder:
        made = f"{Path(folder, path.name)}"
        try:
            for suffix, text in texts.items():
                contents = text.encode(errors="backslashreplace")  # a path need not be text
                files.write(Path(made + suffix), contents)
            for suffix, picture in pictures.items():
                page.save_picture(picture, made + suffix)
        except OSError as error:
            text = f"{error.strerror}, all tables are as they were"
            raise OSError(error.errno, text, out) from error
        for file in Path(folder).iterdir():
            files.replace(file, path.parent / file.name)
