"""Config keys of FCOS and CenterMask."""

from detectron2.config import CfgNode as CN


def add_centermask_config(cfg: CN) -> None:
    """Add the keys to ``cfg``, in place."""
    # FCOS as "FCOSProposalGenerator": CenterMask's boxes, and with MODEL.MASK_ON False a detector
    # by itself. The defaults are those of CenterMask's published code and configs.
    cfg.MODEL.FCOS = CN()
    # -1: as many as the training set's metadata has.
    cfg.MODEL.FCOS.NUM_CLASSES = -1
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Levels that the build_fcos_*_fpn_backbone pyramids have above the last one of the body.
    cfg.MODEL.FCOS.TOP_LEVELS = 2
    # Convolutions before the two towers and in each, and their normalization ("GN": 32 groups).
    cfg.MODEL.FCOS.NUM_SHARE_CONVS = 0
    cfg.MODEL.FCOS.NUM_CLS_CONVS = 4
    cfg.MODEL.FCOS.NUM_BOX_CONVS = 4
    cfg.MODEL.FCOS.NORM = "GN"
    # A learned factor on the distances of each level.
    cfg.MODEL.FCOS.USE_SCALE = True
    # Probability of each class before training.
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01

    # Locations learn a box if they are nearer to its center than this, in strides, along each axis;
    # 0: if they are in the box.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    # Borders between the levels, in pixels from a location to the furthest side of its box.
    cfg.MODEL.FCOS.SIZES_OF_INTEREST = [64, 128, 256, 512]
    # "giou", "iou" (its logarithm) or "linear_iou".
    cfg.MODEL.FCOS.BBOX_REG_LOSS_TYPE = "giou"
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0

    # Least class probability of a box. CenterMask's paper takes 0.03 in training, which gives the
    # mask branch more boxes early on; its published code and weights 0.05.
    cfg.MODEL.FCOS.SCORE_THRESH_TRAIN = 0.05
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.05
    # Compare the product of class probability and centerness with that threshold instead.
    cfg.MODEL.FCOS.THRESH_WITH_CENTERNESS = False
    # Candidates per level before NMS; the overlap (IoU) that NMS allows, 0 for no NMS; boxes per
    # image after it, 0 for all. In training these are the boxes for the mask branch.
    cfg.MODEL.FCOS.PRE_NMS_TOPK_TRAIN = 1000
    cfg.MODEL.FCOS.PRE_NMS_TOPK_TEST = 1000
    cfg.MODEL.FCOS.NMS_THRESH = 0.6
    cfg.MODEL.FCOS.POST_NMS_TOPK_TRAIN = 100
    cfg.MODEL.FCOS.POST_NMS_TOPK_TEST = 50

    # "CenterMaskROIHeads"; the mask head's layers and pooling are set in MODEL.ROI_MASK_HEAD, and
    # MODEL.ROI_HEADS.NUM_CLASSES must be that of MODEL.FCOS or -1, which takes it over.
    cfg.MODEL.CENTERMASK = CN()
    # Which level a box is pooled from: "ratio" (by its share of the image's area) or "area" (by its
    # size in pixels, as in FPN).
    cfg.MODEL.CENTERMASK.ASSIGN_CRITERION = "ratio"
    # Clip boxes to the image before they are pooled, as the first CenterMask did.
    cfg.MODEL.CENTERMASK.CLIP_BOXES = False
    # Predict the IoU of each mask and rank masks by box score times this ("mask_scores").
    cfg.MODEL.CENTERMASK.MASK_IOU_ON = True
    cfg.MODEL.CENTERMASK.MASK_IOU_LOSS_WEIGHT = 1.0
    # 3x3 convolutions of that head and their channels; units of its two linear layers.
    cfg.MODEL.CENTERMASK.MASK_IOU_NUM_CONV = 4
    cfg.MODEL.CENTERMASK.MASK_IOU_CONV_DIM = 256
    cfg.MODEL.CENTERMASK.MASK_IOU_FC_DIM = 1024
