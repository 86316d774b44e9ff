"""How different the pictures of one checkpoint are: LPIPS between every two of them.

Each picture's value is its mean distance to all the others; their mean is the mean over all pairs, the figure of the
later public script. All pairs, not only those of one prompt: a grid has as many prompts as pictures by default, and
a checkpoint that draws the same thing for every prompt is what the figure should show.

Source: Zhang et al. 2018, arXiv:1801.03924, by its own package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaluator_daemon.job import Job
from evaluator_daemon.metrics.base import (
    Facts,
    Quantity,
    RenderedSet,
    all_unavailable,
    measured,
    require_planned,
    unavailable,
    why_no_package,
)
from shared.metric_names import Inputs, is_random_backbone
from shared.schemas import Metric

if TYPE_CHECKING:
    from evaluator_daemon.metrics.lpips_network import LpipsNetwork

NAME = "lpips_diversity"


class LpipsDiversity:
    """Unavailable without the backbone's weights."""

    facts = Facts(
        version="1",
        quantities={NAME: Quantity("target", 0.0, 1.0, "mean LPIPS distance of each picture to the others")},
        source="Zhang et al. 2018, arXiv:1801.03924, version 0.1, by the package lpips",
        code_licence="BSD-2-Clause (lpips), BSD-3-Clause (torchvision)",
        weights="linear heads: part of the package lpips; backbone: torchvision's AlexNet, VGG16 or SqueezeNet 1.1",
        weights_licence="BSD-3-Clause (torchvision); trained on ImageNet, whose pictures are for research only",
        get="download https://download.pytorch.org/models/alexnet-owt-7be5be79.pth (233 MB; or vgg16-397923af.pth, "
        "squeezenet1_1-b8a52dc0.pth) and name the file by --lpips-weights",
        needs=("--lpips-weights",),
    )

    def __init__(self, job: Job) -> None:
        self._network: LpipsNetwork | None = None
        self._why_not = self.why_not(job)
        if not self._why_not:
            from evaluator_daemon.metrics.lpips_network import load_lpips

            assert job.lpips_weights is not None
            self._network, self._why_not = load_lpips(job.lpips_weights, job.device)
            require_planned(job, "lpips_digest", self._why_not)

    @staticmethod
    def why_not(inputs: Inputs) -> str:
        if missing := why_no_package("lpips"):
            return missing
        weights = inputs.lpips_weights
        if weights is None:
            return (
                "no backbone weights are configured; name the file by --lpips-weights "
                "(https://download.pytorch.org/models/alexnet-owt-7be5be79.pth)"
            )
        if not is_random_backbone(weights) and not weights.is_file():
            return f"there is no file {weights}; correct --lpips-weights"
        return ""

    def measure(self, rendered: RenderedSet) -> dict[str, Metric]:
        if self._network is None:
            return all_unavailable(self.facts, self._why_not)
        version = f"{self.facts.version} ({self._network.description})"
        if len(rendered.pictures) < 2:
            return {NAME: unavailable("one picture has no diversity; use --num-samples 2 or more", "target", version)}
        if len({picture.shape for picture in rendered.pictures}) > 1:
            several = "the prompts ask for pictures of several sizes, and LPIPS compares pictures of one size"
            return {NAME: unavailable(several, "target", version)}
        return {NAME: measured(self._network.mean_distances(rendered.pictures), "target", version)}
