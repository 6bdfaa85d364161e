"""What `make demo` ends with: what the table of scores says, in three lines.

    python tests/reading.py figures/demo-scores.csv figures/demo.png
"""

import csv
import sys
from pathlib import Path

OWN, SQUARE = "its own map", "centred square"


def per_cent(line):
    """The score of a line of the table ({column: text}) as "93 %"."""
    return f"{100 * float(line['value']):.0f} %"


def verdict(difference):
    """What a difference to the middle of the photo, a line of the table, is worth."""
    if difference["low"] and float(difference["low"]) > 0:
        return "clearly more"
    if difference["high"] and float(difference["high"]) < 0:
        return "clearly less"
    return "no clear difference"


def reading(table):
    """Three sentences on accuracy, pointing and boxes.

    table: {(score, network, map): line} of a .csv of score.py, of photos that have boxes.
    """
    networks = [network for score, network, kind in table
                if (score, kind) == ("accuracy", OWN) and " minus " not in network]

    def to_middle(score):
        shown = [f"{network} {per_cent(table[score, network, OWN])} "
                 f"({verdict(table[score, network, f'{OWN} minus {SQUARE}'])})"
                 for network in networks]
        middle = per_cent(table[score, networks[0], SQUARE])
        return f"{', '.join(shown)}; middle of the photo {middle}"

    accuracies = [f"{network} {per_cent(table['accuracy', network, OWN])}" for network in networks]
    photos = table["accuracy", networks[0], OWN]["n"]
    return [f"right about the class of {photos} photos: {', '.join(accuracies)}",
            f"highest point of the map on the object: {to_middle('pointing game')}",
            f"box around the map fits the object: {to_middle('MaxBoxAccV2, cross-fitted')}"]


def main(scores, picture):
    with open(scores, newline="", encoding="utf-8") as file:
        table = {(line["score"], line["network"], line["map"]): line
                 for line in csv.DictReader(file)}
    print(f"\n{picture} shows where both networks looked. Of all scores, in "
          f"{Path(scores).with_suffix('.md')}:")
    for sentence in reading(table):
        print(f"  {sentence}")
    print("Next: make figure, the same with ImageNette; README.md tells the rest.")


if __name__ == "__main__":
    main(*sys.argv[1:])
