"""What only a local folder can go through: full disks, killed writers, other disks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from app.errors import AppError
from app.storage.local import LocalStore

MIB = 1 << 20

# The kernel refuses to let a file grow over 1 MiB, as it refuses on a full disk: the same path, another errno.
_LIMITED = """
import resource, sys
from pathlib import Path
from app.errors import AppError
from app.storage.local import LocalStore
store, sources = LocalStore(Path(sys.argv[1])), Path(sys.argv[2])
upload = store.begin_upload("joined")
parts = [store.put_part("joined", upload, n, sources / f"part{n}") for n in (1, 2)]
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
put = lambda: store.put_file("large", sources / "large")
join = lambda: store.complete_upload("joined", upload, parts)
for write in (put, join):
    try:
        write()
    except AppError as exc:
        print(exc.code, exc.status, exc.retryable)
print(len(store.list_parts("joined", upload)), store.size("large"), store.size("joined"))
store.put_file("small", sources / "small")
"""


def _run(code: str, *arguments: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    sources, root = tmp_path / "sources", tmp_path / "blobs"
    sources.mkdir()
    for name, size in (("large", 2 * MIB), ("part1", MIB - 1), ("part2", MIB - 1), ("small", 10)):
        (sources / name).write_bytes(bytes(size))
    lines = _run(_LIMITED, root, sources).splitlines()
    assert lines == ["storage_full 507 True", "storage_full 507 True", "2 None None"]
    assert _files(root / "objects") == ["small"]
    assert _files(root / "tmp") == []
    assert (sources / "large").stat().st_size == 2 * MIB


def test_who_reads_an_object_that_is_replaced_reads_it_to_its_end(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "blobs")
    for number, content in enumerate((b"old" * 1000, b"new" * 2000)):
        (tmp_path / str(number)).write_bytes(content)
    store.put_file("k", tmp_path / "0")
    store.fetch("k", tmp_path / "fetched")
    with store.open("k") as stream:
        assert stream.read(3) == b"old"
        store.put_file("k", tmp_path / "1", move=True, replace=True)
        assert stream.read() == b"old" * 999
    assert (tmp_path / "fetched").read_bytes() == b"old" * 1000
    assert store.size("k") == 6000
    assert _files(tmp_path / "blobs") == ["objects/k"]


def test_a_killed_writer_leaves_whole_objects_only(tmp_path: Path) -> None:
    root, source = tmp_path / "blobs", tmp_path / "source"
    content = os.urandom(MIB) * 8
    source.write_bytes(content)
    code = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from app.storage.local import LocalStore
        store, number = LocalStore(Path(sys.argv[1])), 0
        while True:
            number += 1
            store.put_file(f"k/{number}", Path(sys.argv[2]))
            print(number, flush=True)
        """
    )
    store = LocalStore(root)
    acknowledged = 0
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", code, str(root), str(source)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for _ in range(acknowledged + 2):
                assert writer.stdout.readline()
            time.sleep(0.003)
            writer.kill()
            acknowledged = max([acknowledged, *map(int, writer.stdout.read().split())])
    objects = list(store.list(""))
    assert len(objects) >= max(acknowledged, 2)
    for found in objects:
        with store.open(found.key) as stream:
            assert stream.read() == content
    left = len(_files(root / "tmp"))
    assert store.remove_stale(3600) == 0
    assert store.remove_stale(-1) == left
    assert _files(root / "tmp") == []


def test_a_move_is_a_rename_and_a_fetch_is_a_link(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "blobs")
    source = tmp_path / "source"
    source.write_bytes(b"x" * MIB)
    inode = source.stat().st_ino
    store.put_file("k", source, move=True)
    stored = store.local_path("k")
    assert stored is not None
    assert stored.stat().st_ino == inode
    assert not stored.stat().st_mode & 0o222, "objects are read-only"
    store.fetch("k", tmp_path / "fetched")
    assert (tmp_path / "fetched").stat().st_ino == inode
    store.delete("k")
    assert (tmp_path / "fetched").stat().st_size == MIB


def test_a_move_from_another_disk(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system to move from")
    store = LocalStore(tmp_path / "blobs")
    source, part = (other / f"anneal-test-{os.getpid()}-{n}" for n in (1, 2))
    try:
        source.write_bytes(b"elsewhere")
        part.write_bytes(b"part")
        store.put_file("k", source, move=True)
        upload = store.begin_upload("u")
        store.complete_upload("u", upload, [store.put_part("u", upload, 1, part)])
        assert not source.exists()
        assert not part.exists()
        assert (store.size("k"), store.size("u")) == (9, 4)
        store.fetch("k", source)
        assert source.read_bytes() == b"elsewhere"
    finally:
        source.unlink(missing_ok=True)
        part.unlink(missing_ok=True)


def test_a_key_that_is_a_folder_of_another_is_an_error_not_a_loss(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "blobs")
    source = tmp_path / "source"
    source.write_bytes(b"x")
    store.put_file("a/b", source)
    with pytest.raises(AppError) as raised:
        store.put_file("a", source, move=True)
    assert raised.value.code == "storage_unavailable"
    assert source.exists()
    with pytest.raises(AppError):
        store.put_file("a/b/c", source)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = LocalStore(tmp_path / "file" / "blobs")
    with pytest.raises(AppError) as raised:
        store.check()
    assert raised.value.code == "storage_unavailable"
    assert str(tmp_path) not in raised.value.detail


def test_what_a_killed_process_left_half_written_goes_before_its_time(tmp_path: Path) -> None:
    """A copy under way is locked by whoever makes it; without a lock it is nobody's."""
    writing = (
        "import sys, time; from pathlib import Path; from app.storage.local import LocalStore\n"
        "with LocalStore(Path(sys.argv[1]))._temporary() as path:\n"
        "    path.write_bytes(b'half'); print(flush=True); time.sleep(60)\n"
    )
    store = LocalStore(tmp_path)
    with subprocess.Popen([sys.executable, "-c", writing, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (half,) = (tmp_path / "tmp").iterdir()
        os.utime(half, (time.time() - 100,) * 2)
        assert store.remove_stale(3600) == 0, "it is being written"
        process.kill()
    assert store.remove_stale(3600) == 1
    assert not half.exists()
