"""Archives of photos: downloaded whole and verified, unpacked whole and without harm.

    archives.download(url, Path("data/photos.tgz"), size, md5)
    folder = archives.unpacked(Path("photos.zip"), Path("data"), inner_folder, check)
"""

import contextlib
import errno
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import ssl
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import files

MAX_FILES, SPARE_BYTES = 2_000_000, 2**30  # of an archive; what unpacking leaves free on the disk
STAMP = ".archive.json"  # in an unpacked folder: which archive it came from
FILTER = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not before Python 3.11.4


# ---------------------------------------------------------------- download


def download(url, target, size, md5, tries=6, timeout=30):
    """Fetch `url` into `target`, going on from `target`.part where an earlier try stopped.

    Server errors, stalls of `timeout` seconds and broken connections are tried again, each time
    after a longer wait. `target` appears whole and verified, or not at all: ValueError.
    """
    part, failure = Path(f"{target}.part"), None
    for attempt in range(tries):
        have = part.stat().st_size if part.exists() else 0
        if have >= size:
            break
        if attempt:
            time.sleep(min(2**attempt, 30) / 2)
        try:
            fetch(url, part, have, size, timeout, f"{target.name}:")
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError,
                ConnectionError) as error:
            failure, status = error, getattr(error, "code", 500)
            if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
                raise ValueError(f"the certificate of {url} cannot be checked ({error.reason}): on "
                                 "macOS run \"Install Certificates.command\" in Python's folder, "
                                 "or get the archive elsewhere and name it with DATA=") from error
            if status < 500 and status != 429:
                raise ValueError(f"{url} answers {status} ({error.reason}): get the archive "
                                 "elsewhere and name it with DATA=path/to/imagenette2-160.tgz"
                                 ) from error
    have = part.stat().st_size if part.exists() else 0
    if have < size:
        reason = getattr(failure, "reason", failure) or "it ends early"
        raise ValueError(f"cannot download {url} ({reason}; {have:,} of {size:,} bytes are kept "
                         "for the next try): check the network, or name an archive or a folder "
                         "that is there already with DATA=")
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    if have != size or digest != md5:
        part.unlink()
        raise ValueError(f"{url} gave {have:,} bytes with md5 {digest}, not {size:,} with {md5}: "
                         "removed, try again")
    files.replace(part, target)


def fetch(url, part, have, size, timeout, label):
    """Append to `part`, which has `have` of `size` bytes, what the server sends of the others."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=timeout) as reply:
        have = have if reply.status == 206 else 0  # 200: this server has no Range, start again
        with open(part, "ab" if have else "wb") as file:
            chunks = iter(lambda: reply.read1(1 << 18), b"")
            for chunk in files.progress(chunks, label, (size - have) / 2**20, "MiB",
                                        lambda chunk: len(chunk) / 2**20):
                file.write(chunk)
                if file.tell() > size:  # it is another file, which may never end
                    break


# ---------------------------------------------------------------- unpacking


@contextlib.contextmanager
def damage_named(archive):
    """What zipfile, tarfile and those they read with raise on a damaged archive, nearly every type
    there is, as one sentence. Errors of the disk stay what they are."""
    file_in_a_file = IsADirectoryError, NotADirectoryError, FileExistsError
    try:
        yield
    except Exception as error:
        if (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
                and not isinstance(error, file_in_a_file)):
            raise
        if isinstance(error, NotImplementedError):  # Windows packs large files so
            raise ValueError(f"{archive} is packed in a way that is not read here ({error}): "
                             "unpack it, and name the folder") from error
        raise ValueError(f"{archive} is cut short, damaged or no .tgz, .tar or .zip ({error}): get "
                         "it again") from error


class Entry(NamedTuple):
    """What an archive says of a file or folder in it."""

    name: str
    size: int  # bytes
    plain: bool  # a file or a folder, no link and no device
    info: tarfile.TarInfo | zipfile.ZipInfo


def open_zip(archive):
    """A zip whose names are UTF-8, as zip on Linux and Macs writes them without saying so, or
    else those of DOS."""
    try:
        return zipfile.ZipFile(archive, metadata_encoding="utf-8")
    except UnicodeDecodeError:
        return zipfile.ZipFile(archive)


def entries_of_zip(file):
    for info in file.infolist():
        info.filename = info.filename.replace("\\", "/")
    kinds = (0, stat.S_IFREG, stat.S_IFDIR)
    return [Entry(info.filename, info.file_size, stat.S_IFMT(info.external_attr >> 16) in kinds,
                  info) for info in file.infolist()]


def entries_of_tar(tar):
    """The entries of a tar, which is read to its end. Raises EOFError where that is missing."""
    entries = [Entry(info.name, info.size, info.isfile() or info.isdir(), info)
               for info in itertools.islice(tar, MAX_FILES + 1)]
    # To tarfile, damage looks like the end. Zeros must follow, then the checksum of a .tgz.
    padding = [block.strip(b"\0") for block in iter(lambda: tar.fileobj.read(1 << 16), b"")]
    if len(entries) <= MAX_FILES and (not padding or any(padding)):
        raise EOFError("its last part is missing")
    return entries


def refuse_harm(archive, entries, room):
    """ValueError where the entries need more than `room` bytes, are no plain files and folders, or
    would lie elsewhere."""
    if len(entries) > MAX_FILES or sum(entry.size for entry in entries) > room:
        raise ValueError(f"{archive} holds more than fits here ({MAX_FILES:,} files, "
                         f"{max(room, 0):,} bytes): not unpacked; make room on the disk")
    for entry in entries:
        path = PureWindowsPath(entry.name)  # knows both slashes, and drives
        if getattr(entry.info, "flag_bits", 0) & 1:  # of a zip
            raise ValueError(f"{archive} is protected by a password: unpack it, and name the "
                             "folder")
        if not entry.plain:
            raise ValueError(f"{archive} holds a link or a device ({entry.name}): not unpacked")
        if path.anchor or ".." in path.parts:
            raise ValueError(f"{archive} would write outside its folder ({entry.name}): not "
                             "unpacked")
        if (files.WINDOWS and isinstance(entry.info, tarfile.TarInfo)  # zipfile renames them itself
                and any(re.search(r'[<>:"|?*]|[. ]$', part) for part in path.parts)):
            raise ValueError(f"{archive} holds {entry.name}, and Windows has no such names: unpack "
                             "it, rename that, and name the folder")


def unpack(archive, folder):
    """Write all files of a .zip, or of a .tar however compressed, below `folder`; returns how many
    entries it has. Raises ValueError on damage and on what could do harm."""
    with damage_named(archive):
        is_tar = tarfile.is_tarfile(archive)
        file = tarfile.open(archive) if is_tar else open_zip(archive)
    with file:
        with damage_named(archive):
            entries = entries_of_tar(file) if is_tar else entries_of_zip(file)
        refuse_harm(archive, entries, shutil.disk_usage(folder).free - SPARE_BYTES)
        options = {"set_attrs": False, **FILTER} if is_tar else {}
        with damage_named(archive):
            for entry in entries:
                if "__MACOSX" not in entry.name.split("/"):  # a Mac's notes on each file
                    file.extract(entry.info, folder, **options)
    return len(entries)


def extract(archive, folder, stamp, inner_folder, check):
    """Unpack an archive, its top folder becoming `folder`, with the text `stamp` in it; all of it
    or nothing."""
    temporary, started = Path(f"{folder}.{os.getpid()}.part"), time.time()
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        count = unpack(archive, temporary)
        top = inner_folder(temporary)
        try:
            check(top)
        except ValueError as error:
            sentence = str(error).replace(str(top), folder.name)
            raise ValueError(f"{archive} cannot be used: {sentence}") from error
        (top / STAMP).write_text(stamp)
        if folder.exists():  # of an earlier archive; perhaps somebody has put something into it
            numbers = itertools.chain([""], itertools.count(2))
            before = next(path for path in (Path(f"{folder}.before{n}") for n in numbers)
                          if not path.exists())
            files.replace(folder, before)
            print(f"{folder} came from another {archive.name}: it is kept as {before}",
                  file=sys.stderr)
        files.replace(top, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{folder}: {count:,} entries unpacked in {time.time() - started:.1f} s",
          file=sys.stderr)


def identity(archive):
    """A text that other bytes change, whatever the archive is called and however old it is."""
    with open(archive, "rb") as file:  # 1 GB takes a second
        return json.dumps({"sha256": hashlib.file_digest(file, "sha256").hexdigest()})


def unpacked(archive, root, inner_folder, check):
    """The folder under `root` with the photos of an archive, unpacked if nobody has yet.
    inner_folder: which folder in one is the data; check: ValueError where one is none."""
    name = re.sub(r"\.(tgz|tar|zip|tar\.\w+)$", "", archive.name, flags=re.IGNORECASE)
    folder = root / (name if name != archive.name else f"{name}-unpacked")
    stamp, own = folder / STAMP, identity(archive)
    with files.lock(folder):
        if folder.exists() and not stamp.exists():
            raise ValueError(f"{folder} exists and did not come from {archive}: use it "
                             f"(DATA={folder}), or move it away")
        if not folder.exists() or stamp.read_text() != own:
            extract(archive, folder, own, inner_folder, check)
    return folder
