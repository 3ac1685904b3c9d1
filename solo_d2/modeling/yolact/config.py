"""Config keys of YOLACT and YOLACT++."""

from detectron2.config import CfgNode as CN


def add_yolact_config(cfg: CN) -> None:
    """Add the keys to ``cfg``, in place."""
    # The defaults are those of the published YOLACT-550; YOLACT++ changes the anchors and
    # switches MASK_IOU on.
    cfg.MODEL.YOLACT = CN()
    # Without background. -1: as many as the training set's metadata has.
    cfg.MODEL.YOLACT.NUM_CLASSES = -1
    # Features of the backbone, finest first, strides doubling; the pyramid adds coarser levels
    # until there is one for each entry of ANCHOR_SIZES.
    cfg.MODEL.YOLACT.IN_FEATURES = ["res3", "res4", "res5"]
    # Channels of the pyramid, the prediction head and the protonet; and the prototypes.
    cfg.MODEL.YOLACT.CONV_DIM = 256
    cfg.MODEL.YOLACT.NUM_PROTOTYPES = 32
    # Norm of their convolutions but the last ones. The published "" is for backbones from ImageNet
    # and small steps; "GN" lets a model from scratch learn at the rates of the others.
    cfg.MODEL.YOLACT.NORM = ""
    # Factor on the initial weights that predict boxes, classes, coefficients and semantic labels.
    # The published 1 is for backbones from ImageNet. From scratch the first thing that masks learn
    # of random coefficients is to vanish, with the prototypes; small ones let these live.
    cfg.MODEL.YOLACT.PREDICTOR_GAIN = 1.0

    # Anchors: a size per level in pixels of the network's input, to be scaled with that (the models
    # for 400 and 700 pixels have the sizes times 400 / 550 and 700 / 550, truncated); so many sizes
    # from one octave to the next (++: 3); widths over heights.
    cfg.MODEL.YOLACT.ANCHOR_SIZES = [24, 48, 96, 192, 384]
    cfg.MODEL.YOLACT.ANCHORS_PER_OCTAVE = 1
    cfg.MODEL.YOLACT.ANCHOR_ASPECT_RATIOS = [1.0, 0.5, 2.0]
    # Make the heights of all anchors equal to their widths, as the published code did by mistake;
    # the weights of YOLACT need it. False for ++, SBD, and better when trained anew.
    cfg.MODEL.YOLACT.SQUARE_ANCHORS = True

    # IoU with the best object below which an anchor is background, and from which it is positive;
    # between the two it is ignored.
    cfg.MODEL.YOLACT.IOU_THRESHOLDS = [0.4, 0.5]
    # Background anchors with more than this share of their area in a crowd region are ignored
    # (crowds come with INPUT.KEEP_CROWD); 1.0: none.
    cfg.MODEL.YOLACT.CROWD_THRESH = 0.7
    # Hard negatives in the class loss per positive anchor of the same image.
    cfg.MODEL.YOLACT.NEG_POS_RATIO = 3
    # At most so many positive anchors of an image enter the mask loss, drawn at random (the model
    # for 700 pixels: 300); 0: all.
    cfg.MODEL.YOLACT.MASKS_TO_TRAIN = 100
    # Divide the mask loss of an instance by its box's area; False: by that of the image.
    cfg.MODEL.YOLACT.MASK_AREA_NORM = True
    cfg.MODEL.YOLACT.BOX_LOSS_WEIGHT = 1.5
    cfg.MODEL.YOLACT.CLASS_LOSS_WEIGHT = 1.0
    cfg.MODEL.YOLACT.MASK_LOSS_WEIGHT = 6.125
    cfg.MODEL.YOLACT.SEMANTIC_LOSS_WEIGHT = 1.0

    # Masks are cropped with boxes: "output", in training at the size of the prototypes and at
    # inference at that of the image, so that no pixel is outside of its box; "prototype", both at
    # the size of the prototypes, as published; "none".
    cfg.MODEL.YOLACT.CROP = "output"
    # The crop at the size of the prototypes is so much wider on each side, in their pixels.
    cfg.MODEL.YOLACT.CROP_PADDING = 1.0

    # YOLACT++: a small network predicts from each mask its IoU with the truth.
    cfg.MODEL.YOLACT.MASK_IOU = CN()
    cfg.MODEL.YOLACT.MASK_IOU.ENABLED = False
    cfg.MODEL.YOLACT.MASK_IOU.LOSS_WEIGHT = 25.0
    # Only objects of more than so many pixels at the size of the prototypes train it.
    cfg.MODEL.YOLACT.MASK_IOU.MIN_AREA = 25
    # Keep its gradient away from the masks. The published code does not.
    cfg.MODEL.YOLACT.MASK_IOU.DETACH = False
    # Multiply "scores" too, and sort by that, instead of "mask_scores" only: for display.
    cfg.MODEL.YOLACT.MASK_IOU.RESCORE_BOXES = False

    # Keep batch norms as they are (neither statistics nor affine parameters are trained) where a
    # process has fewer images a step: their statistics would be too noisy. 0: never.
    cfg.MODEL.YOLACT.FREEZE_BN_BELOW = 6

    # Anchors whose best class has at most this probability are no candidates.
    cfg.MODEL.YOLACT.SCORE_THRESH_TEST = 0.05
    # "fast" (Fast NMS for each class), "cross_class" (Fast NMS of all classes together, each
    # candidate under its best) or "traditional" (greedy, for each class).
    cfg.MODEL.YOLACT.NMS_TYPE = "fast"
    cfg.MODEL.YOLACT.NMS_THRESH_TEST = 0.5
    # Fast NMS, of both kinds: how many of the best take part (in each class).
    cfg.MODEL.YOLACT.TOPK_CANDIDATES_TEST = 200
    # Fast NMS: a candidate also counts for classes other than its best if these have more than
    # this probability. The published code asks for none.
    cfg.MODEL.YOLACT.CLASS_SCORE_THRESH_TEST = 0.0
    # Hold cross-class Fast NMS to TEST.DETECTIONS_PER_IMAGE as well. The published code does not.
    cfg.MODEL.YOLACT.LIMIT_CROSS_CLASS = False
    # Only detections with a higher score are given out; 0.15 is recommended for display.
    cfg.MODEL.YOLACT.MIN_SCORE_TEST = 0.0
    # Boxes of the results: "int", truncated to whole pixels as published, or "float".
    cfg.MODEL.YOLACT.BOX_ROUNDING = "int"
    cfg.MODEL.YOLACT.MASK_THRESH_TEST = 0.5
