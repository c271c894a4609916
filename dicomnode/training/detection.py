"""A detection: MONAI's RetinaNet, trained on boxes around the components of a truth, and written as the MONAI Bundle that the node runs.

Its network is built from the very configuration that the bundle will hold. ATSS matches anchors to boxes (S. Zhang et al., CVPR 2020),
hard negatives are drawn, classes have binary cross entropy or the focal loss, boxes smooth L1.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.apps.detection.metrics.coco import COCOMetric
from monai.apps.detection.metrics.matching import matching_batch
from monai.bundle import ConfigParser
from monai.data.box_utils import box_iou
from monai.losses import FocalLoss
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy import ndimage

from dicomnode.analysis.bundle_modules import stand_ins
from dicomnode.analysis.manifest import BundleSection, Manifest
from dicomnode.errors import ConfigError
from dicomnode.training.recipe import Recipe, TrainingSection

LOWEST_SCORE = 0.05  # of the boxes that a detector gives
OVERLAP = 0.1  # intersection over union from which a box counts as a hit
_ROOM = "monai.apps.detection"

Json = dict[str, Any]


class RetinaNetArguments(BaseModel):
    """`network.arguments` of a RetinaNet: a small ResNet with a feature pyramid over its first two stages. Orders: slice, row, column."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    in_channels: int = Field(1, ge=1)
    blocks: tuple[int, int] = Field((1, 1), description="residual blocks of the stages")
    widths: tuple[int, int] = Field((16, 32), description="channels of the stages; the stem has those of the first")
    stem_stride: tuple[int, int, int] = Field((1, 1, 1), description="a maximum over 3 voxels of stride 2 follows it")
    pyramid: int = Field(32, ge=8, description="channels of the pyramid and the heads; a multiple of 8")
    anchors: tuple[tuple[float, float, float], ...] = Field(min_length=1, description="shapes in voxels at the finest level; doubled twice")

    @property
    def divisor(self) -> tuple[int, ...]:
        """What the edges of an image must be multiples of."""
        return tuple(8 * stride for stride in self.stem_stride)


def arguments_of(recipe: Recipe) -> RetinaNetArguments:
    """The network's arguments, checked.

    Raises:
        ConfigError: they have mistakes, or the package isn't one that can be detected with.
    """
    manifest = recipe.package
    if recipe.network.name != "RetinaNet":
        raise ConfigError(f"network.name: a detection is trained as RetinaNet, and not as {recipe.network.name}")
    if [output.channel for output in manifest.outputs] != list(range(len(manifest.outputs))):
        raise ConfigError("package.outputs: the channels of a detection are 0, 1, … in this order")
    if manifest.preprocessing is None or manifest.inference is None or manifest.inputs[0].dimensions != 3:
        raise ConfigError("package: a detection is trained on volumes, and needs preprocessing and inference")
    if manifest.preprocessing.spacing_mm is None or manifest.preprocessing.intensity == "z-score":
        raise ConfigError("package.preprocessing: a detection needs spacing_mm, and intensities by window or percentiles")
    try:
        arguments = RetinaNetArguments.model_validate(recipe.network.arguments)
    except ValidationError as error:
        mistakes = [f"network.arguments.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError("; ".join(mistakes)) from error
    return arguments


def bundle_config(recipe: Recipe) -> Json:
    """`configs/inference.json`: the network, the detector, and how an image is prepared and put through them."""
    arguments, manifest = arguments_of(recipe), recipe.package
    inference, classes = manifest.inference, len(manifest.outputs)
    assert inference is not None  # noqa: S101  # arguments_of has looked
    window = list(inference.window)
    blocks = [*arguments.blocks, 1, 1]
    widths = [*arguments.widths, arguments.widths[1], arguments.widths[1]]
    return {
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "anchor_generator": {
            "_target_": f"{_ROOM}.utils.anchor_utils.AnchorGeneratorWithAnchorShape", "feature_map_scales": [1, 2, 4],
            "base_anchor_shapes": [list(shape) for shape in arguments.anchors],
        },
        "backbone": {
            "_target_": "monai.networks.nets.resnet.ResNet", "block": "basic", "layers": blocks, "block_inplanes": widths,
            "spatial_dims": 3, "n_input_channels": arguments.in_channels, "conv1_t_size": [3, 5, 5],
            "conv1_t_stride": list(arguments.stem_stride),
        },
        "feature_extractor": {
            "_target_": "monai.networks.blocks.backbone_fpn_utils.BackboneWithFPN", "backbone": "@backbone",
            "return_layers": {"layer1": "0", "layer2": "1"}, "in_channels_list": list(arguments.widths),
            "out_channels": arguments.pyramid, "spatial_dims": 3,
            "extra_blocks": {"_target_": "monai.networks.blocks.feature_pyramid_network.LastLevelMaxPool", "spatial_dims": 3},
        },
        "network_def": {
            "_target_": f"{_ROOM}.networks.retinanet_network.RetinaNet", "spatial_dims": 3, "num_classes": classes,
            "num_anchors": len(arguments.anchors), "feature_extractor": "@feature_extractor", "size_divisible": list(arguments.divisor),
        },
        "detector": {
            "_target_": f"{_ROOM}.networks.retinanet_detector.RetinaNetDetector", "network": "@network_def",
            "anchor_generator": "@anchor_generator",
        },
        "detector_ops": [
            f"$@detector.set_box_selector_parameters(score_thresh={LOWEST_SCORE}, topk_candidates_per_level=300, nms_thresh=0.22)",
            f"$@detector.set_sliding_window_inferer(roi_size={window}, overlap={inference.overlap}, sw_batch_size={inference.batch})",
        ],
        "preprocessing": {"_target_": "Compose", "transforms": _preparation(manifest)},
        "postprocessing": {"_target_": "Compose", "transforms": []},  # boxes are taken as they are, on the network's grid
        # what is larger than the window is cut into windows
        "inferer": f"$lambda images, network, detector=@detector.eval(), ops=@detector_ops, window={window}: detector(images, "
        "use_inferer=any(n > w for image in images for n, w in zip(image.shape[1:], window)))",
    }  # fmt: skip


def manifest_of(recipe: Recipe) -> Manifest:
    """The package's manifest as the bundle's: it brings its own preprocessing."""
    return recipe.package.model_copy(update={"preprocessing": None, "inference": None, "bundle": BundleSection()})


def build_retinanet(recipe: Recipe) -> torch.nn.Module:
    """The network as the bundle's configuration says.

    Raises:
        ConfigError: its arguments have mistakes.
    """
    config = {key: value for key, value in bundle_config(recipe).items() if key in ("backbone", "feature_extractor", "network_def")}
    with stand_ins():
        network: torch.nn.Module = ConfigParser(config).get_parsed_content("network_def")
    return network


def detector_of(recipe: Recipe, network: torch.nn.Module) -> torch.nn.Module:
    """A RetinaNetDetector around a network, able to train and to detect."""
    wanted = ("anchor_generator", "detector", "detector_ops", "network_def")
    parser = ConfigParser({key: value for key, value in bundle_config(recipe).items() if key in wanted})
    parser["network_def"] = network
    detector: Any = parser.get_parsed_content("detector")
    parser.get_parsed_content("detector_ops")
    section = recipe.training
    focal = section.focal_weight > 0
    detector.set_cls_loss(FocalLoss(gamma=section.focal_gamma) if focal else torch.nn.BCEWithLogitsLoss())
    detector.set_box_regression_loss(torch.nn.SmoothL1Loss(beta=1 / 9), encode_gt=True, decode_pred=False)
    detector.set_atss_matcher(num_candidates=4, center_in_gt=False)
    detector.set_hard_negative_sampler(batch_size_per_image=64, positive_fraction=0.3, pool_size=20, min_neg=16)
    detector.set_target_keys(box_key="box", label_key="label")
    return detector  # type: ignore[no-any-return]  # monai ships partial types


@contextlib.contextmanager
def _as_here() -> Iterator[None]:
    """MONAI's detector without torchvision, and without numpy's warning of what MONAI does with sizes."""
    with stand_ins(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array_wrap__", category=DeprecationWarning)
        yield


def boxes_of(truth: torch.Tensor) -> dict[str, torch.Tensor]:
    """Boxes (n, 6) and classes (n,) of one image's truth (outputs, k, r, c): each connected component has one.

    Corners lie at the outer edges of voxels, whose centres have whole numbers.
    """
    boxes, classes = [], []
    for number, mask in enumerate(truth.cpu().numpy() > 0.5):
        components, _ = ndimage.label(mask, structure=np.ones((3, 3, 3)))
        for box in ndimage.find_objects(components):
            boxes.append([*(edge.start - 0.5 for edge in box), *(edge.stop - 0.5 for edge in box)])
            classes.append(number)
    return {
        "box": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 6),
        "label": torch.tensor(classes, dtype=torch.int64),
    }


def detection_losses(
    detector: torch.nn.Module, image: torch.Tensor, truth: torch.Tensor, section: TrainingSection
) -> dict[str, torch.Tensor]:
    """Weighted loss of classes and of boxes of a batch: image (n, channels, k, r, c), truth (n, outputs, k, r, c)."""
    targets = [{key: value.to(image.device) for key, value in boxes_of(each).items()} for each in truth]
    detector.train()
    try:
        with _as_here():
            losses = detector([*image], targets)
    except ValueError as error:  # how MONAI says that an answer isn't finite
        if "NaN" not in str(error):
            raise
        nothing = torch.full((), float("nan"), device=image.device, requires_grad=True)
        return {"classes": nothing, "boxes": nothing}
    return {"classes": (section.focal_weight or section.bce_weight) * losses["classification"], "boxes": losses["box_regression"]}


@torch.no_grad()
def average_precision(
    detector: torch.nn.Module, batches: Iterable[Sequence[torch.Tensor]], device: torch.device, labels: Sequence[str]
) -> list[float]:
    """Average precision of every class over all patches together, a box being a hit from an overlap of 0.1."""
    said: dict[str, list[NDArray[Any]]] = {"box": [], "label": [], "label_scores": []}
    known: dict[str, list[NDArray[Any]]] = {"box": [], "label": []}
    detector.eval()
    for image, truth, _region in batches:
        with _as_here():
            answers = detector([*image.to(device)])
        for answer, boxes in zip(answers, map(boxes_of, truth), strict=True):
            for key, values in said.items():
                values.append(answer[key].float().cpu().numpy())
            for key, values in known.items():
                values.append(boxes[key].numpy())
    metric = COCOMetric(classes=list(labels), iou_list=[OVERLAP], iou_range=(OVERLAP, OVERLAP, 0.1), max_detection=[100], verbose=False)
    matched = matching_batch(
        iou_fn=box_iou, iou_thresholds=metric.iou_thresholds, pred_boxes=said["box"], pred_classes=said["label"],
        pred_scores=said["label_scores"], gt_boxes=known["box"], gt_classes=known["label"],
    )  # fmt: skip
    found: Mapping[str, float] = metric(matched)[0]
    return [next((float(v) for name, v in found.items() if name.startswith(label) and "AP_IoU" in name), float("nan")) for label in labels]


def _preparation(manifest: Manifest) -> list[Json]:
    """Transforms that bring an image onto the grid of training: towards head, back and left, as `analysis.grid` turns it."""
    settings = manifest.preprocessing
    assert settings is not None  # noqa: S101  # arguments_of has looked
    if settings.window is not None:
        low, high = settings.window
        scaling = {"_target_": "ScaleIntensityRanged", "a_min": low, "a_max": high}
    else:
        scaling = {"_target_": "ScaleIntensityRangePercentilesd", "lower": 1, "upper": 99}
    return [
        {"_target_": "LoadImaged", "keys": "image"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "Orientationd", "keys": "image", "axcodes": "SPL"},
        {"_target_": "Spacingd", "keys": "image", "pixdim": list(settings.spacing_mm or ()), "mode": "bilinear"},
        {**scaling, "keys": "image", "b_min": 0.0, "b_max": 1.0, "clip": True},
        {"_target_": "EnsureTyped", "keys": "image"},
    ]
