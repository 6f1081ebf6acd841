"""Zip archives; tar archives are in test_archives.py."""

import errno
import struct
import unicodedata
import warnings
import zipfile

import pytest
from picture_files import encoded, noise
from source_files import names_in, source_of, write, write_zip

from hfgen.errors import UserError


def test_a_zip_gives_its_images_in_the_order_of_their_paths(tmp_path):
    names = ["b.png", "a/z.jpg", "a/b/c.webp", "a-b/q.jpeg", "C.PNG"]
    files = {name: name.encode() for name in names}
    hidden = ["__MACOSX/b.png", "__MACOSX/a/._z.jpg", ".hidden.png", "a/.git/x.png"]
    path = write_zip(tmp_path / "set.zip", files | dict.fromkeys(hidden, b"hidden") | {"read.me": b"", "a/": b""})
    ordered = ["C.PNG", "a/b/c.webp", "a/z.jpg", "a-b/q.jpeg", "b.png"]
    source = source_of(path)
    assert list(source.images()) == [(name, name.encode()) for name in ordered]
    assert sum(source.skipped.values()) == 1  # read.me
    for name in names:
        write(tmp_path / "folder" / name)
    assert names_in(source_of(tmp_path / "folder")) == ordered  # a folder and a zip of it are one dataset


@pytest.mark.parametrize(
    "evil", ["../x.png", "a/../../x.png", "/etc/x.png", "..", "a\\..\\..\\x.png", "C:\\x.png", "../readme.txt"]
)
def test_a_zip_with_a_name_that_leads_out_of_it_is_refused_by_name_and_offset(tmp_path, evil):
    path = write_zip(tmp_path / "evil.zip", {"good.png": b"0123456789", evil: b"x"})
    offset = 30 + len("good.png") + 10  # the local header, the name and the content of the first file
    with pytest.raises(UserError) as raised:
        source_of(path)
    assert str(path) in str(raised.value)
    assert repr(evil) in str(raised.value)
    assert f"at byte {offset} " in str(raised.value)


def test_two_dots_within_a_name_are_harmless(tmp_path):
    names = ["a..b.png", "c/..d/e.png"]
    path = write_zip(tmp_path / "set.zip", dict.fromkeys(names, b"x"))
    assert names_in(source_of(path)) == ["a..b.png"]  # the other lies in a hidden folder


def test_a_zip_bomb_is_refused_by_name_and_offset(tmp_path):
    path = write_zip(tmp_path / "bomb.zip", {"a.png": b"0123456789", "b.png": b"x"})
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")  # the last entry of the directory; its unpacked size lies at byte 24
    content[entry + 24 : entry + 28] = struct.pack("<I", (1 << 30) + 1)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bomb.zip.*'b.png' at byte 45 unpacks to 1073741825 bytes"):
        source_of(path)


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_a_damaged_member_of_a_zip_is_told_and_the_others_are_read(tmp_path, compression):
    files = {"a.png": encoded(noise(9, 9, 1)), "b.png": encoded(noise(9, 9, 2)), "c.png": encoded(noise(9, 9, 3))}
    path = write_zip(tmp_path / "set.zip", files, compression)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        second = archive.getinfo("b.png")
    start = second.header_offset + 30 + len("b.png")
    told = 0
    for position in range(start, start + second.compress_size, 5):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        (_, first), (name, error), (_, third) = source_of(path).images()
        assert (first, third) == (files["a.png"], files["c.png"])
        assert name == "b.png"
        assert isinstance(error, Exception) or error == files["b.png"]  # LZMA's stream begins with bytes nobody reads
        told += isinstance(error, Exception)
    assert told >= second.compress_size // 5 - 2


def test_a_zip_damaged_anywhere_is_an_error_or_its_damaged_members_are_told(tmp_path):
    path = write_zip(tmp_path / "set.zip", {"é/a.png": b"a" * 40, "b.png": b"b" * 40}, zipfile.ZIP_DEFLATED)
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of `zipfile`, about names that are there twice
            try:
                for _, content in source_of(path).images():
                    assert content in (b"a" * 40, b"b" * 40) or isinstance(content, Exception)
            except UserError as error:
                assert str(path) in str(error)


def test_a_zip_cut_off_anywhere_is_an_error_that_names_it(tmp_path):
    path = write_zip(tmp_path / "set.zip", {"a.png": b"a" * 40, "b.png": b"b" * 40})
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="set.zip: cannot be read as a zip file"):
            source_of(path)


def test_the_members_of_an_encrypted_zip_are_told_as_encrypted(tmp_path):
    path = write_zip(tmp_path / "secret.zip", {"a.png": b"a" * 20})
    content = bytearray(path.read_bytes())
    content[6] |= 1  # the flag "encrypted" in the local header ...
    content[content.index(b"PK\x01\x02") + 8] |= 1  # ... and in the directory
    path.write_bytes(content)
    ((name, error),) = source_of(path).images()
    assert name == "a.png"
    assert "encrypted" in str(error)


@pytest.mark.parametrize("content", [b"", b"this is text", encoded(noise(4, 4))])
def test_what_is_no_zip_is_an_error_that_names_it(tmp_path, content):
    with pytest.raises(UserError, match="set.zip: cannot be read as a zip file"):
        source_of(write(tmp_path / "set.zip", content))


@pytest.mark.parametrize("files", [{}, {"a.txt": b""}, {"__MACOSX/a.png": b""}])
def test_a_zip_without_images_is_an_error_that_names_it(tmp_path, files):
    with pytest.raises(UserError, match="set.zip: no images in this zip"):
        source_of(write_zip(tmp_path / "set.zip", files))


def test_the_folders_of_a_zip_written_with_backslashes_are_found(tmp_path):
    path = write_zip(tmp_path / "set.zip", {"train\\": b"", "train\\a.png": b"a", "test\\b.png": b"b"})
    assert list(source_of(path).images()) == [("train/a.png", b"a")]
    assert list(source_of(path / "test").images()) == [("test/b.png", b"b")]


def test_a_folder_with_accents_is_found_however_they_are_written(tmp_path):
    path = write_zip(tmp_path / "set.zip", {unicodedata.normalize("NFD", "Été/a.png"): b"a", "b.png": b"b"})
    for form in ("NFC", "NFD"):
        assert [content for _, content in source_of(path / unicodedata.normalize(form, "Été")).images()] == [b"a"]


def test_a_zip_that_has_gone_before_it_is_read_is_an_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HFGEN_CACHE", str(tmp_path / "cache"))
    source = source_of(write_zip(tmp_path / "set.zip", {"a.png": b"a"}))
    (tmp_path / "set.zip").unlink()
    with pytest.raises(UserError, match=r"^--dataset .*set.zip: cannot be read any more: .*No such file"):
        list(source.images())


def test_a_zip_on_a_disk_that_does_not_answer_is_an_error_and_not_a_smaller_data_set(tmp_path, monkeypatch):
    def fail(archive, member):
        raise OSError(errno.EIO, "Input/output error")

    source = source_of(write_zip(tmp_path / "set.zip", {"a.png": b"a"}))
    monkeypatch.setattr(zipfile.ZipFile, "read", fail)
    with pytest.raises(UserError, match=r"set.zip: cannot be read now \(Input/output error\); run the same command"):
        list(source.images())


def test_a_huge_file_in_a_zip_that_is_not_used_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr("hfgen.data.archives.MAX_ENCODED_BYTES", 100)
    path = write_zip(tmp_path / "set.zip", {"cats/a.png": b"a", "film.mp4": bytes(101), "dogs/b.png": bytes(101)})
    assert names_in(source_of(f"{path}/cats")) == ["cats/a.png"]
    with pytest.raises(UserError, match=r"'dogs/b.png' at byte \d+ unpacks to 101 bytes"):
        source_of(path)
