"""Which folders are of this user's own trainings."""

import shutil

from ldm_lab.pretrained.own_runs import MARK, is_own, note_own


def test_a_folder_made_anew_is_anybody_s(tmp_path):
    """Even with the inode of the run's that was deleted, which file systems give to the next folder."""
    run, other = tmp_path / "x", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
        note_own(folder)
    assert is_own(run / "ema.safetensors") and is_own(run / "step=1" / "ema.safetensors")
    mark = (run / MARK).read_bytes()
    (run / MARK).unlink()  # emptied, which keeps the inode for sure
    assert not is_own(run / "ema.safetensors")
    (run / MARK).mkdir()
    assert not is_own(run / "ema.safetensors")
    (run / MARK).rmdir()
    for content in (b"", b"0" * len(mark), mark + b"0", (other / MARK).read_bytes(), b"\xff" * 999):
        (run / MARK).write_bytes(content)
        assert not is_own(run / "ema.safetensors")
    shutil.move(run / MARK, tmp_path / "kept")
    (tmp_path / "kept").write_bytes(mark)
    (run / MARK).symlink_to(tmp_path / "kept")
    assert not is_own(run / "ema.safetensors")
    (run / MARK).unlink()
    (run / MARK).write_bytes(mark)
    assert is_own(run / "ema.safetensors")
    note_own(run)  # it is trained on
    assert is_own(run / "ema.safetensors") and (run / MARK).read_bytes() != mark
