"""Which folders are of this user's own trainings."""

import shutil

from ldm_lab.pretrained.own_runs import MARK, has_trained, is_own, note_own, note_weights


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


def test_what_was_put_into_a_run_s_folder_was_not_trained_there(tmp_path):
    run, other = tmp_path / "x", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
        (folder / "ema.safetensors").write_bytes(b"1")
    note_weights(other / "ema.safetensors")
    assert not has_trained(other / "ema.safetensors")  # nor is the folder a run's
    note_own(run)
    assert not has_trained(run / "ema.safetensors")
    for content in (b"1", b"2"):
        (run / "ema.safetensors").write_bytes(content)
        note_weights(run / "ema.safetensors")
    for content, expected in ((b"1", True), (b"2", True), (b"a stranger's", False)):
        (run / "put.safetensors").write_bytes(content)
        assert has_trained(run / "put.safetensors") == expected
