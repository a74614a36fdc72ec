"""Entropy of patches and similarity in time, in PyTorch and as kernels, against their specifications."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.kernels.interpreted import DEVICE, DTYPES, few, needs_triton
from vtc import kernels
from vtc.errors import ConfigError, InputError, KernelError
from vtc.kernels import earlier_tokens, pixels, reference, video

pytestmark = needs_triton
both = pytest.mark.parametrize("choice", ["torch", "triton"])


@both
@given(
    st.integers(0, 10**6),
    st.sampled_from(DTYPES),
    st.sampled_from([1, 3, 4]),
    st.sampled_from([None, (1, 1), (3, 5), (7, 4)]),
    st.booleans(),
)
@few
def test_entropy(
    choice: str, seed: int, dtype: torch.dtype, channels: int, size: tuple[int, int] | None, normalised: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, channels, 13) if size is None else (2, channels, 9, 11)
    levels = torch.randint(0, int(torch.randint(1, 257, (), generator=generator)), shape, generator=generator) / 255
    mean, std = torch.rand(channels, generator=generator), 0.1 + torch.rand(channels, generator=generator)
    space = 2 if size is None else 3
    x = levels if not normalised else (levels - mean.view(-1, *[1] * (space - 1))) / std.view(-1, *[1] * (space - 1))
    x, statistics = x.to(DEVICE, dtype), (mean.to(DEVICE), std.to(DEVICE)) if normalised else (None, None)
    if dtype == torch.float32 and not normalised:
        x[0] *= 3  # beyond the range
    expected = reference.patch_entropy(x, *statistics, size=size)
    with kernels.use(choice):
        torch.testing.assert_close(kernels.patch_entropy(x, *statistics, size=size), expected, rtol=0, atol=1e-5)


@both
def test_entropy_of_known_patches(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "_BLOCK", 1)
    flat, halves, every = torch.full((256,), 0.4), torch.arange(256) % 2 * 1.0, torch.arange(256) / 255
    patches = torch.stack([flat, halves, every + 1e-4])[:, None].expand(-1, 3, -1).to(DEVICE)
    with kernels.use(choice):
        entropy = kernels.patch_entropy(patches)
        torch.testing.assert_close(entropy.cpu(), torch.tensor([0.0, 1.0, 8.0]), atol=0.01, rtol=0)
        assert kernels.patch_entropy(patches[0]).shape == ()
        assert kernels.patch_entropy(patches[:0]).shape == (0,)


@both
def test_pictures_are_read_where_they_lie(choice: str) -> None:
    # A view of a larger picture, with rows and channels far apart.
    wide = torch.rand(2, 3, 20, 40, device=DEVICE)
    view = wide[:, :, 3:17, 5:33]
    with kernels.use(choice):
        found = kernels.patch_entropy(view, size=(7, 14))
        assert found.shape == (2, 4)
        torch.testing.assert_close(found, kernels.patch_entropy(view.contiguous(), size=(7, 14)))
        torch.testing.assert_close(found[1], kernels.patch_entropy(view[1], size=(7, 14)))


@both
def test_entropy_refuses(choice: str) -> None:
    x = torch.rand(3, 8, 8, device=DEVICE)
    with kernels.use(choice):
        with pytest.raises(InputError, match="mean and std both"):
            kernels.patch_entropy(x, torch.rand(3, device=DEVICE))
        with pytest.raises(InputError, match=r"\(8, 8\) hold no patch of \(9, 2\)"):
            kernels.patch_entropy(x, size=(9, 2))
    with kernels.use("triton"), pytest.raises(KernelError, match="at most 4096 pixels, these have 4097"):
        kernels.patch_entropy(torch.rand(1, 4097, device=DEVICE))


@both
@given(st.integers(0, 10**6), st.integers(0, 11), st.sampled_from([1, 5, 64, 600]), st.sampled_from(DTYPES))
@few
def test_similarity(choice: str, seed: int, count: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator).to(DEVICE, dtype)
    earlier = torch.randint(-1, max(1, count), (count,), generator=generator).to(DEVICE)
    if count > 3:
        x[0] = 0.0
        x[1] = x[2]
        earlier[:3] = torch.tensor([2, 2, 1])
    expected = reference.temporal_similarity(x, earlier)
    with kernels.use(choice):
        found = kernels.temporal_similarity(x, earlier)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if count > 3:
        assert found[:3].tolist() == [0.0, 1.0, 1.0], "a zero row, and rows that are equal to the last bit"


@both
def test_equal_zeros_are_alike(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "_BLOCK", 8)
    x = torch.zeros(5, 4, device=DEVICE)
    earlier = torch.tensor([-1, 0, 1, 2, 3], device=DEVICE)
    with kernels.use(choice):
        assert kernels.temporal_similarity(x, earlier).tolist() == [0.0, 1.0, 1.0, 1.0, 1.0]
        with pytest.raises(InputError, match=r"not \(N, D\) and \(N,\)"):
            kernels.temporal_similarity(x, earlier[1:])


@both
def test_what_the_methods_compare(choice: str) -> None:
    x = torch.randn(7, 3, 6, device=DEVICE)

    def alike(a: int, b: int) -> torch.Tensor:
        return F.cosine_similarity(x[a], x[b], dim=-1)

    with kernels.use(choice):
        evs = kernels.temporal_similarity(x.flatten(0, 1), earlier_tokens(7, 3).to(DEVICE)).view(7, 3)
        dycoke = kernels.temporal_similarity(x.flatten(0, 1), earlier_tokens(7, 3, "groups").to(DEVICE)).view(7, 3)
        fastvid = kernels.temporal_similarity(x.mean(dim=1), earlier_tokens(7, 1).to(DEVICE))
    torch.testing.assert_close(evs[1:], torch.stack([alike(t, t - 1) for t in range(1, 7)]))
    assert not bool(evs[0].any())
    pairs = {1: 0, 2: 0, 3: 2, 5: 4, 6: 4}
    for frame in range(7):
        expected = alike(frame, pairs[frame]) if frame in pairs else torch.zeros(3, device=DEVICE)
        torch.testing.assert_close(dycoke[frame], expected)
    means = x.mean(dim=1)
    torch.testing.assert_close(fastvid[1:], F.cosine_similarity(means[1:], means[:-1], dim=-1))


def test_an_unknown_comparison_is_refused() -> None:
    with pytest.raises(ConfigError, match="previous, groups; got 'next'"):
        earlier_tokens(4, 4, "next")
