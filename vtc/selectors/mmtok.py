"""MMTok: tokens that cover what the text and what all tokens look for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .. import kernels
from ..core.context import VisualContext
from ..core.ranges import Float, Range
from ..core.selection import Selection
from ..core.signals import PreProjector
from ..core.sites import BeforeDecoder, Site
from ..core.stage import ModelShape, Stage
from ..registry import register_selector
from .schedule import check_number
from .text_relevance import TextRelevance

__all__ = ["MmTokSelector"]


@register_selector
@dataclass(frozen=True)
class MmTokSelector(TextRelevance):
    """Keep the tokens that cover best what the text and the picture itself look for: greedy maximum coverage.

    What is looked for are T + N distributions over the N tokens,

        softmax_j(cosine(text_t, x_j) / text_temperature) / T,    alpha * softmax_j(cosine(z_i, z_j) / temperature) / N,

    with the features x as the language model sees them and z of the tower before the projector. Each counts as far as
    its largest entry among the kept tokens; in every step the token that raises the sum of these most is kept, the
    lower index winning ties (`vtc.kernels.multimodal_coverage`).

    As released, but that gains are computed lazily. The text is the input embeddings of the whole prompt without its
    pictures, the system's part included; with `relevance`, x and text are embeddings of a contrastive model, and T the
    segments of the question, mostly one. The paper's model that improves the question beforehand is not here.

    Parameters
    ----------
    alpha
        Weight of what the picture looks for; 0: the text alone.
    text_temperature, temperature
        Of the two distributions; the lower, the fewer tokens satisfy.
    similarity, relevance
        As in `cdpruner`.

    Raises
    ------
    ConfigError
        An option is invalid.
    InputError
        Text and features are not equally wide, which only `vtc.select` allows.

    References
    ----------
    "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", arXiv 2508.18264.
    """

    name: ClassVar[str] = "mmtok"
    paper: ClassVar[str] = "MMTok, arXiv 2508.18264"
    cost: ClassVar[str] = "N^2 d"
    sites: ClassVar[tuple[type[Site], ...]] = (BeforeDecoder,)

    alpha: float = 0.5
    text_temperature: float = 0.01
    temperature: float = 0.2

    @classmethod
    def search_space(cls, depth: int, keep_ratio: float) -> dict[str, Range]:
        """Return ranges of the weight and of the temperatures."""
        return {
            "alpha": Float(0.0, 2.0),
            "text_temperature": Float(0.01, 0.2, log=True),
            "temperature": Float(0.05, 1.0, log=True),
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("mmtok", "alpha", self.alpha, 0, 100)
        check_number("mmtok", "text_temperature", self.text_temperature, 0.001, 100)
        # Below it exp(-1 / temperature) is no float32 any more.
        check_number("mmtok", "temperature", self.temperature, 0.02, 100)

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Once, before the language model."""
        return (Stage(requires=(*self.text_signals(), PreProjector())),)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose ``min(ctx.budget, N)`` tokens."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        tokens, text = self.tokens_and_text(ctx)
        picks = kernels.multimodal_coverage(
            tokens,
            ctx.budget,
            self.sign * text,
            ctx[PreProjector],
            self.alpha,
            self.text_temperature,
            self.temperature,
        )
        return Selection.from_indices(ctx.n, picks)
