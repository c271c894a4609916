"""Bundles laid out as the MONAI Model Zoo ships them, with the same configuration in kind and small random weights.

What stands in them is what a person would download: names of classes without their modules, references (@), expressions ($),
a data set that isn't there, handlers of a library that isn't installed, scripts, docs, several configurations. Only the networks
are narrower and the windows smaller than the zoo's, so that a test can run them. Their answers mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

Config = dict[str, Any]

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20220324.json"
DEVICE = "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')"
TOTAL = (
    "spleen kidney_right kidney_left gallbladder liver stomach aorta inferior_vena_cava portal_vein_and_splenic_vein pancreas "
    "adrenal_gland_right adrenal_gland_left lung_upper_lobe_left lung_lower_lobe_left lung_upper_lobe_right lung_middle_lobe_right "
    "lung_lower_lobe_right vertebrae_L5 vertebrae_L4 vertebrae_L3 vertebrae_L2 vertebrae_L1 vertebrae_T12 vertebrae_T11 vertebrae_T10 "
    "vertebrae_T9 vertebrae_T8 vertebrae_T7 vertebrae_T6 vertebrae_T5 vertebrae_T4 vertebrae_T3 vertebrae_T2 vertebrae_T1 vertebrae_C7 "
    "vertebrae_C6 vertebrae_C5 vertebrae_C4 vertebrae_C3 vertebrae_C2 vertebrae_C1 esophagus trachea heart_myocardium heart_atrium_left "
    "heart_ventricle_left heart_atrium_right heart_ventricle_right pulmonary_artery brain iliac_artery_left iliac_artery_right "
    "iliac_vena_left iliac_vena_right small_bowel duodenum colon "
    + " ".join(f"rib_{side}_{number}" for side in ("left", "right") for number in range(1, 13))
    + " humerus_left humerus_right scapula_left scapula_right clavicula_left clavicula_right femur_left femur_right hip_left hip_right "
    "sacrum face gluteus_maximus_left gluteus_maximus_right gluteus_medius_left gluteus_medius_right gluteus_minimus_left "
    "gluteus_minimus_right autochthon_left autochthon_right iliopsoas_left iliopsoas_right urinary_bladder"
).split()


def write_bundle(folder: Path, name: str) -> Path:
    """Write the bundle `name` of BUNDLES into `folder` and return it: `folder`/`name`, the same bytes of weights each time."""
    root = folder / name
    for inner in ("configs", "docs", "models"):
        (root / inner).mkdir(parents=True)
    metadata, config, weights, scripts = BUNDLES[name]()
    write_json(root / "configs/metadata.json", metadata)
    if "_yaml" in config:
        (root / "configs/inference.yaml").write_text(str(config["_yaml"]), encoding="utf-8")
    else:
        write_json(root / "configs/inference.json", config)
    torch.save(weights, root / "models/model.pt")
    for file, text in scripts.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text, encoding="utf-8")
    write_json(root / "configs/train.json", {"imports": ["$import ignite"], "train": {"trainer": {"_target_": "SupervisedTrainer"}}})
    write_json(root / "configs/evaluate.json", {"validate#handlers": [{"_target_": "MetricsSaver"}]})
    write_json(root / "configs/multi_gpu_train.json", {"device": "$torch.device(f'cuda:{dist.get_rank()}')"})
    (root / "configs/logging.conf").write_text("[loggers]\nkeys=root\n", encoding="utf-8")
    (root / "docs/README.md").write_text(f"# {metadata['task']}\n", encoding="utf-8")
    (root / "docs/data_license.txt").write_text("Data of nobody.\n", encoding="utf-8")
    (root / "LICENSE").write_text(
        "                                 Apache License\n                           Version 2.0, January 2004\n", encoding="utf-8"
    )
    return root


def write_json(file: Path, content: Config) -> None:
    """Write a configuration as the zoo does: indented by four."""
    file.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def seeded(build: Callable[[], torch.nn.Module]) -> dict[str, torch.Tensor]:
    """The weights of a new network, the same ones each time; torch's own seed stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        return dict(build().state_dict())


def by_configuration(config: Config) -> dict[str, torch.Tensor]:
    """The weights of the network that a configuration defines."""
    from monai.bundle import ConfigParser

    return seeded(lambda: ConfigParser(config).get_parsed_content("network_def"))


def metadata_of(task: str, modality: str, channels: dict[str, str] | int, outputs: Config, **more: Any) -> Config:
    """A bundle's metadata.json; `channels` is the input's channel_def, or how many channels of one image."""
    inputs = {"0": "image"} if isinstance(channels, int) else channels
    return {
        "schema": SCHEMA,
        "version": "0.5.8",
        "changelog": {"0.5.8": "keep the layout", "0.0.1": "begin"},
        "monai_version": "1.4.0",
        "pytorch_version": "2.4.0",
        "numpy_version": "1.24.4",
        "optional_packages_version": {"nibabel": "5.2.1", "pytorch-ignite": "0.4.11"},
        "name": task,
        "task": task,
        "description": f"Random weights in the place of a trained model. {task}",
        "authors": "nobody",
        "copyright": "Copyright (c) nobody",
        "data_source": "no data",
        "data_type": "nibabel",
        "image_classes": "intensity scaled to [0, 1]",
        "intended_use": "This is an example, not to be used for diagnostic purposes",
        "references": [],
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image", "format": "hounsfield" if modality == "CT" else "magnitude", "modality": modality,
                    "num_channels": channels if isinstance(channels, int) else len(channels), "spatial_shape": [96, 96, 96],
                    "dtype": "float32", "value_range": [0, 1], "is_patch_data": True, "channel_def": inputs,
                }
            },
            "outputs": {"pred": outputs},
        },
        **more,
    }  # fmt: skip


def segmentation_output(labels: list[str], **more: Any) -> Config:
    """network_data_format.outputs.pred of a segmentation."""
    return {
        "type": "image", "format": "segmentation", "num_channels": len(labels), "spatial_shape": [96, 96, 96], "dtype": "float32",
        "value_range": [0, 1], "is_patch_data": True, "channel_def": {str(i): label for i, label in enumerate(labels)},
    } | more  # fmt: skip


def transforms(*steps: Config) -> Config:
    """A Compose as it stands in a configuration."""
    return {"_target_": "Compose", "transforms": list(steps)}


def step(target: str, keys: Any = "image", **arguments: Any) -> Config:
    """One transform of a Compose."""
    return {"_target_": target, "keys": keys, **arguments}


def workflow(**parts: Any) -> Config:
    """The parts of an inference.json in the zoo's order; what isn't given is the same in every bundle."""
    fixed = {
        "imports": ["$import glob", "$import os", "$import numpy"],
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "dataset_dir": "/workspace/data/Task09_Spleen",
        "datalist": "$list(sorted(glob.glob(@dataset_dir + '/imagesTs/*.nii.gz')))",
        "device": DEVICE,
        "network_def": {},
        "network": "$@network_def.to(@device)",
        "preprocessing": {},
        "dataset": {"_target_": "Dataset", "data": "$[{'image': i} for i in @datalist]", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "shuffle": False, "num_workers": 4},
        "inferer": {"_target_": "SimpleInferer"},
        "postprocessing": {},
        "handlers": [{"_target_": "StatsHandler", "iteration_log": False}],
        "evaluator": {
            "_target_": "SupervisedEvaluator", "device": "@device", "val_data_loader": "@dataloader", "network": "@network",
            "inferer": "@inferer", "postprocessing": "@postprocessing", "val_handlers": "@handlers", "amp": True,
        },
        "checkpointloader": {
            "_target_": "CheckpointLoader", "load_path": "$@bundle_root + '/models/model.pt'", "load_dict": {"model": "@network"},
        },
        "initialize": ["$setattr(torch.backends.cudnn, 'benchmark', True)", "$@checkpointloader(@evaluator)"],
        "run": ["$@evaluator.run()"],
    }  # fmt: skip
    return {**{key: value for key, value in parts.items() if key not in fixed}, **fixed, **parts}


def sliding(edge: int, **more: Any) -> Config:
    """A SlidingWindowInferer with a cubic window."""
    return {"_target_": "SlidingWindowInferer", "roi_size": [edge, edge, edge], "sw_batch_size": 4, "overlap": 0.5} | more


Made = tuple[Config, Config, dict[str, torch.Tensor], dict[str, str]]  # metadata, inference, weights, other files


def _spleen() -> Made:
    metadata = metadata_of("Decathlon spleen segmentation", "CT", 1, segmentation_output(["background", "spleen"]))
    config = workflow(
        output_ext=".nii.gz",
        output_dtype="$numpy.float32",
        output_postfix="trans",
        separate_folder=True,
        network_def={
            "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8, 16, 16, 16],
            "strides": [2, 2, 2, 2], "num_res_units": 2, "norm": "batch",
        },
        preprocessing=transforms(
            step("LoadImaged"),
            step("EnsureChannelFirstd"),
            step("Orientationd", axcodes="RAS"),
            step("Spacingd", pixdim=[1.5, 1.5, 2.0], mode="bilinear"),
            step("ScaleIntensityRanged", a_min=-57, a_max=164, b_min=0, b_max=1, clip=True),
            step("EnsureTyped"),
        ),
        inferer=sliding(96),
        postprocessing=transforms(
            step("Activationsd", "pred", softmax=True),
            step("Invertd", "pred", transform="@preprocessing", orig_keys="image", nearest_interp=False, to_tensor=True),
            step("AsDiscreted", "pred", argmax=True),
            step(
                "SaveImaged", "pred", output_dir="@output_dir", output_ext="@output_ext", output_dtype="@output_dtype",
                output_postfix="@output_postfix", separate_folder="@separate_folder",
            ),
        ),
        initialize=["$monai.utils.set_determinism(seed=123)", "$@checkpointloader(@evaluator)"],
    )  # fmt: skip
    return metadata, config, by_configuration(config), {}


def _brats() -> Made:
    outputs = segmentation_output(["Tumor core", "Whole tumor", "Enhancing tumor"], spatial_shape=["8*n", "8*n", "8*n"])
    channels = {"0": "T1c", "1": "T1", "2": "T2", "3": "FLAIR"}
    metadata = metadata_of("Multimodal Brain Tumor segmentation", "MR", channels, outputs, version="0.4.2")
    config = workflow(
        data_list_file_path="$@bundle_root + '/configs/datalist.json'",
        test_datalist="$monai.data.load_decathlon_datalist(@data_list_file_path, data_list_key='testing', base_dir=@dataset_dir)",
        amp=True,
        network_def={
            "_target_": "SegResNet", "blocks_down": [1, 2, 2, 4], "blocks_up": [1, 1, 1], "init_filters": 8, "in_channels": 4,
            "out_channels": 3, "dropout_prob": 0.2,
        },
        preprocessing=transforms(step("LoadImaged", image_only=False), step("NormalizeIntensityd", nonzero=True, channel_wise=True)),
        dataset={"_target_": "Dataset", "data": "@test_datalist", "transform": "@preprocessing"},
        inferer=sliding(96, roi_size=[128, 128, 64], sw_batch_size=1),
        postprocessing=transforms(
            step("Activationsd", "pred", sigmoid=True),
            step(
                "Invertd", "pred", transform="@preprocessing", orig_keys="image", meta_keys="pred_meta_dict", nearest_interp=False,
                to_tensor=True,
            ),
            step("AsDiscreted", "pred", threshold=0.5),
            step(
                "Lambdad", "pred",
                func="$lambda x: torch.where(x[[2]] > 0, 4, torch.where(x[[0]] > 0, 1, torch.where(x[[1]] > 0, 2, 0)))",
            ),
            step("SaveImaged", "pred", meta_keys="pred_meta_dict", output_dir="@output_dir", output_dtype="uint8", resample=False),
        ),
    )  # fmt: skip
    del config["datalist"], config["checkpointloader"]
    config["handlers"] = [
        {"_target_": "CheckpointLoader", "load_path": "$@bundle_root + '/models/model.pt'", "load_dict": {"model": "@network"}},
        *config["handlers"],
    ]
    config["initialize"] = ["$setattr(torch.backends.cudnn, 'benchmark', True)"]
    return metadata, config, by_configuration(config), {}


def _whole_body() -> Made:
    outputs = segmentation_output(["background", *TOTAL], value_range=[0, 104])
    metadata = metadata_of("TotalSegmentator Segmentation", "CT", 1, outputs, version="0.2.7", name="Whole body CT segmentation")
    config = workflow(
        displayable_configs={"highres": True, "sw_overlap": 0.25, "sw_batch_size": 1},
        image_key="image",
        pixdim="$[3.0, 3.0, 3.0] if @displayable_configs#highres else [6.0, 6.0, 6.0]",
        modelname="$'model.pt' if @displayable_configs#highres else 'model_lowres.pt'",
        network_def={
            "_target_": "SegResNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 105, "init_filters": 8,
            "blocks_down": [1, 2, 2, 4], "blocks_up": [1, 1, 1], "dropout_prob": 0.2,
        },
        preprocessing=transforms(
            step("LoadImaged", "@image_key"),
            step("EnsureTyped", "@image_key"),
            step("EnsureChannelFirstd", "@image_key"),
            step("Orientationd", "@image_key", axcodes="RAS"),
            step("Spacingd", "@image_key", pixdim="@pixdim", mode="bilinear"),
            step("NormalizeIntensityd", "@image_key", nonzero=True),
            step("ScaleIntensityd", "@image_key", minv=-1.0, maxv=1.0),
        ),
        inferer=sliding(
            48, sw_batch_size="@displayable_configs#sw_batch_size", overlap="@displayable_configs#sw_overlap",
            padding_mode="replicate", mode="gaussian", device=DEVICE,
        ),
        postprocessing=transforms(
            step("Activationsd", "pred", softmax=True),
            step("AsDiscreted", "pred", argmax=True),
            step("Invertd", "pred", transform="@preprocessing", orig_keys="@image_key", nearest_interp=True, to_tensor=True),
            step("SaveImaged", "pred", output_dir="@output_dir"),
        ),
    )  # fmt: skip
    config["checkpointloader"]["load_path"] = "$@bundle_root + '/models/' + @modelname"
    return metadata, config, by_configuration(config), {}


def _prostate() -> Made:
    outputs = segmentation_output(["background", "central gland", "peripheral zone"], format="labels", value_range=[])
    task = "Segmentation of peripheral zone and central gland in prostate MRI"
    packages = {"nibabel": "3.2.2", "itk": "5.2.1", "pytorch-ignite": "0.4.9", "pandas": "1.4.2"}
    metadata = metadata_of(task, "MR", 1, outputs, version="0.3.1", optional_packages_version=packages)
    config = workflow(
        imports=["$import pandas as pd", "$import os"],  # pandas isn't installed, and only the data set wants it
        datalist="$list(@dataset_dir + pd.read_csv(@dataset_dir + 'test.csv').t2)",
        network_def={
            "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [4, 8, 8, 16, 16, 16],
            "strides": [2, 2, 2, 2, 2], "num_res_units": 4, "norm": "batch", "act": "prelu", "dropout": 0.15,
        },
        preprocessing=transforms(
            step("LoadImaged"),
            step("EnsureChannelFirstd"),
            step("Orientationd", axcodes="RAS"),
            step("Spacingd", pixdim=[0.5, 0.5, 0.5], mode="bilinear"),
            step("ScaleIntensityd", minv=0, maxv=1),
            step("NormalizeIntensityd"),
            step("EnsureTyped"),
        ),
        inferer=sliding(96),
        postprocessing=transforms(
            step("AsDiscreted", "pred", argmax=True),
            step("KeepLargestConnectedComponentd", "pred", applied_labels=[1, 2]),
            step(
                "Invertd", "pred", transform="@preprocessing", orig_keys="image", meta_key_postfix="meta_dict", nearest_interp=False,
                to_tensor=True,
            ),
            step("SaveImaged", "pred", resample=False, meta_keys="pred_meta_dict", output_dir="@output_dir"),
        ),
    )  # fmt: skip
    without_pandas = config | {"imports": []}
    return metadata, config, by_configuration(without_pandas), {}


_INFERER = '''"""Hands a batch to the detector: the network is the one that the evaluator was given."""

from monai.inferers.inferer import Inferer


class RetinaNetInferer(Inferer):
    def __init__(self, detector, force_sliding_window=False, *args, **kwargs):
        super().__init__()
        self.detector = detector
        self.force_sliding_window = force_sliding_window

    def __call__(self, inputs, network, *args, **kwargs):
        self.detector.network = network
        self.detector.training = network.training
        window = 1
        for edge in self.detector.inferer.roi_size:
            window *= edge
        large = any(image[0, ...].numel() >= window for image in inputs)
        return self.detector(inputs, *args, use_inferer=self.force_sliding_window or large, **kwargs)
'''


def _lung_nodule() -> Made:
    outputs = {
        "type": "object", "format": "dict", "dtype": "float16", "num_channels": 1, "spatial_shape": ["n", "n", "n"],
        "value_range": [-10000, 10000],
    }  # fmt: skip
    packages = {"nibabel": "5.2.1", "pytorch-ignite": "0.4.11", "torchvision": "0.19.0"}
    metadata = metadata_of("CT lung nodule detection", "CT", 1, outputs, version="0.6.8", optional_packages_version=packages)
    metadata["description"] = "A model of random weights for the detection of the lung lesion from CT image"
    size = [16, 16, 8]
    fpn = "monai.networks.blocks.backbone_fpn_utils.BackboneWithFPN"
    pool = "monai.networks.blocks.feature_pyramid_network.LastLevelMaxPool"
    affine = {"affine_lps_to_ras": True, "image_meta_key_postfix": "meta_dict"}
    config = workflow(
        whether_raw_luna16=False,
        whether_resampled_luna16="$(not @whether_raw_luna16)",
        imports=["$import glob", "$import os"],
        test_datalist="$monai.data.load_decathlon_datalist(@data_list_file_path, is_segmentation=True, data_list_key='validation')",
        data_list_file_path="$@bundle_root + '/LUNA16_datasplit/dataset_fold0.json'",
        amp=True,
        spatial_dims=3,
        num_classes=1,
        force_sliding_window=False,
        size_divisible=size,
        infer_patch_size=[192, 192, 80],
        anchor_generator={
            "_target_": "monai.apps.detection.utils.anchor_utils.AnchorGeneratorWithAnchorShape", "feature_map_scales": [1, 2, 4],
            "base_anchor_shapes": [[6, 8, 4], [8, 6, 5], [10, 10, 6]],
        },
        backbone="$monai.networks.nets.resnet.ResNet('basic',[1,1,1,1],[8,8,16,16],spatial_dims=3,n_input_channels=1,"
        "conv1_t_stride=[2,2,1],conv1_t_size=[7,7,7])",
        feature_extractor=f"${fpn}(backbone=@backbone,return_layers={{'layer1':'0','layer2':'1'}},in_channels_list=[8,8],"
        f"out_channels=16,spatial_dims=3,extra_blocks={pool}(3))",
        network_def={
            "_target_": "RetinaNet", "spatial_dims": "@spatial_dims", "num_classes": "@num_classes", "num_anchors": 3,
            "feature_extractor": "@feature_extractor", "size_divisible": "@size_divisible", "use_list_output": False,
        },
        detector={
            "_target_": "RetinaNetDetector", "network": "@network", "anchor_generator": "@anchor_generator", "debug": False,
            "spatial_dims": "@spatial_dims", "num_classes": "@num_classes", "size_divisible": "@size_divisible",
        },
        detector_ops=[
            "$@detector.set_target_keys(box_key='box', label_key='label')",
            "$@detector.set_box_selector_parameters(score_thresh=0.02,topk_candidates_per_level=90,nms_thresh=0.22,detections_per_img=90)",
            "$@detector.set_sliding_window_inferer(roi_size=@infer_patch_size,overlap=0.25,sw_batch_size=1,mode='constant',device='cpu')",
        ],
        preprocessing=transforms(
            step("LoadImaged", image_only=False, meta_key_postfix="meta_dict", _disabled_="@whether_raw_luna16"),
            step(
                "LoadImaged", image_only=False, meta_key_postfix="meta_dict", reader="itkreader", affine_lps_to_ras=True,
                _disabled_="@whether_resampled_luna16",
            ),
            step("EnsureChannelFirstd"),
            step("Orientationd", axcodes="RAS"),
            step("Spacingd", pixdim=[0.703125, 0.703125, 1.25], _disabled_="@whether_resampled_luna16"),
            step("ScaleIntensityRanged", a_min=-1024.0, a_max=300.0, b_min=0.0, b_max=1.0, clip=True),
            step("EnsureTyped"),
        ),
        dataset={"_target_": "Dataset", "data": "$@test_datalist", "transform": "@preprocessing"},
        inferer={
            "_target_": "scripts.detection_inferer.RetinaNetInferer", "detector": "@detector",
            "force_sliding_window": "@force_sliding_window",
        },
        postprocessing=transforms(
            {"_target_": "ClipBoxToImaged", "box_keys": "box", "label_keys": "label", "box_ref_image_keys": "image", "remove_empty": True},
            {"_target_": "AffineBoxToWorldCoordinated", "box_keys": "box", "box_ref_image_keys": "image", **affine},
            {"_target_": "ConvertBoxModed", "box_keys": "box", "src_mode": "xyzxyz", "dst_mode": "cccwhd"},
            {"_target_": "DeleteItemsd", "keys": ["image"]},
        ),
        handlers=[
            {"_target_": "CheckpointLoader", "load_path": "$@bundle_root + '/models/model.pt'", "load_dict": {"model": "@network"}},
            {"_target_": "scripts.detection_saver.DetectionSaver", "output_dir": "@output_dir", "pred_score_key": "label_scores"},
        ],
        evaluator={
            "_target_": "scripts.evaluator.DetectionEvaluator", "_requires_": "@detector_ops", "device": "@device",
            "network": "@network", "inferer": "@inferer", "val_handlers": "@handlers", "amp": "@amp",
        },
        initialize=["$setattr(torch.backends.cudnn, 'benchmark', True)"],
    )  # fmt: skip
    del config["datalist"], config["checkpointloader"]
    scripts = {
        "scripts/__init__.py": "",
        "scripts/detection_inferer.py": _INFERER,
        "scripts/detection_saver.py": "import ignite  # not installed, and nobody needs what follows\n",
        "scripts/evaluator.py": "import ignite  # not installed, and nobody needs what follows\n",
    }
    return metadata, config, seeded(_retina_net), scripts


def _retina_net() -> torch.nn.Module:
    """The network of the detection bundle, built without torchvision: a mapping of layers by name has the same weights."""
    from monai.apps.detection.networks.retinanet_network import RetinaNet
    from monai.networks.blocks.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
    from monai.networks.nets.resnet import ResNet

    backbone = ResNet(
        "basic", [1, 1, 1, 1], [8, 8, 16, 16], spatial_dims=3, n_input_channels=1, conv1_t_stride=[2, 2, 1], conv1_t_size=[7, 7, 7]
    )
    extractor = torch.nn.Module()
    names = [name for name, _ in backbone.named_children()]
    extractor.body = torch.nn.ModuleDict({name: getattr(backbone, name) for name in names[: names.index("layer2") + 1]})
    extractor.fpn = FeaturePyramidNetwork(3, [8, 8], 16, extra_blocks=LastLevelMaxPool(3))
    extractor.out_channels = 16
    return RetinaNet(3, 1, 3, extractor, [16, 16, 8])  # type: ignore[no-any-return]  # monai ships partial types


def _chest_classes() -> Made:
    outputs = {
        "type": "probabilities", "format": "classes", "num_channels": 2, "spatial_shape": [1, 2], "dtype": "float32", "value_range": [0, 1],
        "is_patch_data": False, "channel_def": {"0": "normal", "1": "pneumonia"},
    }  # fmt: skip
    metadata = metadata_of("Chest X-ray pneumonia classification", "X-ray", 1, outputs, version="0.1.0", optional_packages_version={})
    metadata["network_data_format"]["inputs"]["image"] |= {"spatial_shape": [128, 128], "is_patch_data": False}
    config = workflow(
        network_def={
            "_target_": "DenseNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "init_features": 8, "growth_rate": 4,
            "block_config": [2, 2, 2],
        },
        preprocessing=transforms(
            step("LoadImaged"),
            step("EnsureChannelFirstd"),
            step("ScaleIntensityd", minv=0.0, maxv=1.0),
            step("Resized", spatial_size=[128, 128]),
            step("EnsureTyped"),
        ),
        postprocessing=transforms(step("Activationsd", "pred", softmax=True), step("AsDiscreted", "pred", argmax=True, to_onehot=2)),
    )  # fmt: skip
    return metadata, config, by_configuration(config), {}


_UNEST = '''"""A network of the bundle's own: two convolutions and a head."""

import torch

from .blocks import Block


class UNesT(torch.nn.Module):
    def __init__(self, in_channels=1, out_channels=4, width=8):
        super().__init__()
        self.first = Block(in_channels, width)
        self.second = Block(width, width)
        self.head = torch.nn.Conv3d(width, out_channels, 1)

    def forward(self, image):
        return self.head(self.second(self.first(image)))
'''
_BLOCKS = '''"""A convolution and what follows it."""

import torch


class Block(torch.nn.Sequential):
    def __init__(self, before, after):
        super().__init__(torch.nn.Conv3d(before, after, 3, padding=1), torch.nn.InstanceNorm3d(after), torch.nn.LeakyReLU(0.01))
'''


def _renal() -> Made:
    labels = ["background", "kidney cortex", "medulla", "pelvicalyceal system"]
    packages = {"nibabel": "3.2.1", "pytorch-ignite": "0.4.8", "einops": "0.4.1"}
    metadata = metadata_of("Renal segmentation", "CT", 1, segmentation_output(labels), version="0.2.5", optional_packages_version=packages)
    config = workflow(
        bundle_root="/models/renalStructures_UNEST_segmentation",  # as the zoo ships it: the folder of whoever made it
        network_def={"_target_": "scripts.networks.unest.UNesT", "in_channels": 1, "out_channels": 4},
        preprocessing=transforms(
            step("LoadImaged"),
            step("EnsureChannelFirstd"),
            step("Orientationd", axcodes="RAS"),
            step("Spacingd", pixdim=[1.0, 1.0, 1.0], mode="bilinear"),
            step("ScaleIntensityRanged", a_min=-175, a_max=250, b_min=0.0, b_max=1.0, clip=True),
            step("EnsureTyped"),
        ),
        inferer=sliding(96),
        postprocessing=transforms(
            step("Activationsd", "pred", softmax=True),
            step(
                "Invertd", "pred", transform="@preprocessing", orig_keys="image", meta_key_postfix="meta_dict", nearest_interp=False,
                to_tensor=True,
            ),
            step("AsDiscreted", "pred", argmax=True),
            step("SaveImaged", "pred", meta_keys="pred_meta_dict", output_dir="@output_dir"),
        ),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(20)
    shapes = {"first.0": (8, 1, 3, 3, 3), "second.0": (8, 8, 3, 3, 3), "head": (4, 8, 1, 1, 1)}
    weights = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    weights |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()}
    scripts = {
        "scripts/__init__.py": "",
        "scripts/networks/__init__.py": "",
        "scripts/networks/unest.py": _UNEST,
        "scripts/networks/blocks.py": _BLOCKS,
    }
    return metadata, config, weights, scripts


def _breast_density() -> Made:
    outputs = {
        "type": "image", "format": "labels", "dtype": "float32", "value_range": [0, 1], "num_channels": 4, "spatial_shape": [1, 4],
        "is_patch_data": False, "channel_def": {"0": "A", "1": "B", "2": "C", "3": "D"},
    }  # fmt: skip
    packages = {"torchvision": "0.13.1"}
    metadata = metadata_of("Breast Density Classification", "Mammogram", 3, outputs, version="0.1.6", optional_packages_version=packages)
    metadata["description"] = "A pre-trained model for classifying breast images (mammograms)"
    metadata["network_data_format"]["inputs"]["image"] |= {"spatial_shape": [299, 299], "is_patch_data": False}
    config = workflow(
        data={"_target_": "scripts.createList.CreateImageLabelList", "filename": "./configs/sample_image_data.json"},
        network_def={
            "_target_": "TorchVisionFCModel", "model_name": "inception_v3", "num_classes": 4, "in_channels": 2048, "use_conv": False,
            "pool": "",
        },
        preprocessing=transforms(
            step("LoadImaged"),
            step("EnsureChannelFirstd", channel_dim=2),
            step("ScaleIntensityd", minv=0.0, maxv=1.0),
            step("Resized", spatial_size=[299, 299]),
        ),
        postprocessing=transforms(step("Activationsd", "pred", sigmoid=True)),
    )  # fmt: skip
    del config["imports"]
    config = {"import": ["$import glob", "$import os", "$import torchvision"]} | config
    weights = {"features.0.weight": torch.zeros(1)}  # nobody gets so far as to load them
    return metadata, config, weights, {"scripts/__init__.py": "", "scripts/createList.py": "import torchvision\n"}


def _template() -> Made:
    labels = ["background", "liver", "spleen", "hepatic tumor"]
    metadata = metadata_of("Segmentation template", "CT", 1, segmentation_output(labels), version="0.0.4")
    network = {
        "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": "@num_classes", "channels": [4, 8, 8, 16],
        "strides": [2, 2, 2], "num_res_units": 2,
    }  # fmt: skip
    image, pred = "@image", "@pred"
    config = {
        "imports": ["$import os", "$import torch", "$import glob"],
        "image": "$monai.utils.CommonKeys.IMAGE",
        "pred": "$monai.utils.CommonKeys.PRED",
        "batch_size": 1,
        "num_classes": 4,
        "device": DEVICE,
        "bundle_root": ".",
        "ckpt_path": "$@bundle_root + '/models/model.pt'",
        "dataset_dir": "$@bundle_root + '/test_data'",
        "output_dir": "./outputs",
        "network_def": network,
        "network": "$@network_def.to(@device)",
        "data_list": "$list(sorted(glob.glob(os.path.join(@dataset_dir, '*.nii*'))))",
        "data_dicts": "$[{@image:i} for i in @data_list]",
        "transforms": [step("LoadImaged", image, image_only=True), step("EnsureChannelFirstd", image), step("ScaleIntensityd", image)],
        "preprocessing": {"_target_": "Compose", "transforms": "$@transforms"},
        "dataset": {"_target_": "Dataset", "data": "@data_dicts", "transform": "@preprocessing"},
        "dataloader": {"_target_": "ThreadDataLoader", "dataset": "@dataset", "batch_size": "@batch_size", "num_workers": 0},
        "inferer": sliding(64),
        "postprocessing": transforms(
            step("Activationsd", pred, softmax=True),
            step("AsDiscreted", pred, argmax=True),
            step("SaveImaged", pred, output_dir="@output_dir", dtype="$None", output_postfix="", separate_folder=True),
        ),
        "handlers": [
            {
                "_target_": "CheckpointLoader", "_disabled_": "$not os.path.exists(@ckpt_path)", "load_path": "@ckpt_path",
                "load_dict": {"model": "@network"},
            },
            {"_target_": "StatsHandler", "name": None, "output_transform": "$lambda x: None"},
        ],
        "evaluator": {"_target_": "SupervisedEvaluator", "device": "@device", "network": "@network", "inferer": "@inferer"},
        "run": ["$@evaluator.run()"],
    }  # fmt: skip
    weights = by_configuration({"network_def": network | {"out_channels": 4}})
    return metadata, {"_yaml": "---\n" + yaml.safe_dump(config, sort_keys=False)}, weights, {}


BUNDLES: dict[str, Callable[[], Made]] = {
    "spleen_ct_segmentation": _spleen,
    "brats_mri_segmentation": _brats,
    "wholeBody_ct_segmentation": _whole_body,
    "prostate_mri_anatomy": _prostate,
    "lung_nodule_ct_detection": _lung_nodule,
    "cxr_densenet_classification": _chest_classes,
    "renalStructures_UNEST_segmentation": _renal,  # its network is in its scripts
    "breast_density_classification": _breast_density,  # needs torchvision
    "segmentation_template": _template,  # inference.yaml
}
