"""A user's files are read within bounds, and a user's mistake has a class of its own."""
import gzip
import importlib.util
import json
import sys
import zlib
from pathlib import Path

MAX_FILE_BYTES = 2**30                     # bytes, unzipped: all of HH is a third of it, and as Python's objects it takes several times as much memory
MAX_JSON_BYTES = 2**26                     # bytes of one JSON value: "[[],[],[], ..." takes 20 times as much memory
MAX_JSON_DEPTH = 100                            # JSON inside JSON, ours has 5 levels: at 1,000 Python's recursion ends, parsing perhaps not, but printing


class InputError(ValueError):
    """A user's mistake: its message is one line that names the place, the value and what to do."""


def read_bytes(path, largest=None):
    """A file, gunzipped where its name ends in .gz: piece by piece, because a small one can unfold to anything."""
    raw, largest = bytearray(), largest or MAX_FILE_BYTES
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            while len(raw) <= largest and (piece := file.read(2**20)):
                raw += piece
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:               # ValueError: a name that no file can have
        raise InputError(f"{path}: cannot be read ({error})") from None
    if len(raw) > largest:
        raise InputError(f"{path}: more than {largest:,} bytes{' when unzipped' * str(path).endswith('.gz')}, the most that is read; split the file")
    return bytes(raw)


def parse_json(raw, where):
    """bytes -> dict. Whoever gets it may print, walk and write it: it is not deep."""
    try:
        if len(raw) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES:,} bytes")
        value = json.loads(raw.decode("utf-8-sig"))
        level, depth = [value], 0
        while level:
            level, depth = [x for part in level if isinstance(part, (dict, list)) for x in (part.values() if isinstance(part, dict) else part)], depth + 1
            if depth > MAX_JSON_DEPTH:
                raise ValueError(f"more than {MAX_JSON_DEPTH} levels deep")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte {error.object[error.start]:#04x}), so not JSON; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({str(error)[:80]}): {raw[:60].decode('utf-8', 'replace')!r}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object {{...}}, found {raw[:60].decode('utf-8', 'replace')!r}")
    return value


def import_file(path):
    """The module in a file, which may import modules that lie beside it."""
    name = f"nanorlhf_user_{Path(path).stem}"    # a file called json.py takes no other module's place
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)                  # last: what is installed goes before what lies beside
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module                   # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:     # a script that parses its own command line exits
        raise InputError(f"{path}: cannot be imported ({type(error).__name__}: {error})") from None
    return module
