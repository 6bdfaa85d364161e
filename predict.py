"""What a network says of photos, as a table, and its maps as numbers: `python cam.py predict`.

    python cam.py predict photos/*.jpg --model resnet18 --out predictions.csv --maps maps.npz

predictions.csv has a row a photo: its file, then the likeliest classes, each with its probability
and its logit. maps.npz is for NumPy alone: `maps` (N, K, h, w) in logits, `bias` and `classes`
(K,), `logits` (N, K), `file` (N,), `sizes` (N, 2) of the photos, height and width in px.

    found = np.load("maps.npz")
    found["maps"].mean((2, 3)) + found["bias"]                  # found["logits"]
"""

import contextlib
import csv
import io
import zipfile

import numpy as np
import torch

import asked
import data
import files
import networks
import page


def predict(options):
    """A table of what a network says of photos and, if asked for, a file of its maps."""
    page.check_picture_name(options.out, (".csv",))
    if options.maps:
        page.check_picture_name(options.maps, (".npz",), "--maps")
    paths = asked.photo_files(options.photos)
    models = [options.model] if options.model else asked.default_checkpoints(asked.CHECKPOINTS[-1:])
    ((network, facts),) = asked.load_networks(options, models)
    with contextlib.ExitStack() as stack:  # both files, or none
        written = [path for path in (options.out, options.maps) if path]
        for path in written:
            path.parent.mkdir(parents=True, exist_ok=True)
        table, *archive = [stack.enter_context(files.atomic(path)) for path in written]
        found = ask(network, facts, paths)
        logits = write_maps(archive[0], network, facts, paths, found) if archive else torch.cat(
            [logits for _, _, logits in found])
        table.write(rows_of(paths, logits, facts["classes"], options.top))
        table.flush()  # both files or none, on a full disk too
    for path in written:
        print(path)


def ask(network, facts, paths):
    """Yields of each photo its size (H, W), its maps (1, K, h, w) and its logits (1, K)."""
    for path in files.progress(paths, "predicting:", len(paths)):
        photo = torch.from_numpy(data.decode(path))
        maps, logits, _ = networks.predict_with_maps(network, facts, [photo])
        yield photo.shape[:2], maps, logits


def rows_of(paths, logits, classes, top):
    """The table, CSV in bytes: a row a photo."""
    best = logits.topk(min(top, len(classes))).indices
    probabilities = logits.softmax(1)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", *(f"{what}_{i + 1}" for i in range(best.shape[1])
                               for what in ("class", "probability", "logit"))])
    for i, path in enumerate(paths):
        writer.writerow([path, *(value for k in best[i].tolist() for value in (
            classes[k], f"{probabilities[i, k]:.6g}", f"{logits[i, k]:.6g}"))])
    return text.getvalue().encode("utf-8", "surrogateescape")


def write_maps(file, network, facts, paths, found):
    """Write maps.npz into an open file, photo after photo; returns the logits (N, K)."""
    sizes, all_logits = [], []
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("maps.npy", "w", force_zip64=True) as entry:
            for size, maps, logits in found:
                if not sizes:
                    np.lib.format.write_array_header_1_0(entry, {
                        "descr": "<f4", "fortran_order": False,
                        "shape": (len(paths), *maps.shape[1:])})
                entry.write(maps.numpy().astype("<f4").tobytes())
                sizes.append(size)
                all_logits.append(logits)
        logits, bias = torch.cat(all_logits), network.head.bias
        bias = torch.zeros(logits.shape[1]) if bias is None else bias.detach().cpu()
        others = {"bias": bias.numpy(), "classes": np.array(facts["classes"]),
                  "logits": logits.numpy(), "file": np.array(list(map(str, paths))),
                  "sizes": np.array(sizes)}
        for name, values in others.items():
            with archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, values, allow_pickle=False)
    return logits
