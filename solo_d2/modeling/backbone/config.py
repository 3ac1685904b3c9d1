"""Config keys of the backbones."""

from detectron2.config import CfgNode as CN


def add_backbone_config(cfg: CN) -> None:
    """Add the keys to ``cfg``, in place."""
    # Keep the backbone's batch norms in eval mode while training: their affine parameters are
    # trained, their statistics are frozen (mmdetection's recipe for small batches).
    cfg.MODEL.BACKBONE.FREEZE_BN_STATS = False
    # In training, keep only the inputs of the backbone's blocks and compute the blocks again in the
    # backward pass: less memory, more time. For this package's models and backbones.
    cfg.MODEL.BACKBONE.CHECKPOINT_ACTIVATIONS = False

    # In a stage of RESNETS.DEFORM_ON_PER_STAGE, make every DEFORM_INTERVAL-th block deformable
    # (1 = all), and give its 3x3 convolution a bias. YOLACT++ with ResNet-101 has 3, True.
    cfg.MODEL.RESNETS.DEFORM_INTERVAL = 1
    cfg.MODEL.RESNETS.DEFORM_BIAS = False

    # DarkNet-53 as a bottom-up backbone: res1..res5 at strides 2..32.
    cfg.MODEL.DARKNET = CN()
    cfg.MODEL.DARKNET.OUT_FEATURES = ["res3", "res4", "res5"]

    # torchvision's MobileNetV2 as a bottom-up backbone: res2..res5 at strides 4..32.
    cfg.MODEL.MOBILENETV2 = CN()
    cfg.MODEL.MOBILENETV2.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Factor on all widths; published weights are for 1.
    cfg.MODEL.MOBILENETV2.WIDTH_MULT = 1.0
    # "FrozenBN" or "BN".
    cfg.MODEL.MOBILENETV2.NORM = "FrozenBN"

    # VoVNetV2 as a bottom-up backbone: stem and stage2 at stride 4, stage3..stage5 at 8..32.
    cfg.MODEL.VOVNET = CN()
    # "V-19-slim-dw-eSE", "V-19-dw-eSE", "V-19-slim-eSE", "V-19-eSE", "V-39-eSE", "V-57-eSE" or
    # "V-99-eSE".
    cfg.MODEL.VOVNET.CONV_BODY = "V-39-eSE"
    cfg.MODEL.VOVNET.OUT_FEATURES = ["stage2", "stage3", "stage4", "stage5"]
    # Factor on all widths; published weights are for 1.
    cfg.MODEL.VOVNET.WIDTH_MULT = 1.0
    # "FrozenBN", "BN", "SyncBN" or "GN".
    cfg.MODEL.VOVNET.NORM = "FrozenBN"
    # stage2..stage5 with deformable 3x3 convolutions (no effect on the "dw" bodies), and whether
    # these are DCNv2.
    cfg.MODEL.VOVNET.STAGE_WITH_DCN = (False, False, False, False)
    cfg.MODEL.VOVNET.WITH_MODULATED_DCN = False
