"""torchvision's models for other tasks than classification: maps in a dict, clips of frames, pairs of images."""

import pytest
import torch
from helpers.comparisons import equal
from helpers.models import randomise
from helpers.widths import arbitrary_widths
from torchvision import models

from timm_autoslim import convert, cost
from timm_autoslim.errors import TraceError

IMAGE = torch.rand(1, 3, 64, 64)


def segmentation(name):
    return getattr(models.segmentation, name)(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)


CASES = {
    "lraspp_mobilenet_v3_large": (
        lambda: models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5),
        (IMAGE,),
    ),
    "deeplabv3_mobilenet_v3_large": (lambda: segmentation("deeplabv3_mobilenet_v3_large"), (IMAGE,)),
    "fcn_resnet50": (lambda: segmentation("fcn_resnet50"), (IMAGE,)),
    "r3d_18": (lambda: models.video.r3d_18(num_classes=5), (torch.rand(1, 3, 4, 32, 32),)),
    "swin3d_t": (lambda: models.video.swin3d_t(num_classes=5), (torch.rand(1, 3, 4, 64, 64),)),
    "raft_small": (lambda: models.optical_flow.raft_small(), (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_models_of_other_tasks_convert_and_are_extracted(name):
    build, inputs = CASES[name]
    model = randomise(build()).eval()
    supernet = convert(model, inputs if len(inputs) > 1 else inputs[0])
    assert supernet.graph.compute_share_at_half() < 0.35
    assert not supernet.repairs
    assert not supernet.unruled
    widths = arbitrary_widths(supernet.space, torch.Generator().manual_seed(0))
    slim = supernet.extract(widths)
    with torch.no_grad():
        assert equal(supernet(*inputs), model(*inputs))
        assert equal(supernet(*inputs, widths=widths), slim(*inputs))
    assert cost(supernet, widths).params == sum(p.numel() for p in slim.parameters())


@pytest.mark.slow
def test_a_detector_that_wants_targets_is_slimmed_by_its_backbone():
    detector = models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5).eval()
    with pytest.raises(TraceError, match=r"its forward raised AssertionError in train\(\) mode .*targets"):
        convert(detector, ([torch.rand(3, 320, 320)],))
    images = [torch.rand(3, 320, 320)]
    supernet = convert(detector.backbone, torch.zeros(1, 3, 320, 320))
    with torch.no_grad():
        before = detector(images)[0]
        detector.backbone = supernet.extract()
        after = detector(images)[0]
        assert all(torch.equal(before[key], after[key]) for key in before)
        detector.backbone = supernet.extract(supernet.space.uniform(0.5))
        assert set(detector(images)[0]) == {"boxes", "scores", "labels"}
