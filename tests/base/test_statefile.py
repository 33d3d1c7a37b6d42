"""The file of hidden states: found again by another process, cut back to what is whole, never larger than allowed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ie.base.statefile import _RECORD, StateFile, _digest

D = 8


def states(n_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_rows, D, generator=torch.Generator().manual_seed(seed))


def test_what_was_put_is_found_again(tmp_path: Path) -> None:
    first = StateFile(tmp_path, D, 2**20)
    first.put((1, 2, 3), states(3))
    first.put((7,), states(1, seed=1))
    assert first.get((1, 2)) is None
    first.close()
    again = StateFile(tmp_path, D, 2**20)
    for ids, kept in (((1, 2, 3), states(3)), ((7,), states(1, seed=1))):
        found = again.get(ids)
        assert found is not None and torch.equal(found, kept.bfloat16())
    again.put((9, 9), states(2, seed=2))
    found = again.get((9, 9))
    assert found is not None and torch.equal(found, states(2, seed=2).bfloat16())
    assert (len(again), again.n_bytes) == (3, 6 * D * 2)
    again.close()


def test_a_file_larger_than_the_memory_is_read(tmp_path: Path) -> None:
    d_model, n_rows = 2**10, 2**29
    with (tmp_path / "states.bf16").open("wb") as file:
        file.truncate(n_rows * d_model * 2)  # a TiB of nothing, which takes no room
    (tmp_path / "index").write_bytes(_RECORD.pack(_digest((1,)), 0, n_rows))
    again = StateFile(tmp_path, d_model, 2**50)
    kept = torch.randn(2, d_model).bfloat16()
    again.put((2, 2), kept)
    found = again.get((2, 2))
    assert found is not None and torch.equal(found, kept)
    again.close()


def test_another_process_finds_it(tmp_path: Path) -> None:
    file = StateFile(tmp_path, D, 2**20)
    file.put((4, 5), torch.ones(2, D))
    file.close()
    code = "from pathlib import Path; from ie.base.statefile import StateFile as S; import sys; "
    code += f"print(S(Path(sys.argv[1]), {D}, 2**20).get((4, 5)).sum().item())"
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert float(found.stdout) == 2 * D


@pytest.mark.parametrize(("states_lost", "index_lost"), [(1, 0), (5, 0), (0, 3), (0, 28), (2 * D * 2 + 1, 0)])
def test_what_is_half_written_is_cut_off(tmp_path: Path, states_lost: int, index_lost: int) -> None:
    file = StateFile(tmp_path, D, 2**20)
    file.put((1,), states(1))
    file.put((2, 2), states(2, seed=1))
    file.close()
    for name, lost in (("states.bf16", states_lost), ("index", index_lost)):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) - lost])
    again = StateFile(tmp_path, D, 2**20)
    assert again.get((2, 2)) is None
    kept = again.get((1,))
    if states_lost <= 2 * D * 2:
        assert kept is not None and torch.equal(kept, states(1).bfloat16())
    again.put((3,), states(1, seed=2))
    found = again.get((3,))
    assert found is not None and torch.equal(found, states(1, seed=2).bfloat16())
    again.close()


def test_nothing_is_kept_beyond_the_budget(tmp_path: Path) -> None:
    file = StateFile(tmp_path, D, 2 * D * 2)
    file.put((1, 2), states(2))
    file.put((3,), states(1))
    assert file.get((1, 2)) is not None and file.get((3,)) is None
    assert (tmp_path / "states.bf16").stat().st_size == 2 * D * 2
    file.close()


def test_an_emptied_cache_gives_nobody_another_process_states(tmp_path: Path) -> None:
    mine = StateFile(tmp_path / "cache", D, 2**20)
    mine.put((1,), states(1))
    shutil.rmtree(tmp_path / "cache")
    other = StateFile(tmp_path / "cache", D, 2**20)
    other.put((2,), states(1, seed=1))
    mine.put((3,), states(1, seed=2))
    for ids, seed in (((1,), 0), ((3,), 2)):
        found = mine.get(ids)
        assert found is not None and torch.equal(found, states(1, seed=seed).bfloat16())
    mine.close()
    other.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    file = StateFile(tmp_path, D, 2**20)
    code = "from pathlib import Path; from ie.base.statefile import StateFile as S; import sys; "
    code += f"S(Path(sys.argv[1]), {D}, 2**20)"
    tried = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True, text=True)
    assert tried.returncode == 1 and "in use by another process" in tried.stderr
    file.close()


def test_a_full_disk_only_ends_the_keeping(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    file = StateFile(tmp_path, D, 2**20)
    file.put((1,), states(1))
    index = file._index
    with full.open("ab", buffering=0) as file._index:
        file.put((2,), states(1, seed=1))
    file._index = index
    assert file.get((2,)) is None and file.get((1,)) is not None
    assert (tmp_path / "states.bf16").stat().st_size == D * 2
    file.close()
