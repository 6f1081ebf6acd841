"""What is kept for later is compared with its digests when it is read again."""

import os

import pytest
from damages import DAMAGES

from hfgen.integrity import find_damage, record_digests, write_if_needed


@pytest.fixture
def kept(tmp_path):
    folder = tmp_path / "kept"
    write_if_needed(folder, write)
    return folder


def write(folder):
    folder.mkdir()
    (folder / "a.bin").write_bytes(bytes(range(256)))
    (folder / "b.json").write_text('{"a": 1}')


@pytest.mark.parametrize("file", ["a.bin", "b.json", "digests.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_found_and_made_good(damage, file, kept, capsys):
    write_if_needed(kept, None)  # writing again would fail
    DAMAGES[damage](kept / file)
    for trust_times in (True, False):
        assert file in find_damage(kept, trust_times) or file == "digests.json"
    write_if_needed(kept, write)
    assert find_damage(kept) is None and (kept / "a.bin").read_bytes() == bytes(range(256))
    assert f"{kept} is damaged and will be rebuilt: " in capsys.readouterr().out


def test_files_of_known_times_are_not_read_and_copies_only_once(kept, monkeypatch):
    os.utime(kept / "a.bin")
    assert find_damage(kept, trust_times=True) is None  # read, as its times are others
    monkeypatch.setattr("hfgen.integrity._digest", lambda file: "read")
    assert find_damage(kept, trust_times=True) is None
    assert find_damage(kept) == "the contents of a.bin have changed"


def test_files_that_are_not_recorded_may_change(kept):
    record_digests(kept, ["a.bin"])
    (kept / "b.json").unlink()
    assert find_damage(kept) is None


def test_what_a_killed_process_left_beside_it_is_removed_and_nothing_else(tmp_path):
    for name in (".kept.partial-1", ".kept.old-1", ".kept.mine", ".kept.png.partial-1"):
        (tmp_path / name).mkdir()
    write_if_needed(tmp_path / "kept", write)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".kept.mine", ".kept.png.partial-1", "kept"]
