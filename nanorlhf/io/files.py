"""Files that are whole or not there: written beside, synced, renamed.

And their SHA-256, so that a damaged one is noticed: SHA256SUMS lists a folder's files as
`sha256sum -c SHA256SUMS` reads it. While files are replaced it has a line for the old and one for
the new content of each, so that a kill at any instant leaves no file that looks damaged.
"""
import fcntl
import hashlib
import os
import re
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .read import InputError

SUMS = "SHA256SUMS"
MAX_HASHED_BYTES = 10**9     # reading more at each start of a run takes seconds


# ------------------------------------------------------------------------------------- writing

def _write_temporary(path, content):
    """The new content under another name, synced to the disk.

    content: bytes, or a function that writes the file whose path it is given  ->  the other path
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        if callable(content):
            temporary.touch()
            mode = temporary.stat().st_mode
            content(temporary)
            temporary.chmod(mode)                # safetensors' own files are private to the user
        else:
            temporary.write_bytes(content)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    except BaseException as error:               # a full disk should not stay full of partial files
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not error.filename:
            error.filename = str(path)           # "No space left on device" does not name the file
        raise
    return temporary


def _rename(temporaries):
    """{path: where its new content is}, of one folder.

    The folder is synced too: a rename is an entry of the folder.
    """
    for path, temporary in temporaries.items():
        os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def replace(path, content):
    """A reader sees the old file or the new one, never a part of one.

    content: bytes, or a function that writes the file whose path it is given
    """
    path = Path(path)
    _rename({path: _write_temporary(path, content)})


def replace_all(folder, contents, remove=()):
    """Replaces files of a folder and their lines in SHA256SUMS, then removes others.

    Each file is whole at every instant.
    contents: {name: as in `replace`};  remove: names
    """
    folder = Path(folder)
    for path in partial_files(folder):           # of a process that was killed here
        path.unlink()
    temporaries = {}
    try:
        for name, content in contents.items():
            temporaries[folder / name] = _write_temporary(folder / name, content)
        listed = read_checksums(folder)
        checksums = {name: listed[name] for name in listed if (folder / name).exists()}
        new = {}
        for path, temporary in temporaries.items():
            new[path.name] = {_sha256(temporary)}
            old = checksums.get(path.name, set())
            if not old and path.exists():
                old = {_sha256(path)}
            checksums[path.name] = old | new[path.name]
        _write_checksums(folder, checksums)
        _rename(temporaries)
        checksums |= new
        for name in remove:
            (folder / name).unlink(missing_ok=True)        # first: an unlisted file is believed
            checksums.pop(name, None)
        _write_checksums(folder, checksums)
    except BaseException:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise


def partial_files(folder):
    """What a killed process may have left in a folder: our NAME.tmp, safetensors' .tmpABCDEF."""
    return [
        path for path in Path(folder).glob("*")
        if path.suffix == ".tmp" or path.name.startswith(".tmp")
    ]


def lock_folder(folder):
    """The folder is this process's until the descriptor is closed or the process ends, however.

    -> the descriptor.  Raises BlockingIOError where another process has the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass                                     # a file system without locks
    return descriptor


# ----------------------------------------------------------------------------------- checksums

def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path, patterns=("[!.]*",)):
    """The SHA-256 of a file or, for a folder, of what `sha256sum` prints for its files.

    A file above MAX_HASHED_BYTES has its size and time of change in place of its SHA-256.
    patterns: of the files that count in a folder; hidden ones need not
    """
    path = Path(path)
    if path.is_file():
        stat = path.stat()
        if stat.st_size > MAX_HASHED_BYTES:
            return f"{stat.st_size} bytes of {stat.st_mtime_ns} ns"
        return _sha256(path)
    lines = []
    for pattern in patterns:
        for file in sorted(path.glob(pattern)):
            if file.is_file():
                lines.append(f"{content_digest(file)}  {file.relative_to(path)}\n")
    return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()


def _write_checksums(folder, checksums):
    lines = []
    for name in sorted(checksums):
        for digest in sorted(checksums[name]):
            lines.append(f"{digest}  {name}\n")
    replace(folder / SUMS, "".join(lines).encode())


def read_checksums(folder):
    """What SHA256SUMS lists.  -> {name: set of digests}

    Empty where the file is absent; lines of another form are ignored.
    """
    path = Path(folder, SUMS)
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    checksums = {}
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        if name and name == Path(name).name:
            checksums.setdefault(name, set()).add(digest)
    return checksums


def folder_damage(folder):
    """The first problem with SHA256SUMS or with the files that it lists, in words, or None."""
    path = Path(folder, SUMS)
    if not path.is_file() or not path.read_bytes().endswith(b"\n"):
        return f"{SUMS} is gone or cut"
    for name in read_checksums(folder):
        if problem := file_damage(path.with_name(name)):
            return problem
    return None


def file_damage(path):
    """The problem with a file that SHA256SUMS beside it lists, in words.

    None where there is no problem, or no line for the file.
    """
    path = Path(path)
    digests = read_checksums(path.parent).get(path.name)
    if not digests:
        return None
    if not path.is_file():
        return f"{path.name} is gone"
    if _sha256(path) not in digests:
        return f"{path.name} is damaged: its SHA-256 is not the one in {SUMS}"
    return None


# ----------------------------------------------------------------------------------- safetensors

@contextmanager
def open_tensors(path):
    """An open safetensors file: its header is read and checked against its size, no tensor is."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"{path}: not a readable safetensors file ({reason})") from None


def save_tensors(tensors, metadata):
    """A function that writes a safetensors file to the path it is given, for `replace`.

    A full disk is an OSError, as it is for other files.
    """
    def write(path):
        try:
            save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata)
        except SafetensorError as error:
            match = re.search(r"os error (\d+)", str(error))
            if not match:
                raise
            number = int(match[1])
            raise OSError(number, os.strerror(number), str(path)) from None
    return write
