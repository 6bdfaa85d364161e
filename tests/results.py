"""RESULTS.md from what was measured: `make results`, or

    python tests/results.py --runs runs --figures figures

Copies what was left by trainings (runs/*/result.json, log.csv), by score.py (figures/*.json, with
the .csv beside it) and by tests/bench.py (bench.json, bench-accuracy.json) into results/, a folder
for each, named after it and its commit; then writes RESULTS.md from all that results/ holds. So
measurements of days and of several machines gather in the repository, and every number has its
file; results/older/ has those of earlier recipes, which prose cites and no table shows. What stands
between <!-- prose NAME --> and <!-- /prose --> in RESULTS.md is kept as it is.
"""

import argparse
import contextlib
import csv
import json
import re
import shlex
import statistics
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench

import files
import folders
import metrics
import tables
import train

NOT_MEASURED = "not measured"
REPORT, HEAD_REPORT = "72 % (report)", "96-97 % (report)"
LEADERBOARD = {5: "87.43 % (leaderboard)", 20: "91.57 % (leaderboard)"}  # 128 px, by epochs
# Rows of the table of accuracy: (name, to beat, what its recipe must say; all else as
# train.DEFAULTS has it).
PROTOCOLS = (
    ("CNN, 64 → 96 px, 100 epochs", REPORT, dict(arch="cnn", epochs=100, size=96)),
    ("CNN, 64 → 88 px, 20 epochs", REPORT, dict(arch="cnn", epochs=20, size=88)),
    ("CNN, 64 → 72 px, 2 epochs", REPORT, dict(arch="cnn", epochs=2, size=72)),
    ("CNN, 128 → 128 px, 5 epochs", LEADERBOARD[5],
     dict(arch="cnn", epochs=5, crop=128, size=128)),
    ("CNN, 96 → 128 px, 20 epochs", LEADERBOARD[20],
     dict(arch="cnn", epochs=20, crop=96, size=128)),
    ("CNN, 128 → 128 px, 20 epochs", LEADERBOARD[20],
     dict(arch="cnn", epochs=20, crop=128, size=128)),
    ("CNN, plain 64 px crops → 160 px, 40 epochs", REPORT,
     dict(arch="cnn", plain_crop=True, epochs=40, size=160)),
    ("MobileNetV2, last layer", HEAD_REPORT,
     dict(arch="mobilenet_v2", training="head", looks=[320])),
)
CONTROLS = ("average drop", "increase in confidence", "deletion", "insertion", "pointing game",
            "MaxBoxAccV2, cross-fitted")

TEMPLATE = """\
# Results

Tables with sources are written by `make results` from the files in `results/`; what has none is \
typed by hand.

<!-- prose introduction -->
<!-- /prose -->

## Accuracy

{accuracy}

<!-- prose accuracy -->
<!-- /prose -->

## Speed

{speed}

### Time to accuracy

{time_to_accuracy}

<!-- prose speed -->
<!-- /prose -->

## Does it look at the object?

{scores}

<!-- prose scores -->
<!-- /prose -->

<!-- prose own photos -->
<!-- /prose -->

<!-- prose survives -->
<!-- /prose -->

<!-- prose glossary -->
<!-- /prose -->
"""


# ---------------------------------------------------------------- gathering


def without_folders(text):
    """A word or a whole command without folders of this machine: of paths that are absolute or
    start with .., the name alone is kept."""
    def shorten(word):
        option, equals, path = word.rpartition("=")
        away = Path(path).is_absolute() or path.startswith("..")
        return option + equals + (Path(path).name if away else path)

    return shlex.join(shorten(word) for word in shlex.split(text))


def read_json(path):
    """The dictionary in a file; a ValueError that names the file where there is none."""
    try:
        contents = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, or measure again") from error
    return contents if isinstance(contents, dict) else {}


@contextlib.contextmanager
def measurement(path):
    """A block that uses what `path` holds: where that is no measurement, a ValueError names it."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path} has no {error}: measure again") from error
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} holds something else than a measurement ({error}): remove it, or "
                         "measure again") from error


def same_measurement(a, b):
    """Whether two files are of one command on one machine and commit: the later one then replaces
    the earlier."""
    return all(a.get(key) == b.get(key) for key in ("command", "machine", "precision", "recipe"))


def gather_one(facts, main, beside, name, results):
    """Copy a measurement into a folder of its own in `results`, named after `name` and its commit,
    and numbered where another measurement has that name. facts: what main, a .json file, holds;
    beside: a .csv file, or None."""
    with measurement(main):
        facts = facts | dict(command=without_folders(facts["command"]), name=name)
        if facts.get("recipe", {}).get("weights"):
            weights = without_folders(facts["recipe"]["weights"])
            facts["recipe"] = facts["recipe"] | dict(weights=weights)
        _, show = kind_of(main)
        show([facts | dict(file=str(main), csv=beside)])  # what cannot be shown is not copied
        base, number = f"{name}-{facts['machine']['commit'] or 'no-commit'}", 1
    folder = results / base
    while ((folder / main.name).exists()
           and not same_measurement(read_json(folder / main.name), facts)):
        number += 1
        folder = results / f"{base}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / main.name, (json.dumps(facts, indent=1) + "\n").encode())
    if beside:
        files.write(folder / beside.name, beside.read_text().encode())  # its line ends become plain


def gather(runs, figures, results):
    """Copy all finished measurements on ImageNette from the folders `runs` and `figures` into the
    folder `results`. Returns sentences on what was left out."""
    left_out, counts = [], folders.COUNTS
    for path in sorted(runs.glob("*/result.json")):
        facts = read_json(path)
        if path.parent.name.endswith("-dry-run"):
            continue
        if not {"recipe", "machine"} <= facts.keys():
            left_out.append(f"{path} was left out: it does not say its recipe and machine, being "
                            "older than this")
            continue
        with measurement(path):
            photos = sum(facts["recipe"].get("photos", ()))
        if photos not in (sum(counts.values()), counts["train"]):  # the latter with --holdout
            left_out.append(f"{path} was left out: it is not of ImageNette's {counts['train']:,} "
                            "photos")
        else:
            gather_one(facts, path, path.with_name("log.csv"), path.parent.name, results)
    for path in sorted(figures.glob("*.json")):
        facts = read_json(path)
        if path.name in ("bench.json", "bench-accuracy.json"):
            gather_one(facts, path, None, path.stem, results)
        elif facts.get("networks"):
            with measurement(path):
                photos = {network["accuracy_n"] for network in facts["networks"].values()}
            if photos != {counts["val"]}:
                left_out.append(f"{path} was left out: it is not of ImageNette's "
                                f"{counts['val']:,} val photos")
            else:
                gather_one(facts, path, path.with_suffix(".csv"), path.stem, results)
    return left_out


# ---------------------------------------------------------------- text


def table(rows):
    """Rows, lists of as many strings, the first the header, as a table in Markdown, no wider than
    it must be."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def sources(texts):
    """A numbered list, whose numbers the rows above it name; an empty string where there is
    none."""
    lines = [textwrap.fill(f"{number}. {text}", 120, subsequent_indent="   ",
                           break_long_words=False, break_on_hyphens=False)
             for number, text in enumerate(texts, 1)]
    return "\n".join(["Sources:", "", *lines]) if lines else ""


def duration(seconds):
    """Seconds in words: "192 s", "54 min", "3 h 5 min"."""
    minutes = round(seconds / 60)
    if seconds < 300:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def per_cent(shares):
    """The mean of shares in per cent, and, where there are several, the standard deviation of the
    sample."""
    mean = 100 * statistics.mean(shares)
    if len(shares) == 1:
        return f"{mean:.2f} %"
    return f"{mean:.2f} ± {100 * statistics.stdev(shares):.2f} %"


def describe_machine(facts):
    """Commit, machine and versions of a measurement in one line."""
    machine = facts["machine"]
    where = [machine["processor"], machine["instructions"], f"{machine['cores']} cores"]
    if machine["memory"]:
        where.append(f"{machine['memory']} GiB")
    if facts.get("device", "cpu") != "cpu":
        where.append(machine.get("gpu") or facts["device"])
    where.append(facts["precision"])
    if "threads" in facts:
        plural = "s" if facts["threads"] > 1 else ""
        where.append(f"{facts['processes']} x {facts['threads']} threads"
                     if facts["processes"] > 1 else f"{facts['threads']} thread{plural}")
    return (f"commit {machine['commit'] or 'unknown'}; {', '.join(where)}; Python "
            f"{machine['python']}, torch {machine['torch']}, torchvision {machine['torchvision']}")


def source(facts):
    """Command, commit, machine, versions and file of a measurement that is no training."""
    return f"`{facts['command']}`; {describe_machine(facts)}; `{facts['file']}`"


# ---------------------------------------------------------------- accuracy


def protocol(facts):
    """The place in PROTOCOLS that a training belongs to, or its length where it is none. facts: of
    its result.json."""
    recipe = facts["recipe"]
    for place, (_, _, says) in enumerate(PROTOCOLS):
        usual = dict(train.DEFAULTS[says.get("training", "scratch")], plain_crop=False, holdout=0.0,
                     photos=list(folders.COUNTS.values()))
        if all(recipe.get(key) == value for key, value in (usual | says).items()):
            return place
    return len(PROTOCOLS)


def group_trainings(trainings):
    """[(place in PROTOCOLS, or its length, trainings that differ in their seed alone)], by place,
    the newest recipe first. A seed that is there twice, of several commits, is a group of each."""
    kinds = {}
    for facts in trainings:
        recipe = {key: value for key, value in facts["recipe"].items() if key != "seed"}
        kind = json.dumps([recipe, facts["precision"], facts["machine"]["processor"]],
                          sort_keys=True)
        kinds.setdefault(kind, []).append(facts)
    groups = []
    for of_kind in kinds.values():
        seeds = {facts["recipe"]["seed"] for facts in of_kind}
        commits = {}
        for facts in sorted(of_kind, key=lambda facts: facts["recipe"]["seed"]):
            commit = facts["machine"]["commit"] if len(seeds) < len(of_kind) else "any"
            commits.setdefault(commit, []).append(facts)
        groups += [(protocol(group[0]), group) for group in commits.values()]
    return sorted(groups, key=lambda entry: (entry[0], -entry[1][0]["recipe"]["version"]))


def training_source(group):
    """What a row of the table of accuracy comes from. group: the trainings of several seeds."""
    first = group[0]
    best = f"best {per_cent([facts['best_accuracy'] for facts in group])}"
    best += f" after epoch {first['best_epoch']}" if len(group) == 1 else ""
    seeds = ", ".join(str(facts["recipe"]["seed"]) for facts in group)
    machines = list(dict.fromkeys(describe_machine(facts) for facts in group))
    places = ", ".join(f"`{facts['file']}`" for facts in group)
    return (f"`{first['command']}`; seed{'s' * (len(group) > 1)} {seeds}; "
            f"{first['recipe']['epochs']} epochs; {first['accuracy_n']:,} photos of "
            f"{first['accuracy_on']}; {best}; {'; '.join(machines)}; {places}")


def training_row(group, number, name, to_beat):
    """A row of the table of accuracy. group: the trainings of several seeds; number: of its source;
    name: of its protocol, or None."""
    recipe = group[0]["recipe"]
    seeds = f", {len(group)} seeds" if len(group) > 1 else ""
    earlier = recipe["training"] == "scratch" and recipe["version"] < train.Recipe.version
    version = f", v{recipe['version']}" if earlier else ""
    label = (name or f"`{group[0]['name']}`") + seeds + version
    time = duration(statistics.mean(facts["seconds"] for facts in group))
    time += " on features" * (recipe["training"] == "head")  # the pass that stores them is not in
    last = per_cent([facts["last_accuracy"] for facts in group])
    return [label, to_beat, last, time, str(number)]


def accuracy(trainings):
    """The table of accuracy and its sources. trainings: the contents of all result.json."""
    groups = dict(enumerate(group_trainings(trainings), 1))  # {number of source: (place, group)}
    rows = [["protocol", "to beat", "last epoch", "time", "source"]]
    for place, (name, to_beat, _) in enumerate([*PROTOCOLS, (None, "", None)]):  # or none of these
        found = [training_row(group, number, name, to_beat)
                 for number, (at, group) in groups.items() if at == place]
        if name and not found:
            found = [[name, to_beat, NOT_MEASURED, "", ""]]
        rows += found
    texts = [training_source(group) for _, group in groups.values()]
    return "\n\n".join(filter(None, [table(rows), sources(texts)]))


# ---------------------------------------------------------------- speed


def speed(benches):
    """A table for each bench.json."""
    header = list(bench.HEADER)
    if not benches:
        return table([header,
                      [f"an epoch of the CNN, {bench.CROP} px", NOT_MEASURED, NOT_MEASURED, ""],
                      ["maps of val", NOT_MEASURED, NOT_MEASURED, ""]])
    parts = []
    for facts in benches:
        rows = [list(bench.cells(**row)) for row in facts["rows"]]
        parts += [table([header, *rows]), sources([source(facts)])]
    return "\n\n".join(parts)


def time_to_accuracy(benches):
    """A table for each bench-accuracy.json."""
    if not benches:
        return table([["until 85 % of val", "time"], ["this project", NOT_MEASURED],
                      ["the usual way", NOT_MEASURED]])
    parts = []
    for facts in benches:
        ours = facts["rows"][0]["seconds"]
        rows = [[f"until {100 * facts['accuracy']:g} % of val", "time", "epochs",
                 "times this project's"]]
        for row in facts["rows"]:
            if row["seconds"] is None:
                reached = f"{row['best']:.1%} after {duration(row['all_seconds'])}"
                times = f"more than {row['all_seconds'] / ours:.1f}" if ours else ""
                rows.append([row["way"], reached, f"{row['of_epochs']}", times])
            else:
                times = f"{row['seconds'] / ours:.1f}" if ours else ""
                rows.append([row["way"], duration(row["seconds"]),
                             f"{row['epochs']} of {row['of_epochs']}", times])
        settings = [f"{row['way']}: {row['settings']}" for row in facts["rows"]]
        parts += [table(rows), sources([source(facts), *settings])]
    return "\n\n".join(parts)


# ---------------------------------------------------------------- scores


def read_scores(path):
    """{(score, network, map): Estimate} from a .csv of score.py."""
    results = {}
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            low, high = (float(line[end]) if line[end] else None for end in ("low", "high"))
            results[line["score"], line["network"], line["map"]] = metrics.Estimate(
                float(line["value"]), low, high, int(line["n"]))
    return results


def controls(results, networks):
    """The table of scores against maps that saw nothing: of networks with random weights, and the
    centred square."""
    kinds = (tables.OWN, tables.RANDOM, tables.SQUARE)
    rows = [["%, [95 % interval]", "network", *kinds]]
    for name in CONTROLS:
        shown = name.replace("increase in confidence", "confidence grows")  # the table's width
        rows += [[shown, network, *(str(results.get((name, network, kind), "")) for kind in kinds)]
                 for network in networks if (name, network, tables.OWN) in results]
    return table(rows) if len(rows) > 1 else ""


def scores(all_scores):
    """Tables for each run of score.py, those of its summary."""
    if not all_scores:
        return table([["%, [95 % interval]", "n", "network", tables.SQUARE],
                      *([name, "", NOT_MEASURED, NOT_MEASURED] for name in tables.SUMMARY)])
    parts = []
    for facts in all_scores:
        results, networks = read_scores(facts["csv"]), list(facts["networks"])
        looks = [f"{name} at {', '.join(map(str, network['looks']))} px"
                 for name, network in facts["networks"].items()]
        parts.append(f"### {'; '.join(looks)}")
        for i in range(0, len(networks), tables.BESIDE):
            beside = networks[i : i + tables.BESIDE]
            parts.append(table(tables.summary_rows(results, beside, networks[0])))
        parts.append(controls(results, networks))
        texts = [f"{source(facts)}; all scores are in the .csv beside it"]
        for name, network in facts["networks"].items():
            texts.append(f"{name}: {network['path']}, {network['description']}, seed "
                         f"{network['seed']}, epoch {network['best_epoch']} of "
                         f"{network['epochs']}; scored in {duration(facts['seconds'][name])}")
        parts.append(sources(texts))
    # A table is 100 characters wide.
    return "\n\n".join(part.replace("MaxBoxAccV2, cross-fitted", "MaxBoxAccV2")
                       for part in parts if part)


# ---------------------------------------------------------------- RESULTS.md

BLOCK = re.compile(r"<!-- prose (?P<name>[^>]+?) -->\n(?P<text>.*?)<!-- /prose -->", re.DOTALL)


def kind_of(path):
    """What a .json file of results/ is, and the function that shows a list of its kind."""
    kinds = {"result.json": ("trainings", accuracy), "bench.json": ("benches", speed),
             "bench-accuracy.json": ("accuracies", time_to_accuracy)}
    return kinds.get(path.name, ("scores", scores))


def read_results(folder):
    """All that the folder `results` holds, {"trainings", "benches", "accuracies", "scores": list of
    dictionaries}."""
    found = dict(trainings=[], benches=[], accuracies=[], scores=[])
    for path in sorted(folder.glob("*/*.json")):
        kind, show = kind_of(path)
        facts = read_json(path) | dict(file=f"{folder.name}/{path.parent.name}/{path.name}",
                                       csv=path.with_suffix(".csv"))
        with measurement(path):
            show([facts])
        found[kind].append(facts)
    return found


def write_document(path, found):
    """Write RESULTS.md, whose prose is kept: a block that TEMPLATE does not name goes to the end.
    found: of `read_results`."""
    before = path.read_text() if path.exists() else ""
    blocks = {match["name"]: match[0] for match in BLOCK.finditer(before)}
    if len(blocks) != before.count("<!-- prose "):
        raise ValueError(f"{path}: a block of prose has no end (<!-- /prose -->), or a name that "
                         "is there twice: mend it, and nothing will be lost")
    document = TEMPLATE.format(
        accuracy=accuracy(found["trainings"]), speed=speed(found["benches"]),
        time_to_accuracy=time_to_accuracy(found["accuracies"]), scores=scores(found["scores"]))
    document = BLOCK.sub(lambda match: blocks.pop(match["name"], match[0]), document)
    document += "".join(f"\n{block}\n" for block in blocks.values())
    files.write(path, document.encode())


def gather_and_write(options):
    """Gather what was measured, and write RESULTS.md."""
    for sentence in gather(options.runs, options.figures, options.results):
        print(sentence)
    found = read_results(options.results)
    write_document(options.out, found)
    count = sum(map(len, found.values()))
    print(f"written: {options.out}, from {count} measurements in {options.results}/")


def main(arguments=None):
    """The command line: gather, and write."""
    parser = argparse.ArgumentParser(
        description="Gather measurements in results/ and write RESULTS.md from them.",
        formatter_class=files.Help)
    add = parser.add_argument
    add("--runs", type=files.path, default="runs", help="folder of trainings")
    add("--figures", type=files.path, default="figures",
        help="folder of what score.py and tests/bench.py wrote")
    add("--results", type=files.path, default="results",
        help="folder that measurements are gathered in")
    add("--out", type=files.path, default="RESULTS.md", help="what is written")
    files.run_command(gather_and_write, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
