"""ResNets with deformable convolutions, without Detectron2's compiled extension."""

from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling import ResNet, build_resnet_backbone
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn
from torch.nn import functional as F

from solo_d2.layers.deform_conv import DeformConv2d

from .registry import register_backbone, register_pyramids


class DeformBottleneck(CNNBlockBase):
    """A bottleneck whose 3x3 convolution is deformable, with torchvision's operator.

    It is made from a plain block. Parameters are named as in Detectron2's own deformable block,
    which needs its compiled extension.
    """

    def __init__(self, plain: BottleneckBlock, *, modulated: bool, bias: bool = False):
        """
        Args:
            plain: the block whose layers are reused.
            modulated: DCNv2.
            bias: give the deformable convolution a bias, zero at first, before its norm.
        """
        super().__init__(plain.in_channels, plain.out_channels, plain.stride)
        self.shortcut, self.conv1, self.conv3 = plain.shortcut, plain.conv1, plain.conv3
        old = plain.conv2
        self.conv2 = DeformConv2d(
            old.in_channels,
            old.out_channels,
            modulated=modulated,
            kernel_size=old.kernel_size,
            stride=old.stride,
            padding=old.padding,
            dilation=old.dilation,
            groups=old.groups,
            bias=bias,
            norm=old.norm,
        )
        self.conv2.weight = old.weight
        if bias:
            nn.init.zeros_(self.conv2.bias)
        # Detectron2 has it beside conv2, not inside it
        self.conv2_offset = self.conv2.offset
        del self.conv2.offset

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2.sample(out, self.conv2_offset(out)))
        out = self.conv3(out)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out + shortcut)


@register_backbone
def build_deform_resnet_backbone(cfg, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ResNet with RESNETS.DEFORM_ON_PER_STAGE and DEFORM_MODULATED honored.

    DEFORM_INTERVAL and DEFORM_BIAS are ours; see config.py.

    Raises:
        ValueError: one of these keys has an unsupported value.
    """
    options = cfg.MODEL.RESNETS
    deform = options.DEFORM_ON_PER_STAGE
    if options.DEPTH < 50 and any(deform):
        raise ValueError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE needs DEPTH 50 or more, not {options.DEPTH}"
        )
    if options.DEFORM_NUM_GROUPS != 1:
        raise ValueError(
            f"MODEL.RESNETS.DEFORM_NUM_GROUPS must be 1, not {options.DEFORM_NUM_GROUPS}"
        )
    if options.DEFORM_INTERVAL < 1:
        raise ValueError(
            f"MODEL.RESNETS.DEFORM_INTERVAL must be 1 or more, not {options.DEFORM_INTERVAL}"
        )
    plain_cfg = cfg.clone()
    plain_cfg.defrost()
    plain_cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    resnet = build_resnet_backbone(plain_cfg, input_shape)
    for stage, deformable in zip(resnet.stages, deform):
        if deformable:
            for i in range(0, len(stage), options.DEFORM_INTERVAL):
                stage[i] = DeformBottleneck(
                    stage[i], modulated=options.DEFORM_MODULATED, bias=options.DEFORM_BIAS
                )
    # a frozen stage stays frozen with its new layers
    return resnet.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


register_pyramids(
    build_deform_resnet_backbone,
    fpn="build_deform_resnet_fpn_backbone",
    fcos_fpn="build_fcos_resnet_fpn_backbone",
)
