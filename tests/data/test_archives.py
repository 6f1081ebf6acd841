"""Tar archives; zips are in test_zips.py."""

import gzip
import io
import lzma
import tarfile
from pathlib import Path

import pytest
from source_files import source_of

from hfgen.errors import UserError


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


PACKINGS = {"set.tar": "w", "set.tar.gz": "w:gz", "set.tgz": "w:gz", "set.tar.bz2": "w:bz2", "set.TAR.XZ": "w:xz"}


@pytest.mark.parametrize("name", PACKINGS)
def test_a_tar_gives_its_images_in_its_order_however_it_is_packed(tmp_path, name):
    files = {"./b.png": b"b", "a/z.jpg": b"z" * 100_000, "labels.csv": b"", "__MACOSX/._b.png": b"x", "a.webp": b"a"}
    source = source_of(write_tar(tmp_path / name, files, PACKINGS[name]))
    wanted = [("./b.png", b"b"), ("a/z.jpg", b"z" * 100_000), ("a.webp", b"a")]
    assert list(source.images()) == wanted and list(source.images()) == wanted
    assert source.skipped == {".csv": 1}


def test_links_in_a_tar_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "a.png"), (tarfile.LNKTYPE, "b.png"), (tarfile.FIFOTYPE, "c.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            archive.addfile(member)
        archive.addfile(tarfile.TarInfo("d.png"))
    assert list(source_of(tmp_path / "set.tar").images()) == [("d.png", b"")]


@pytest.mark.parametrize("evil", ["../x.png", "/etc/x.png", "C:\\x.png", "a/../../x.txt"])
def test_a_tar_with_a_name_that_leads_out_of_it_is_refused(tmp_path, evil):
    path = write_tar(tmp_path / "set.tar", {"a.png": b"a", evil: b"x"})
    with pytest.raises(UserError, match="set.tar: rejected: the name .* points outside the archive"):
        source_of(path)


def test_a_member_of_a_tar_that_claims_a_huge_size_is_refused(tmp_path):
    member = tarfile.TarInfo("a.png")
    member.size = (1 << 30) + 1
    (tmp_path / "set.tar").write_bytes(member.tobuf() + bytes(10_240))
    with pytest.raises(UserError, match="set.tar: cannot be read as a tar file: unexpected end"):
        source_of(tmp_path / "set.tar")


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz", "set.tar.xz"])
def test_a_tar_that_is_cut_off_or_none_is_an_error_that_names_it(tmp_path, name):
    path = write_tar(tmp_path / name, {"a.png": bytes(range(256)) * 40, "b.png": b"b"}, PACKINGS.get(name, "w:xz"))
    whole = path.read_bytes()
    for content in (b"", b"text", lzma.compress(b"text"), whole[: len(whole) // 2], whole[:100], whole[:3]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: (cannot be read as a tar file|no images in this tar)"):
            list(source_of(path).images())


def test_a_folder_of_tars_is_one_data_set(tmp_path):
    for number in (1, 0):
        write_tar(tmp_path / f"cats-0000{number}.tar", {"0.jpg": b"%d" % number, "0.json": b"{}"})
    source = source_of(tmp_path)
    assert [content for _, content in source.images()] == [b"0", b"1"]
    assert len(source.files) == 2


def test_missing_tars_of_a_numbered_set_are_noted(tmp_path):
    write_tar(tmp_path / "x-00000-of-00002.tar", {"a.png": b"a"})
    (note,) = [note for note in source_of(tmp_path).notes if "are missing" in note]
    assert "only 1 of 2 files are there" in note
    write_tar(tmp_path / "x-00001-of-00002.tar", {"b.png": b"b"})
    assert not any("are missing" in note for note in source_of(tmp_path).notes)


@pytest.mark.parametrize("files", [{}, {"a.txt": b""}])
def test_a_tar_without_images_is_an_error_that_names_it(tmp_path, files):
    with pytest.raises(UserError, match="set.tar: no images in this tar"):
        source_of(write_tar(tmp_path / "set.tar", files))


PLAIN = {f"{number}.png": b"%d" % number * 700 for number in range(6)}
THIRD = 2 * (512 + 1024)  # byte where the header of the third member starts


@pytest.mark.parametrize("damage", ["flipped", "cut off"])
def test_a_tar_with_a_damaged_header_is_an_error_and_not_a_shorter_data_set(tmp_path, damage):
    path = write_tar(tmp_path / "set.tar", PLAIN)
    content = bytearray(path.read_bytes())
    content[THIRD + 5] ^= 4
    path.write_bytes(content if damage == "flipped" else path.read_bytes()[: THIRD + 99])
    with pytest.raises(UserError, match=f"set.tar: cannot be read as a tar file: damaged or cut off at byte {THIRD} "):
        source_of(path)


def test_a_tar_without_its_end_may_be_cut_off_and_that_is_noted(tmp_path):
    path = write_tar(tmp_path / "set.tar", PLAIN)
    assert not any("end-of-archive" in note for note in source_of(path).notes)
    path.write_bytes(path.read_bytes()[:THIRD])
    source = source_of(path)
    assert len(list(source.images())) == 2
    assert any("set.tar has no end-of-archive marker" in note for note in source.notes)


@pytest.mark.parametrize("name", PACKINGS)
def test_several_tars_in_one_file_are_read_whole_and_what_is_behind_the_end_is_not(tmp_path, name):
    parts = [write_tar(tmp_path / f"{part}.tar", {f"{part}.png": b"x"}, PACKINGS[name]) for part in "ab"]
    (tmp_path / name).write_bytes(b"".join(part.read_bytes() for part in parts))
    source = source_of(tmp_path / name)
    assert [member for member, _ in source.images()] == ["a.png", "b.png"]
    (tmp_path / "garbage.tar").write_bytes(write_tar(tmp_path / "c.tar", PLAIN).read_bytes() + b"garbage" * 200)
    assert len(list(source_of(tmp_path / "garbage.tar").images())) == len(PLAIN)


def test_a_tar_packed_in_parts_is_read_to_its_end_and_its_checksum_compared(tmp_path):
    content = write_tar(tmp_path / "set.tar", PLAIN).read_bytes()
    packed = gzip.compress(content[:THIRD]) + gzip.compress(content[THIRD:])
    (tmp_path / "set.tar.gz").write_bytes(packed)
    assert list(source_of(tmp_path / "set.tar.gz").images()) == list(source_of(tmp_path / "set.tar").images())
    damaged = bytearray(gzip.compress(content, compresslevel=0))
    damaged[2400] ^= 1  # within a picture, which is stored as it is
    (tmp_path / "set.tar.gz").write_bytes(damaged)
    with pytest.raises(UserError, match="set.tar.gz: cannot be read as a tar file: CRC check failed"):
        list(source_of(tmp_path / "set.tar.gz").images())


def test_links_to_images_in_a_tar_are_noted(tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "b.png").hardlink_to(tmp_path / "a.png")
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
        archive.add(tmp_path / "b.png", "b.png")
    source = source_of(tmp_path / "set.tar")
    assert [name for name, _ in source.images()] == ["a.png"]
    assert any("set.tar: 1 links are not followed" in note for note in source.notes)


def test_a_folder_in_a_tar_of_the_current_folder_can_be_chosen(tmp_path):
    path = write_tar(tmp_path / "set.tar", {"./cats/1.png": b"1", "./dogs/2.png": b"2"})
    assert list(source_of(path / "cats").images()) == [("./cats/1.png", b"1")]
    with pytest.raises(UserError, match="no such folder in the archive; it has cats, dogs"):
        source_of(path / "cows")


def test_the_splits_in_a_tar_of_the_current_folder_are_found(tmp_path):
    path = write_tar(tmp_path / "set.tar", {"./train/1.png": b"1", "./test/2.png": b"2"})
    assert list(source_of(path).images()) == [("./train/1.png", b"1")]


def test_what_is_known_of_a_tar_is_told_of_a_folder_of_tars_too(tmp_path):
    (tmp_path / "shards").mkdir()
    path = write_tar(tmp_path / "shards" / "a.tar", {"a.png": b"a", "b.heic": b"b"})
    path.write_bytes(path.read_bytes()[: 2 * 1024])  # without the end
    (tmp_path / "shards" / "labels.csv").write_bytes(b"")
    alone, folder = source_of(path), source_of(tmp_path / "shards")
    assert "it may have been cut off" in alone.notes[0] and folder.notes == alone.notes
    assert folder.skipped == {".heic": 1, ".csv": 1}


def test_a_huge_file_in_a_tar_that_is_not_used_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr("hfgen.data.archives.MAX_ENCODED_BYTES", 100)
    path = write_tar(tmp_path / "set.tar", {"cats/a.png": b"a", "film.mp4": bytes(101), "dogs/b.png": bytes(101)})
    assert [name for name, _ in source_of(f"{path}/cats").images()] == ["cats/a.png"]
    with pytest.raises(UserError, match="'dogs/b.png' unpacks to 101 bytes"):
        source_of(path)
