from .darknet import DarkNet
from .deform_resnet import DeformBottleneck
from .mobilenetv2 import MobileNetV2
from .resnet38 import ResNet38
from .unet import AdaptISUNet
from .vovnet import VoVNet

__all__ = ["AdaptISUNet", "DarkNet", "DeformBottleneck", "MobileNetV2", "ResNet38", "VoVNet"]
