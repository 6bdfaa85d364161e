"""archives.py against archives that are damaged or evil, and against bad networks."""

import gzip
import hashlib
import http.server
import io
import os
import random
import re
import shutil
import socket
import ssl
import tarfile
import urllib.error
import zipfile
from collections import Counter

import pytest
from conftest import command, contents, made_in, serving
from PIL import Image

import archives
import files
import folders

TENCH = "n01440764"


def pack(path, folder, *members, top="imagenette2-160/"):
    """A .tgz, .tar or .zip of a folder, made like the public one, then of `members` (of a tar)."""
    entries = [(entry, top + entry.relative_to(folder).as_posix())
               for entry in sorted(folder.rglob("*")) if entry.suffix not in (".pixels", ".lock")]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for entry, name in entries:
                file.write(entry, name)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for entry, name in entries:
            tar.add(entry, name, recursive=False)
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def member(name, kind=tarfile.REGTYPE, link="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


# ---------------------------------------------------------------- unpacking


@pytest.mark.parametrize("top", ["imagenette2-160/", ""])
@pytest.mark.parametrize("suffix", [".tgz", ".tar", ".zip"])
def test_an_archive_is_unpacked_once(demo, tmp_path, monkeypatch, capsys, suffix, top):
    archive, root = pack(tmp_path / f"photos{suffix}", demo, top=top), tmp_path / "root"
    folder = folders.prepare(archive, root)
    assert folder == root / "photos" and made_in(root) == {"photos"}
    assert contents(folder) == contents(demo)
    error = capsys.readouterr().err
    assert "60 train and 20 val photos of 10 classes\n" in error
    assert "public ImageNette has 9,469 and 3,925\n" in error
    monkeypatch.setattr(archives, "extract", lambda *_: pytest.fail("unpacked again"))
    assert folders.prepare(archive, root) == folder


def test_an_archive_of_class_folders_from_a_mac(pets, tmp_path):
    archive = pack(tmp_path / "photos.zip", pets, top="pets/")
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("__MACOSX/pets/cat/._DSC00000.png", b"no photo")
        file.writestr("pets/cat/.DS_Store", b"no photo")
    assert contents(folders.prepare(archive, tmp_path / "root")) == contents(pets)


@pytest.mark.parametrize("name", ["2024 12:30.png", "what?.jpg", "dots./a.jpg", "a:b.jpg"])
def test_names_that_windows_lacks_are_said_there(pets, tmp_path, monkeypatch, name):
    archive = pack(tmp_path / "photos.tar", pets, member("./pets/cat/b.jpg"), top="pets/")
    strange = pack(tmp_path / "strange.tar", pets, member(f"pets/cat/{name}"), top="pets/")
    monkeypatch.setattr(files, "WINDOWS", True)
    folders.prepare(archive, tmp_path / "root")
    with pytest.raises(ValueError, match="Windows has no such names"):
        folders.prepare(strange, tmp_path / "root")
    monkeypatch.setattr(files, "WINDOWS", False)
    folders.prepare(strange, tmp_path / "root")


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz"])
def test_a_tar_is_unpacked_however_it_is_compressed(pets, tmp_path, packing):
    with tarfile.open(tmp_path / f"Photos.TAR.{packing}", f"w:{packing}") as tar:
        tar.add(pets, "pets")
    folder = folders.prepare(tmp_path / f"Photos.TAR.{packing}", tmp_path / "root")
    assert contents(folder) == contents(pets)
    assert (tmp_path / "root" / "Photos").is_dir()


@pytest.mark.parametrize("name", ["photos.ZIP", "photos"])
def test_an_archive_may_lie_where_it_is_unpacked(pets, tmp_path, name):
    archive = pack(tmp_path / "photos.zip", pets, top="pets/")
    (tmp_path / "root").mkdir()
    archive = archive.rename(tmp_path / "root" / name)
    assert contents(folders.prepare(archive, tmp_path / "root")) == contents(pets)


def test_a_zip_of_windows_with_a_letter_beside_the_folder(pets, tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        file.writestr("README.txt", "photos of pets")
        for path in pets.rglob("*.*"):
            info = zipfile.ZipInfo("x")
            info.filename = "download\\pets\\" + str(path.relative_to(pets)).replace("/", "\\")
            file.writestr(info, path.read_bytes())
    assert contents(folders.prepare(tmp_path / "photos.zip", tmp_path / "root")) == contents(pets)


def test_names_of_a_zip_are_utf_8_even_where_it_does_not_say_so(tmp_path):
    """As zip on Linux and Macs writes them: without the bit for UTF-8 in both headers, which
    Python would write."""
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        for name in ("Tür", "猫"):
            for i in range(2):
                photo = io.BytesIO()
                Image.new("RGB", (8, 8), (len(name), i, 0)).save(photo, "PNG")
                file.writestr(f"{name}/{i}.png", photo.getvalue())
    raw = (tmp_path / "photos.zip").read_bytes()
    assert raw.count(b"\x00\x08\x00\x00") >= 4  # flags, then "stored", of every entry
    for header in (b"PK\x03\x04\x14\x00", b"PK\x01\x02\x14\x03\x14\x00"):
        assert raw.count(header + b"\x00\x08") == 4
        raw = raw.replace(header + b"\x00\x08", header + b"\x00\x00")
    (tmp_path / "photos.zip").write_bytes(raw)
    names = zipfile.ZipFile(tmp_path / "photos.zip").namelist()
    assert not {"Tür/0.png", "猫/0.png"} & set(names)
    folder = folders.prepare(tmp_path / "photos.zip", tmp_path / "root")
    assert folders.check(folder)[1] == ["Tür", "猫"]


def test_a_tar_is_unpacked_by_a_python_without_filters(small, tmp_path, monkeypatch):
    """Python 3.11.0 to 3.11.3 (Debian 12 has 3.11.2): `TarFile.extract` takes no filter."""
    extract = tarfile.TarFile.extract

    def old(self, member, path="", set_attrs=True, *, numeric_owner=False):
        return extract(self, member, path, set_attrs, numeric_owner=numeric_owner)

    monkeypatch.setattr(tarfile.TarFile, "extract", old)
    for name in ("data_filter", "FilterError"):
        monkeypatch.delattr(tarfile, name, raising=False)
    monkeypatch.setattr(archives, "FILTER", {})
    folder = folders.prepare(pack(tmp_path / "photos.tgz", small), tmp_path / "root")
    assert contents(folder) == contents(small)


def test_an_archive_that_changed_is_unpacked_anew(small, tmp_path):
    folder = folders.prepare(pack(tmp_path / "photos.tgz", small), tmp_path / "root")
    (small / "train" / TENCH / "0.png").rename(small / "train" / TENCH / "new.png")
    (folder / "notes.txt").write_text("of the user")
    assert folders.prepare(pack(tmp_path / "photos.tgz", small), tmp_path / "root") == folder
    assert contents(folder) == contents(small)
    assert (tmp_path / "root" / "photos.before" / "notes.txt").read_text() == "of the user"
    for number in ("2", "3"):  # none is lost
        (small / "train" / TENCH / "new.png").write_bytes(number.encode())
        folders.prepare(pack(tmp_path / "photos.tgz", small), tmp_path / "root")
        assert (tmp_path / "root" / f"photos.before{number}").is_dir()
    assert (tmp_path / "root" / "photos.before" / "notes.txt").read_text() == "of the user"


def test_an_archive_is_known_by_its_bytes(small, tmp_path, monkeypatch):
    archive, root = pack(tmp_path / "photos.tar", small), tmp_path / "root"
    folder, raw = folders.prepare(archive, root), archive.read_bytes()
    (tmp_path / "photos.zip").write_bytes(raw)  # a copy, of another name and another time
    os.utime(archive, (1, 1))
    extracted = []
    monkeypatch.setattr(archives, "extract", lambda *_: extracted.append(1))
    for copy in (archive, tmp_path / "photos.zip"):
        assert folders.prepare(copy, root) == folder and not extracted
    for at in (0, len(raw) // 2, len(raw) - 1):  # as old and as large, with one other byte
        archive.write_bytes(flip_byte(raw, at))
        os.utime(archive, (1, 1))
        folders.prepare(archive, root)
    assert len(extracted) == 3


def test_every_byte_of_an_archive_counts(tmp_path):
    """A photo that another of its size replaces in a .tar leaves its length as it was."""
    archive = tmp_path / "photos.tar"
    archive.write_bytes(bytes(2**20))
    same = archives.identity(archive)
    for at in (0, 70_000, 2**20 - 1):
        archive.write_bytes(flip_byte(bytes(2**20), at))
        assert archives.identity(archive) != same


@pytest.mark.parametrize(("field", "value", "words"), [
    ("flag", 1, "protected by a password"), ("method", 9, "packed in a way that is not read here")])
def test_a_zip_that_is_not_read_here_is_no_damage(small, tmp_path, field, value, words):
    archive = pack(tmp_path / "photos.zip", small)
    raw = bytearray(archive.read_bytes())
    for head, flag, method in ((b"PK\3\4", 6, 8), (b"PK\1\2", 8, 10)):
        for found in re.finditer(re.escape(head), bytes(raw)):
            raw[found.start() + (flag if field == "flag" else method)] = value
    archive.write_bytes(raw)
    with pytest.raises(ValueError, match=f"photos.zip is {words}.*unpack it, and name the folder"):
        folders.prepare(archive, tmp_path / "root")
    assert not (tmp_path / "root" / "photos").exists()


def test_a_folder_of_the_users_own_is_not_overwritten(small, tmp_path):
    own = tmp_path / "root" / "photos"
    own.mkdir(parents=True)
    (own / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="did not come from"):
        folders.prepare(pack(tmp_path / "photos.tgz", small), tmp_path / "root")
    assert (own / "thesis.txt").read_text() == "years of work"


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_a_damaged_zip_is_refused_by_name(pets, tmp_path, method):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", method) as file:
        for path in pets.rglob("*.*"):
            file.write(path, path.relative_to(pets))
    raw = bytearray((tmp_path / "photos.zip").read_bytes())
    raw[60:160] = bytes(100)
    (tmp_path / "photos.zip").write_bytes(raw)
    with pytest.raises(ValueError, match="photos.zip"):
        folders.prepare(tmp_path / "photos.zip", tmp_path / "root")
    assert not (tmp_path / "root" / "photos").exists()


def test_a_damaged_archive_leaves_the_folder_of_its_forerunner(small, tmp_path):
    archive, root = pack(tmp_path / "photos.tgz", small), tmp_path / "root"
    folder = folders.prepare(archive, root)
    archive.write_bytes(archive.read_bytes()[:3000])
    with pytest.raises(ValueError, match="cut short"):
        folders.prepare(archive, root)
    assert made_in(root) == {"photos"} and contents(folder) == contents(small)


def flip_byte(raw, at):
    raw = bytearray(raw)
    raw[at] ^= 255
    return bytes(raw)


WRONG_ARCHIVES = {  # from the bytes of a good one
    "empty": lambda raw: b"",
    "text": lambda raw: b"<html>404 Not Found</html>",
    "noise": lambda raw: random.Random(0).randbytes(5000),
    "compressed noise": lambda raw: gzip.compress(random.Random(0).randbytes(5000)),
    "cut in the middle": lambda raw: raw[: len(raw) // 2],
    "cut by its last byte": lambda raw: raw[:-1],
    "cut before its checksum": lambda raw: raw[:-8],
    "wrong checksum": lambda raw: flip_byte(raw, -8),
    "wrong length": lambda raw: flip_byte(raw, -1),
    "a byte changed": lambda raw: flip_byte(raw, len(raw) // 2),
    "compressed and cut": lambda raw: gzip.compress(gzip.decompress(raw)[:5000]),
}


@pytest.mark.parametrize("how", WRONG_ARCHIVES)
def test_a_damaged_archive_is_refused(small, tmp_path, how, monkeypatch, capsys):
    archive, root = pack(tmp_path / "photos.tgz", small), tmp_path / "root"
    archive.write_bytes(WRONG_ARCHIVES[how](archive.read_bytes()))
    status, lines = command(monkeypatch, capsys, archive, "--root", root)
    assert status == 2 and len(lines) == 1 and lines[0].startswith(f"data.py: {archive}")
    assert "damaged" in lines[0] and made_in(root) == set()


def header_of_a_member(raw):
    return raw.index(f"imagenette2-160/val/{TENCH}/1.png".encode())


WRONG_OTHERS = {  # a .tar has no checksum but of its headers
    "tar cut in a photo": (".tar", lambda raw: raw[: header_of_a_member(raw) + 600]),
    "tar cut between two photos": (".tar", lambda raw: raw[: header_of_a_member(raw)]),
    "tar with a damaged header": (".tar", lambda raw: flip_byte(raw, header_of_a_member(raw))),
    "zip cut": (".zip", lambda raw: raw[: len(raw) // 2]),
    "zip without its last byte": (".zip", lambda raw: raw[:-1]),
    "zip with a byte changed": (".zip", lambda raw: flip_byte(raw, raw.index(b"PK", 4000) - 50)),
}


@pytest.mark.parametrize("how", WRONG_OTHERS)
def test_a_damaged_tar_or_zip_is_refused(small, tmp_path, how):
    suffix, spoil = WRONG_OTHERS[how]
    archive, root = pack(tmp_path / f"photos{suffix}", small), tmp_path / "root"
    good = archive.read_bytes()
    archive.write_bytes(spoil(good))
    assert archive.read_bytes() != good
    with pytest.raises(ValueError, match="cut short, damaged"):
        folders.prepare(archive, root)
    assert made_in(root) == set()


def test_a_full_disk_leaves_nothing_half_unpacked(small, tmp_path, monkeypatch, capsys):
    archive = pack(tmp_path / "photos.tgz", small)
    real, written = tarfile.copyfileobj, Counter()

    def full(*arguments, **options):
        written["files"] += 1
        if written["files"] == 7:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(tarfile, "copyfileobj", full)
    status, lines = command(monkeypatch, capsys, archive, "--root", tmp_path / "root")
    assert status == 2 and len(lines) == 1 and "No space left on device" in lines[0]
    assert made_in(tmp_path / "root") == set()


# ---------------------------------------------------------------- harm


LINK = "imagenette2-160/link"


EVIL = {  # members that would be written or point outside, to `out`, or are no plain files
    "parent": lambda out: [member("imagenette2-160/../../../outside", size=3)],
    "parent alone": lambda out: [member("../outside", size=3)],
    "absolute": lambda out: [member(f"{out}/outside", size=3)],
    "symlink out": lambda out: [member(LINK, tarfile.SYMTYPE, "../../../outside")],
    "absolute symlink": lambda out: [member(LINK, tarfile.SYMTYPE, f"{out}/outside")],
    "through a symlink": lambda out: [member(LINK, tarfile.SYMTYPE, "../.."),
                                      member(f"{LINK}/outside", size=3)],
    "hard link out": lambda out: [member(LINK, tarfile.LNKTYPE, "../../secret.txt")],
    "absolute hard link": lambda out: [member(LINK, tarfile.LNKTYPE, f"{out}/secret.txt")],
    "hard link to nothing": lambda out: [member(LINK, tarfile.LNKTYPE, "imagenette2-160/none")],
    "fifo": lambda out: [member("imagenette2-160/pipe", tarfile.FIFOTYPE)],
    "device": lambda out: [member("imagenette2-160/device", tarfile.CHRTYPE)],
    "file in a file": lambda out: [member("imagenette2-160/a", size=3),
                                   member("imagenette2-160/a/b", size=3)],
    "file that is a folder": lambda out: [member("imagenette2-160/train", size=3)],
}


@pytest.mark.parametrize("what", EVIL)
def test_an_evil_archive_is_refused(small, tmp_path, what):
    out, root = tmp_path / "out", tmp_path / "out" / "root"
    out.mkdir()
    (out / "secret.txt").write_text("secret")
    with pytest.raises(ValueError, match="photos.tgz"):
        folders.prepare(pack(tmp_path / "photos.tgz", small, *EVIL[what](out)), root)
    assert made_in(root) == set() and {p.name for p in out.iterdir()} == {"secret.txt", "root"}
    assert (out / "secret.txt").stat().st_nlink == 1 and not (tmp_path / "outside").exists()


EVIL_ZIP = {  # name, UNIX mode
    "parent": ("a/../../outside", 0o100644),
    "absolute": ("/outside", 0o100644),
    "backslashes": ("a\\..\\..\\outside", 0o100644),
    "drive": ("C:outside", 0o100644),
    "symlink": ("a/link", 0o120777),
    "device": ("a/device", 0o020644),
}


@pytest.mark.parametrize("what", EVIL_ZIP)
def test_an_evil_zip_is_refused(small, tmp_path, what):
    out, root, (name, mode) = tmp_path / "out", tmp_path / "out" / "root", EVIL_ZIP[what]
    out.mkdir()
    archive = pack(tmp_path / "photos.zip", small)
    with zipfile.ZipFile(archive, "a") as file:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        file.writestr(info, b"../../outside")
    with pytest.raises(ValueError, match="photos.zip (would write outside|holds a link or)"):
        folders.prepare(archive, root)
    assert made_in(root) == set() and {p.name for p in out.iterdir()} == {"root"}


@pytest.mark.parametrize("suffix", [".tgz", ".tar", ".zip"])
@pytest.mark.parametrize("limit", ["files", "bytes"])
def test_an_archive_beyond_all_measure_is_refused(small, tmp_path, monkeypatch, limit, suffix):
    usage = shutil.disk_usage(tmp_path)
    if limit == "files":
        monkeypatch.setattr(archives, "MAX_FILES", 30)
    else:
        few = usage._replace(free=archives.SPARE_BYTES + 5000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: few)
    with pytest.raises(ValueError, match="holds more than fits here"):
        folders.prepare(pack(tmp_path / f"photos{suffix}", small), tmp_path / "root")
    assert made_in(tmp_path / "root") == set()


def test_an_archive_of_something_else_is_refused(small, tmp_path):
    shutil.rmtree(small / "train" / TENCH)
    with pytest.raises(ValueError, match=f"photos.tgz cannot be used: .*val/{TENCH} is a class"):
        folders.prepare(pack(tmp_path / "photos.tgz", small), tmp_path / "root")
    assert made_in(tmp_path / "root") == set()


# ---------------------------------------------------------------- the download


PAYLOAD = random.Random(0).randbytes(600_000)


MD5 = hashlib.md5(PAYLOAD).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `payload` on 127.0.0.1. replies: how to answer each request in turn, the last one
    again and again; requests: the Range of each request that came, None without."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.payload, self.replies, self.requests = PAYLOAD, ["ranges"], []
        self.url = f"http://127.0.0.1:{self.server_port}/photos.tgz"


def test_a_certificate_that_cannot_be_checked_is_not_tried_again(tmp_path, monkeypatch):
    def refuse(*_):
        tries.append(1)
        raise urllib.error.URLError(ssl.SSLCertVerificationError("unable to get local issuer"))

    tries = []
    monkeypatch.setattr(archives, "fetch", refuse)
    with pytest.raises(ValueError, match="Install Certificates.command.*DATA="):
        archives.download("https://there/a.tgz", tmp_path / "a.tgz", 10, "")
    assert tries == [1]


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers["Range"]
        how = server.replies[min(len(server.requests), len(server.replies) - 1)]
        server.requests.append(wanted)
        if isinstance(how, int):
            return self.send_error(how)
        start = int(wanted[len("bytes=") : -1]) if wanted and how != "no ranges" else 0
        body = server.payload[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if how == "cut" else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving(Server()) as server:
        yield server


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between the tries, in seconds, written down instead of slept."""
    pauses = []
    monkeypatch.setattr(archives.time, "sleep", pauses.append)
    return pauses


@pytest.fixture
def fetch(server, tmp_path, pauses):
    """Download the payload; `kept` bytes of it have come in an earlier try."""

    def call(kept=None, md5=MD5, url=None):
        target = tmp_path / "photos.tgz"
        if kept is not None:
            (tmp_path / "photos.tgz.part").write_bytes(kept)
        archives.download(url or server.url, target, len(PAYLOAD), md5, timeout=10)
        return target.read_bytes()

    return call


def test_download(fetch, server, tmp_path):
    assert fetch() == PAYLOAD
    assert server.requests == [None] and os.listdir(tmp_path) == ["photos.tgz"]


def test_download_goes_on_where_it_stopped(fetch, server, tmp_path):
    assert fetch(kept=PAYLOAD[:1000]) == PAYLOAD
    assert server.requests == ["bytes=1000-"] and os.listdir(tmp_path) == ["photos.tgz"]


def test_a_complete_part_needs_no_request(fetch, server):
    assert fetch(kept=PAYLOAD) == PAYLOAD and server.requests == []


def test_download_from_a_server_without_ranges(fetch, server):
    server.replies = ["no ranges"]
    assert fetch(kept=PAYLOAD[:1000]) == PAYLOAD and server.requests == ["bytes=1000-"]


def test_a_missing_file_is_not_asked_for_twice(fetch, server, pauses, tmp_path):
    server.replies = [404]
    with pytest.raises(ValueError, match="answers 404 .*DATA="):
        fetch()
    assert server.requests == [None] and pauses == [] and os.listdir(tmp_path) == []


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_busy_server_is_asked_again(fetch, server, pauses, status):
    server.replies = [status, status, "ranges"]
    assert fetch() == PAYLOAD
    assert len(server.requests) == 3 and len(pauses) == 2 and 0 < pauses[0] < pauses[1]


def test_a_server_that_stays_down_is_given_up(fetch, server):
    server.replies = [503]
    with pytest.raises(ValueError, match="cannot download .*DATA="):
        fetch()
    assert 1 < len(server.requests) < 20


def test_a_cut_connection_is_taken_up_again(fetch, server):
    server.replies = ["cut", "cut", "ranges"]
    assert fetch() == PAYLOAD
    assert server.requests == [None, "bytes=300000-", "bytes=450000-"]


def test_what_came_before_giving_up_is_kept(fetch, server, tmp_path):
    server.replies = ["cut", 500]
    with pytest.raises(ValueError, match="300,000 of 600,000 bytes are kept"):
        fetch()
    assert os.listdir(tmp_path) == ["photos.tgz.part"]
    server.replies = ["ranges"]
    assert fetch() == PAYLOAD and server.requests[-1] == "bytes=300000-"


@pytest.mark.parametrize("kept", [None, b"of another file", PAYLOAD + b"and more"])
def test_a_wrong_checksum_is_removed(fetch, tmp_path, kept):
    md5 = "0" * 32 if kept is None else MD5
    with pytest.raises(ValueError, match="md5 .*try again"):
        fetch(kept, md5)
    assert os.listdir(tmp_path) == []


def test_a_file_that_does_not_end_is_not_fetched_to_its_end(fetch, server, tmp_path):
    server.payload = PAYLOAD * 20
    with pytest.raises(ValueError, match="try again"):
        fetch()
    assert os.listdir(tmp_path) == []


def test_no_network(fetch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/photos.tgz"
    said = "cannot download .*1,000 of 600,000 bytes are kept.*DATA="
    with pytest.raises(ValueError, match=said) as error:
        fetch(kept=PAYLOAD[:1000], url=url)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["photos.tgz.part"]


def test_without_a_source_the_public_archive_is_fetched_once(small, server, tmp_path, monkeypatch):
    archive = pack(tmp_path / "public.tgz", small).read_bytes()
    server.payload, server.url = archive, server.url.replace("photos", "imagenette2-160")
    digest = hashlib.md5(archive).hexdigest()
    for name, value in (("URL", server.url), ("ARCHIVE_BYTES", len(archive)),
                        ("ARCHIVE_MD5", digest)):
        monkeypatch.setattr(folders, name, value)
    folder = folders.prepare(root=tmp_path / "root")
    assert folder == tmp_path / "root" / "imagenette2-160" and contents(folder) == contents(small)
    assert folders.prepare(root=tmp_path / "root") == folder and len(server.requests) == 1
