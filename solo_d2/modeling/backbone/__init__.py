from .darknet import DarkNet, build_darknet_backbone
from .deform_resnet import (
    build_deform_resnet_backbone,
    build_deform_resnet_fpn_backbone,
    build_fcos_resnet_fpn_backbone,
)
from .mobilenetv2 import (
    MobileNetV2,
    build_fcos_mobilenetv2_fpn_backbone,
    build_mobilenetv2_backbone,
    build_mobilenetv2_fpn_backbone,
)
from .resnet38 import ResNet38, build_resnet38_backbone
from .unet import AdaptISUNet, build_adaptis_unet_backbone
from .vovnet import (
    VoVNet,
    build_fcos_vovnet_fpn_backbone,
    build_vovnet_backbone,
    build_vovnet_fpn_backbone,
)

__all__ = [
    "AdaptISUNet",
    "DarkNet",
    "MobileNetV2",
    "ResNet38",
    "VoVNet",
    "build_adaptis_unet_backbone",
    "build_darknet_backbone",
    "build_deform_resnet_backbone",
    "build_deform_resnet_fpn_backbone",
    "build_fcos_mobilenetv2_fpn_backbone",
    "build_fcos_resnet_fpn_backbone",
    "build_fcos_vovnet_fpn_backbone",
    "build_mobilenetv2_backbone",
    "build_mobilenetv2_fpn_backbone",
    "build_resnet38_backbone",
    "build_vovnet_backbone",
    "build_vovnet_fpn_backbone",
]
