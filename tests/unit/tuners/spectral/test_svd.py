"""Singular bases: exact, randomized, by energy, degenerate, cached."""

from __future__ import annotations

import pytest
import torch

from peft_lab.errors import ConfigError
from peft_lab.tuners.spectral import svd


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


def decaying(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, min(rows, columns)))
    v, _ = torch.linalg.qr(torch.randn(columns, min(rows, columns)))
    return (u * torch.logspace(0, -4, u.shape[1])) @ v.T


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)])
def test_full_rank_rebuilds_the_matrix(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    bases = svd.bases(matrix, "full")
    assert bases.rank == min(shape)
    torch.testing.assert_close((bases.u * bases.s) @ bases.vh, matrix, atol=1e-5, rtol=1e-5)


def test_integer_rank_is_the_best_approximation():
    matrix = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    bases = svd.bases(matrix, 5)
    error = torch.linalg.matrix_norm(matrix - (bases.u * bases.s) @ bases.vh)
    torch.testing.assert_close(error, torch.linalg.svdvals(matrix)[5:].square().sum().sqrt(), atol=1e-5, rtol=1e-5)
    assert svd.bases(matrix, 500).rank == 12


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_energy_rank_is_the_smallest_that_holds_the_share(share):
    matrix = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    energy = torch.linalg.svdvals(matrix.double()).square()
    rank = svd.bases(matrix, f"energy:{share}").rank
    assert energy[:rank].sum() >= share * energy.sum() * (1 - 1e-6)
    assert rank == 1 or energy[: rank - 1].sum() < share * energy.sum()


@pytest.mark.parametrize("rank", [0, -1, True, "half", "energy:0", "energy:1.5", "energy:", 2.0, None])
def test_bad_rank_is_refused(rank):
    with pytest.raises(ConfigError, match="rank="):
        svd.parse_rank(rank)


def test_half_precision_weights_are_decomposed_in_float32():
    matrix = torch.randn(20, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    bases = svd.bases(matrix, "full")
    assert bases.u.dtype == torch.float32
    torch.testing.assert_close((bases.u * bases.s) @ bases.vh, matrix.float(), atol=1e-5, rtol=1e-5)


def test_randomized_equals_exact(monkeypatch):
    matrix = decaying(160, 120)
    exact = svd.bases(matrix, 6)
    monkeypatch.setattr(svd, "EXACT_SIDE", 32)
    monkeypatch.setattr(torch.linalg, "svd", _only_small(torch.linalg.svd, 120))
    found = svd.bases(matrix, 6)
    torch.testing.assert_close(found.s, exact.s, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.u, exact.u, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.vh, exact.vh, atol=1e-3, rtol=1e-3)


def _only_small(exact, side):
    def guarded(matrix, **kwargs):
        assert min(matrix.shape) < side, "the randomized way must not fall back to the exact one here"
        return exact(matrix, **kwargs)

    return guarded


def test_unconverged_randomized_falls_back_to_exact(monkeypatch):
    monkeypatch.setattr(svd, "EXACT_SIDE", 32)
    monkeypatch.setattr(svd, "_MAX_ITERATIONS", 1)
    matrix = torch.randn(160, 120, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(svd.bases(matrix, 6).s, torch.linalg.svdvals(matrix)[:6], atol=1e-4, rtol=1e-4)


def test_signs_do_not_depend_on_the_way_to_the_factors():
    matrix = decaying(24, 24)
    flipped = torch.linalg.svd(matrix.double(), full_matrices=False)
    there = svd._canonical(-flipped[0].float(), flipped[1].float(), -flipped[2].float())
    torch.testing.assert_close(svd.bases(matrix, "full").vh[:8], there.vh[:8], atol=1e-3, rtol=1e-3)


def test_degenerate_counts_equal_neighbours():
    assert svd.degenerate(torch.tensor([3.0, 2.0, 1.0])) == 0
    assert svd.degenerate(torch.tensor([2.0, 2.0, 1.0, 1.0])) == 2
    assert svd.degenerate(torch.tensor([0.0, 0.0])) == 1


def test_second_time_comes_from_the_cache(cache, monkeypatch):
    matrix = torch.randn(160, 120, generator=torch.Generator().manual_seed(0))
    first = _copies(svd.bases(matrix, 8, key="abc"))
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(svd, "_decompose", lambda *_: pytest.fail("computed again"))
    assert ("abc-float32-160x120", "8", "cpu", "u") not in svd._IN_USE
    second = svd.bases(matrix, 8, key="abc")
    assert all(torch.equal(getattr(first, p), getattr(second, p)) for p in ("u", "s", "vh"))


def _copies(bases):
    return svd.Bases(bases.u.clone(), bases.s.clone(), bases.vh.clone())


def test_bases_in_use_are_held_once():
    matrix = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    first = svd.bases(matrix, 8, key="abc")
    assert svd.bases(matrix, 8, key="abc").u is first.u
    assert svd.bases(matrix, 8, key="other").u is not first.u
    assert svd.bases(matrix.bfloat16(), 8, key="abc").u is not first.u
    transposed = svd.bases(torch.randn(12, 20).T, 8, key="abc")
    assert transposed.u is not first.u
    del first
    assert ("abc-float32-20x12", "8", "cpu", "u") not in svd._IN_USE


@pytest.mark.parametrize("rank", [8, "energy:0.5"])
def test_full_bases_on_disk_serve_smaller_ranks(monkeypatch, rank):
    matrix = torch.randn(160, 120, generator=torch.Generator().manual_seed(0))
    expected = svd.bases(matrix, rank)
    svd.bases(matrix, "full", key="abc")
    monkeypatch.setattr(svd, "_decompose", lambda *_: pytest.fail("computed again"))
    found = svd.bases(matrix, rank, key="abc")
    assert all(torch.equal(getattr(found, p), getattr(expected, p)) for p in ("u", "s", "vh"))
    assert found.u.untyped_storage().nbytes() == found.u.nbytes


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_damaged_cache_is_computed_again(cache, damage):
    matrix = torch.randn(160, 120, generator=torch.Generator().manual_seed(0))
    first = _copies(svd.bases(matrix, 8, key="abc"))
    path = next(cache.iterdir())
    path.write_bytes(path.read_bytes()[:-50] if damage is None else damage)
    again = svd.bases(matrix, 8, key="abc")
    assert torch.equal(first.u, again.u)
    assert path.stat().st_size > 1000


def test_other_weights_and_ranks_have_other_cache_files(cache):
    matrix = torch.randn(160, 120, generator=torch.Generator().manual_seed(0))
    svd.bases(matrix, 8, key="abc"), svd.bases(matrix, 9, key="abc"), svd.bases(matrix, 8, key="abd")
    assert len(list(cache.iterdir())) == 3


def test_unwritable_cache_is_no_error(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFT_LAB_CACHE", str(tmp_path / "file"))
    matrix = torch.randn(160, 120, generator=torch.Generator().manual_seed(0))
    assert svd.bases(matrix, 8, key="abc").rank == 8
    assert "cache" in caplog.text
