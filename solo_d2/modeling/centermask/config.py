"""Config keys of FCOS and CenterMask."""

from detectron2.config import CfgNode as CN


def add_centermask_config(cfg: CN) -> None:
    """Add the keys to ``cfg``, in place.

    CenterMask's other options have keys in Detectron2: MODEL.ROI_HEADS (sampling, IN_FEATURES),
    MODEL.ROI_MASK_HEAD and MODEL.ROI_KEYPOINT_HEAD (layers and pooling), TEST.DETECTIONS_PER_IMAGE.
    """
    # FCOS as "FCOSProposalGenerator": CenterMask's boxes, or a detector by itself if MODEL.MASK_ON
    # is False. The defaults are those of CenterMask's published code and configs.
    cfg.MODEL.FCOS = CN()
    # -1: the number of classes of the training set.
    cfg.MODEL.FCOS.NUM_CLASSES = -1
    # The build_fcos_*_fpn_backbone pyramids get as many levels as these (and, for masks,
    # ROI_HEADS.IN_FEATURES) need.
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Number of convolutions in each of the two towers.
    cfg.MODEL.FCOS.NUM_CLS_CONVS = 4
    cfg.MODEL.FCOS.NUM_BOX_CONVS = 4

    # A location is assigned to a box if it is nearer to the box's center than this many strides
    # along each axis; 0: if it is anywhere in the box.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    # Borders between the levels, in pixels from a location to the furthest side of its box.
    cfg.MODEL.FCOS.SIZES_OF_INTEREST = [64, 128, 256, 512]
    # "giou", "iou" (its logarithm) or "linear_iou".
    cfg.MODEL.FCOS.BBOX_REG_LOSS_TYPE = "giou"

    # Minimum class probability of a box. In training, boxes are the mask branch's proposals; there
    # CenterMask's paper uses 0.03, its published code and weights 0.05.
    cfg.MODEL.FCOS.SCORE_THRESH_TRAIN = 0.05
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.05
    # IoU of two boxes of a class above which NMS drops the worse one; 0: no NMS.
    cfg.MODEL.FCOS.NMS_THRESH = 0.6

    # "CenterMaskROIHeads". MODEL.ROI_HEADS.NUM_CLASSES must be that of MODEL.FCOS or -1.
    cfg.MODEL.CENTERMASK = CN()
    # Which level a box is pooled from: "ratio" (by its share of the image's area) or "area" (by its
    # size in pixels, as in FPN).
    cfg.MODEL.CENTERMASK.ASSIGN_CRITERION = "ratio"
    # Predict the IoU of each mask and rank masks by box score times predicted IoU ("mask_scores").
    cfg.MODEL.CENTERMASK.MASK_IOU_ON = True
    # 3x3 convolutions of that head and their channels; units of its two linear layers.
    cfg.MODEL.CENTERMASK.MASK_IOU_NUM_CONV = 4
    cfg.MODEL.CENTERMASK.MASK_IOU_CONV_DIM = 256
    cfg.MODEL.CENTERMASK.MASK_IOU_FC_DIM = 1024
