"""Files that are whole or not there: written beside, synced, renamed. With their SHA-256, so that a damaged one is noticed.

SHA256SUMS lists a folder's files as `sha256sum -c SHA256SUMS` reads it. While files are replaced it has a line for the old and one for
the new content of each, so that a kill at any instant leaves no file that looks damaged.
"""
import fcntl
import hashlib
import os
from pathlib import Path

SUMS = "SHA256SUMS"


def _write_temporary(path, content):
    """The new content under another name, on the disk.  content: bytes, or a function that writes the file whose path it is given"""
    beside = path.with_name(path.name + ".tmp")
    try:
        if callable(content):
            beside.touch()
            mode = beside.stat().st_mode
            content(beside)
            beside.chmod(mode)                   # safetensors makes files that nobody else may read
        else:
            beside.write_bytes(content)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
    except BaseException as error:               # a disk that is full should not stay full of halves
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and not error.filename:          # "No space left on device" does not say where
            error.filename = str(path)
        raise
    return beside


def _rename(besides):
    """{path: where its new content is}. The folder is synced too: a rename is an entry of its."""
    for path, beside in besides.items():
        os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def lock_folder(folder):
    """The folder is this process's until the descriptor that it gets is closed, or it ends, however. Raises BlockingIOError where another has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass                                     # a file system that has no locks
    return descriptor


def partial_files(folder):
    """What a killed process may have left in a folder: our NAME.tmp, safetensors' .tmpABCDEF."""
    return [path for path in Path(folder).glob("*") if path.suffix == ".tmp" or path.name.startswith(".tmp")]


def replace(path, content):
    """A reader sees the old file or the new one, never half of one.  content: bytes, or a function that writes the path it is given"""
    path = Path(path)
    _rename({path: _write_temporary(path, content)})


def replace_all(folder, contents, remove=()):
    """Replaces files (name -> content) of a folder and their lines in SHA256SUMS, then removes others. Each file is whole at every instant."""
    folder, besides = Path(folder), {}
    for half in partial_files(folder):                  # of one who was killed here
        half.unlink()
    try:
        for name, content in contents.items():
            besides[folder / name] = _write_temporary(folder / name, content)
        known = {name: digests for name, digests in read_checksums(folder).items() if (folder / name).exists()}
        new = {path.name: {_sha256(beside)} for path, beside in besides.items()}
        old = {name: known.get(name) or {_sha256(folder / name)} for name in new if (folder / name).exists()}
        _write_sums(folder, known | {name: new[name] | old.get(name, set()) for name in new})
        _rename(besides)
        for name in remove:                      # before the list forgets it: a file that is not listed is believed
            (folder / name).unlink(missing_ok=True)
        _write_sums(folder, {name: digests for name, digests in (known | new).items() if name not in remove})
    except BaseException:
        for beside in besides.values():
            beside.unlink(missing_ok=True)
        raise


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_sums(folder, known):
    replace(folder / SUMS, "".join(f"{digest}  {name}\n" for name in sorted(known) for digest in sorted(known[name])).encode())


def read_checksums(folder):
    """What SHA256SUMS says.  -> {name: set of digests}; empty where there is none, a line that is none says nothing"""
    path, found = Path(folder) / SUMS, {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        if name and name == Path(name).name:
            found.setdefault(name, set()).add(digest)
    return found


def folder_damage(folder):
    """What is wrong first with the files that a folder's SHA256SUMS lists, or with the list itself, in words; None where nothing is."""
    path = Path(folder) / SUMS
    if not path.is_file() or not path.read_bytes().endswith(b"\n"):
        return f"{SUMS} is gone or cut"
    return next(filter(None, (file_damage(path.with_name(name)) for name in read_checksums(folder))), None)


def file_damage(path):
    """What is wrong with a file that SHA256SUMS beside it lists, in words; None where nothing is, or it is not listed."""
    path = Path(path)
    listed = read_checksums(path.parent).get(path.name)
    if listed and not path.is_file():
        return f"{path.name} is gone"
    if listed and _sha256(path) not in listed:
        return f"{path.name} is damaged: its SHA-256 is not the one in {SUMS}"
    return None
