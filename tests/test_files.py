"""Files are whole or not there, at every instant; and SHA256SUMS knows them."""
import hashlib
import shutil
import subprocess

import pytest

from nanorlhf.io import files

OLD, NEW = {"a": b"old a", "b": b"old b"}, {"a": b"new a", "b": b"new b", "c": b"new c"}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != files.SUMS}


def undamaged(folder):
    return not any(files.file_damage(folder / name) for name in files.read_checksums(folder) if (folder / name).exists())


def test_sums_are_what_sha256sum_reads(tmp_path):
    files.replace_all(tmp_path, OLD)
    assert (tmp_path / files.SUMS).read_text() == "".join(f"{hashlib.sha256(OLD[name]).hexdigest()}  {name}\n" for name in "ab")
    files.replace_all(tmp_path, {"b": b"new b", "c": lambda path: path.write_bytes(b"new c")}, remove=["a"])
    assert content(tmp_path) == {"b": b"new b", "c": b"new c"} and files.read_checksums(tmp_path).keys() == {"b", "c"}
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "-c", files.SUMS], cwd=tmp_path, capture_output=True).returncode == 0


def test_damage_is_named(tmp_path):
    files.replace_all(tmp_path, OLD)
    (tmp_path / "other").write_bytes(b"not listed")
    assert files.file_damage(tmp_path / "a") is None and files.file_damage(tmp_path / "other") is None and files.file_damage(tmp_path / "nowhere") is None
    (tmp_path / "a").write_bytes(b"old b")
    (tmp_path / "b").unlink()
    assert "a is damaged" in files.file_damage(tmp_path / "a") and files.file_damage(tmp_path / "b") == "b is gone"


@pytest.mark.parametrize("junk", [b"", b"\xff\xfe", b"abc  ../../etc/passwd\n", b"abc  /etc/passwd\n", b"no line at all", b"  a\n\n"])
def test_a_damaged_list_points_nowhere_else(junk, tmp_path):
    (tmp_path / files.SUMS).write_bytes(junk)
    assert not {name for name in files.read_checksums(tmp_path) if "/" in name}
    files.replace_all(tmp_path, OLD)
    assert undamaged(tmp_path) and content(tmp_path) == OLD


class Killed(BaseException):
    pass


@pytest.mark.parametrize("listed", [True, False])
def test_whole_at_every_instant(listed, tmp_path, monkeypatch):
    """Killed before the n-th rename, for every n: each file is the old one or the new one, none looks damaged, and the next save finishes it."""
    real, renames = files.os.replace, 5              # the list with old and new sums, three files, the list with the new ones
    for n in range(renames + 1):
        folder, left = tmp_path / str(n), [n]
        folder.mkdir()
        files.replace_all(folder, OLD)
        if not listed:                               # a folder from elsewhere, or whose list somebody has removed
            (folder / files.SUMS).unlink()

        def killed(*paths, left=left):
            if not left[0]:
                raise Killed
            left[0] -= 1
            real(*paths)
        monkeypatch.setattr(files.os, "replace", killed)
        if n < renames:
            with pytest.raises(Killed):
                files.replace_all(folder, NEW)
        else:
            files.replace_all(folder, NEW)
        monkeypatch.setattr(files.os, "replace", real)
        assert undamaged(folder), n
        assert all(content(folder).get(name) in (OLD.get(name), NEW[name]) for name in NEW), n
        files.replace_all(folder, NEW)
        assert content(folder) == NEW and undamaged(folder)
        assert files.read_checksums(folder) == {name: {hashlib.sha256(data).hexdigest()} for name, data in NEW.items()}


@pytest.mark.parametrize("failing", "abc")
def test_a_full_disk_leaves_the_old_files_and_no_halves(failing, tmp_path):
    files.replace_all(tmp_path, OLD)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path):
        path.write_bytes(b"ne")
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError):
        files.replace_all(tmp_path, NEW | {failing: full})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(OSError):
        files.replace(tmp_path / failing, full)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_halves_are_known(tmp_path):
    for name in ("a.tmp", ".tmpAb12Cd", "a", "tmp"):
        (tmp_path / name).write_bytes(b"")
    assert {path.name for path in files.partial_files(tmp_path)} == {"a.tmp", ".tmpAb12Cd"} and files.partial_files(tmp_path / "nowhere") == []
