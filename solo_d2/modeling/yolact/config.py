"""Config keys of YOLACT and YOLACT++."""

from detectron2.config import CfgNode as CN


def add_yolact_config(cfg: CN) -> None:
    """Add the keys to ``cfg``, in place. The defaults are those of the published YOLACT-550."""
    cfg.MODEL.YOLACT = CN()
    # Without background. -1: the number of classes of the training set.
    cfg.MODEL.YOLACT.NUM_CLASSES = -1
    # The model resizes its input to a square of this side, ignoring the aspect ratio, without
    # antialiasing. Set INPUT.MIN_SIZE_TRAIN: (0,) and MIN_SIZE_TEST: 0 with it, so that images are
    # not resized twice. 0: the input keeps its size.
    cfg.MODEL.YOLACT.INPUT_SIZE = 550
    # Features of the backbone, finest first, with strides that double. The pyramid adds coarser
    # levels until there is one for each entry of ANCHOR_SIZES.
    cfg.MODEL.YOLACT.IN_FEATURES = ["res3", "res4", "res5"]
    # Channels of the pyramid, the prediction head and the protonet.
    cfg.MODEL.YOLACT.CONV_DIM = 256
    cfg.MODEL.YOLACT.NUM_PROTOTYPES = 32
    # Norm of their convolutions, except the last ones. The published "" suits pretrained backbones
    # and low learning rates; "GN" allows training from scratch at the rates of other models.
    cfg.MODEL.YOLACT.NORM = ""
    # Factor on the initial weights of the layers that predict boxes, classes, coefficients and
    # semantic labels. The published 1 suits pretrained backbones. When training from scratch, large
    # random coefficients first drive all masks, and with them the prototypes, to zero; a smaller
    # factor avoids this.
    cfg.MODEL.YOLACT.PREDICTOR_GAIN = 1.0

    # Side of the smallest anchor per level, in pixels of the network's input; scale it with
    # INPUT_SIZE (the published models for 400 and 700 pixels truncate the result).
    cfg.MODEL.YOLACT.ANCHOR_SIZES = [24, 48, 96, 192, 384]
    # Scales per level (YOLACT++: 3).
    cfg.MODEL.YOLACT.ANCHORS_PER_OCTAVE = 1
    # Width over height.
    cfg.MODEL.YOLACT.ANCHOR_ASPECT_RATIOS = [1.0, 0.5, 2.0]
    # Make the height of every anchor equal to its width, a mistake of the published code that the
    # weights of YOLACT depend on. False for YOLACT++ and SBD; better for new trainings.
    cfg.MODEL.YOLACT.SQUARE_ANCHORS = True

    # Maximum number of positive anchors of an image, chosen at random, in the mask loss (the
    # published model for 700 pixels: 300). 0: all.
    cfg.MODEL.YOLACT.MASKS_TO_TRAIN = 100
    # At which size masks are cropped to predicted boxes: "output", at the size of the output, so
    # that no pixel lies outside of its box; "prototype", at the size of the prototypes, as
    # published; "none", never. Training crops at the size of the prototypes unless "none".
    cfg.MODEL.YOLACT.CROP = "output"
    # YOLACT++: a small network predicts each mask's IoU with the ground truth from the mask.
    cfg.MODEL.YOLACT.MASK_IOU = CN()
    cfg.MODEL.YOLACT.MASK_IOU.ENABLED = False
    # Freeze the backbone's batch norms (statistics and affine parameters) if a process has fewer
    # images per step than this, because their statistics would be too noisy. 0: never.
    cfg.MODEL.YOLACT.FREEZE_BN_BELOW = 6

    # Anchors whose best class has at most this probability are dropped.
    cfg.MODEL.YOLACT.SCORE_THRESH_TEST = 0.05
    # "fast" (Fast NMS within each class), "cross_class" (Fast NMS across all classes) or
    # "traditional" (greedy NMS within each class).
    cfg.MODEL.YOLACT.NMS_TYPE = "fast"
    cfg.MODEL.YOLACT.NMS_THRESH_TEST = 0.5
    # Maximum number of candidates (of each class) in Fast NMS.
    cfg.MODEL.YOLACT.TOPK_CANDIDATES_TEST = 200
    # Boxes of the results: "int", truncated to whole pixels as published, or "float".
    cfg.MODEL.YOLACT.BOX_ROUNDING = "int"
