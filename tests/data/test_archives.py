"""Tar archives; zips are in test_zips.py."""

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
    with pytest.raises(UserError, match="'a.png' unpacks to 1073741825 bytes"):
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
